"""What lies in a run folder is not trusted, nor taken for our own: it may be damaged, copied, or somebody else's."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from processes import TINY, Train, run_ranks, start_ranks

from launch import cluster, jobs, submit
from launch.endings import find_kind
from launch.evidence import _find_original
from launch.runs import read_state
from launch.training import write_note
from mnist_dist import checkpoint, evaluate, lock, report
from mnist_dist import record as record_module
from mnist_dist.config import configure, make_config, parse_command_line
from mnist_dist.errors import RunError, UserError
from mnist_dist.files import expand_path, is_marked, mark_folder, read_file, write_atomically
from mnist_dist.lock import Lock, read_holder
from mnist_dist.options import read_options_file
from mnist_dist.record import Record, list_newest_first, read_config, read_ends, read_result, read_run
from mnist_dist.source import find_task, is_named_before, note_named
from mnist_dist.weights import make_header

LONG = [*TINY, "--steps", "5000"]


def hash_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of ten steps that lost its result: it would resume from its last checkpoint, of step 10."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run_ranks(folder.parent, Train([*TINY, "--optimizer", "muon", "--run_dir", str(folder)]))
    (folder / "result.json").unlink()
    return folder


@pytest.fixture
def run_dir(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def resume(run_dir, *, expect=0):
    return run_ranks(run_dir.parent, Train([*TINY, "--optimizer", "muon", "--run_dir", str(run_dir)]), expect=expect)


# Whose files


def test_only_files_of_its_own_names_are_removed_or_replaced(run_dir):
    theirs = {"notes.tmp": b"a", "checkpoints/model.pt.tmp": b"b", "plots/mine.png.tmp": b"c", "metrics.csv": b"d"}
    theirs |= {"result.json.tmp": b"e", "plots/curves.png.old.tmp": b"f", "checkpoints/x.pt.0123abcd.tmp": b"g"}
    ours = ["config.yaml.0123abcd.tmp", "result.json.0123abcd.tmp", "plots/curves.png.0123abcd.tmp", "stacks/rank0.txt.0123abcd.tmp"]
    ours += ["checkpoints/step_00000007-0123456789abcdef.pt.0123abcd.tmp"]
    for name in [*theirs, *ours]:
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_bytes(theirs.get(name, b"half"))
    (run_dir / "report.html.0123abcd.tmp").mkdir()
    (run_dir / "model.safetensors.0123abcd.tmp").symlink_to(run_dir / "notes.tmp")
    resume(run_dir)
    assert all((run_dir / name).read_bytes() == content for name, content in theirs.items())
    assert not any((run_dir / name).exists() for name in ours)
    assert (run_dir / "report.html.0123abcd.tmp").is_dir()
    assert (run_dir / "model.safetensors.0123abcd.tmp").is_symlink()


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "starts.jsonl", "ends.jsonl", "result.json", "model.safetensors", "config.yaml"])
def test_a_link_in_a_run_folder_harms_no_file_outside_of_it(run_dir, name):
    precious = run_dir.parent / "precious"
    content = (run_dir / name).read_bytes() if (run_dir / name).exists() else b"of great value\n"
    precious.write_bytes(content)
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(precious)
    [rank] = start_ranks(run_dir.parent, Train([*TINY, "--optimizer", "muon", "--run_dir", str(run_dir)]))
    rank.wait()
    assert "Traceback" not in rank.text
    assert precious.read_bytes() == content


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "model.safetensors", "report.html", "starts.jsonl"])
def test_a_folder_that_is_no_run_but_has_a_file_of_such_a_name_is_refused(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("somebody else's\n")
    text = run_ranks(tmp_path, Train([*TINY, "--run_dir", str(tmp_path / "run")]), 2, expect=2)
    assert text.count(f"holds {name} but no config.yaml, so it is not a run") == 2
    assert hash_files(tmp_path / "run") == {name: b"somebody else's\n"}


def test_a_folder_that_holds_other_things_is_used_beside_them(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    run_ranks(tmp_path, Train([*TINY, "--run_dir", str(tmp_path / "run")]))
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dataset", "fashion_mnist", "--data_dir", "nowhere"],
        ["--log_with", "aim"],
        ["--device", "cuda"],
        ["--wandb", "offline", "--wandb_project", "a/b"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_refused_is_refused_before_the_run_folder_is_made(tmp_path, arguments):
    text = run_ranks(tmp_path, Train([*TINY, "--train_size", "100", "--run_dir", str(tmp_path / "run"), *arguments]), 2, expect=2)
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_pictures_and_temporary_files_of_a_folder_that_is_no_run_are_somebody_elses(tmp_path):
    folder = tmp_path / "run"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots/curves.png").write_text("mine")
    assert "holds plots/curves.png but no config.yaml" in run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder)]), expect=2)
    (folder / "plots/curves.png").rename(folder / "result.json.tmp")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/notes").write_text("mine")
    run_ranks(tmp_path, Train([*TINY, "--steps", "1", "--evaluate_every", "1", "--run_dir", str(folder)]))
    assert (folder / "checkpoints/notes").read_text() == "mine"


def test_a_run_that_was_moved_away_leaves_the_one_in_its_place_alone(tmp_path):
    folder = tmp_path / "run"
    first = start_ranks(tmp_path, Train([*LONG, "--run_dir", str(folder)]), 2)
    first[0].wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size)
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    assert [rank.wait() for rank in first] == [1, 1]
    words = f"another folder is in the place of this run's, {folder}: somebody moved it to {tmp_path / 'moved'}"
    assert all(words in rank.text for rank in first)
    assert list(folder.iterdir()) == []
    [end] = read_ends(tmp_path / "moved")  # the folder that is its own
    assert find_kind(end["why"]) == "folder gone"


def test_checkpoints_that_cannot_be_listed_are_no_fresh_start(run_dir, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("checkpoints"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        list_newest_first(run_dir / "checkpoints")
    assert read_state(run_dir, []).step == 10  # from the rows


def test_checkpoints_that_somebody_removes_are_written_again(tmp_path):
    folder = tmp_path / "run"
    [rank] = start_ranks(tmp_path, Train([*LONG, "--run_dir", str(folder)]))
    rank.wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size)
    shutil.rmtree(folder / "checkpoints")
    rank.kill(15)
    assert rank.wait() == 143
    assert len(list_newest_first(folder / "checkpoints")) == 1


def test_a_run_whose_options_are_lost_is_taken_for_no_other(run_dir, capsys):
    resume(run_dir)
    options = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").unlink()
    assert "holds result.json but no config.yaml, so nothing tells of which options" in resume(run_dir, expect=2)
    name = options.index("batch_size")
    for end, words in ((0, "is damaged: it lacks"), (name, "is damaged: it lacks"), (name + 3, "is not valid YAML")):
        (run_dir / "config.yaml").write_text(options[:end])
        assert f"config.yaml {words}" in resume(run_dir, expect=2)
        assert evaluate.main([str(run_dir)]) == report.main([str(run_dir)]) == 2
        assert jobs.main([str(run_dir.parent)]) == 0
        assert "damaged config.yaml" in capsys.readouterr().out
    (run_dir / "config.yaml").unlink()
    (run_dir / "result.json").unlink()
    resume(run_dir)  # the checkpoint has the recipe
    assert (run_dir / "config.yaml").exists()


def test_a_run_whose_checkpoints_are_gone_is_no_fresh_start(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    rows = (run_dir / "metrics.jsonl").read_bytes()
    assert "has no checkpoint any more, and its record says that step 10 was saved" in resume(run_dir, expect=2)
    assert (run_dir / "metrics.jsonl").read_bytes() == rows


# Checkpoints with the right checksum


def expand(shape):
    return torch.zeros(1).expand(shape)


ROW = {"step": 10, "epoch": 1.0, "train/loss": 1.0, "train/learning_rate": 0.1, "train/images_per_s": 9.0}
DAMAGES = {
    "no step": lambda state: state.pop("step"),
    "a step that is text": lambda state: state.update(step="10"),
    "a step that is true": lambda state: state.update(step=True),
    "a step below zero": lambda state: state.update(step=-1),
    "a step of zero": lambda state: state.update(step=0),
    "a step beyond the end": lambda state: state.update(step=10**12),
    "no recipe": lambda state: state.pop("recipe"),
    "a recipe that is a list": lambda state: state.update(recipe=[1]),
    "a recipe with a tensor": lambda state: state["recipe"].update(seed=torch.zeros(3)),
    "a recipe with odd keys": lambda state: state["recipe"].update({3: 4}),
    "no data": lambda state: state.pop("data"),
    "data that is a number": lambda state: state.update(data=4),
    "no time": lambda state: state.pop("elapsed_s"),
    "a time that is no number": lambda state: state.update(elapsed_s=float("nan")),
    "a time without end": lambda state: state.update(elapsed_s=float("inf")),
    "a time that is text": lambda state: state.update(elapsed_s="long"),
    "a time below zero": lambda state: state.update(elapsed_s=-1.0),
    "no model": lambda state: state.pop("model"),
    "a model that is none": lambda state: state.update(model=None),
    "a model that is a tensor": lambda state: state.update(model=torch.zeros(3)),
    "a weight that is text": lambda state: state["model"].update({"conv1.bias": "zeros"}),
    "a weight that is no number": lambda state: state["model"]["conv1.bias"].fill_(float("nan")),
    "a weight of whole numbers": lambda state: state["model"].update({"conv1.bias": torch.zeros(32, dtype=torch.int64)}),
    "a weight without memory": lambda state: state["model"].update({"conv1.bias": torch.zeros(32, device="meta")}),
    "a sparse weight": lambda state: state["model"].update({"conv1.bias": torch.zeros(32).to_sparse()}),
    "a huge weight": lambda state: state["model"].update({"conv1.bias": expand((10**6, 10**6))}),
    "no optimizer": lambda state: state.pop("optimizer"),
    "an optimizer that is text": lambda state: state.update(optimizer="muon"),
    "an optimizer without state": lambda state: state["optimizer"].pop("state"),
    "an optimizer with nothing in its state": lambda state: state["optimizer"].update(state={}),
    "an optimizer with a list": lambda state: state["optimizer"].update(state=[1, 2]),
    "an optimizer that lacks a parameter": lambda state: state["optimizer"]["state"].pop(3),
    "an optimizer that lacks a tensor": lambda state: state["optimizer"]["state"][1].pop("square_average"),
    "an optimizer with a number for a parameter": lambda state: state["optimizer"]["state"].update({2: 4}),
    "an optimizer with text for a tensor": lambda state: state["optimizer"]["state"][2].update(average="none"),
    "an optimizer with another shape": lambda state: state["optimizer"]["state"][2].update(average=torch.zeros(3)),
    "an optimizer with text for indices": lambda state: state["optimizer"].update(
        state={str(key): value for key, value in state["optimizer"]["state"].items()}
    ),
    "an optimizer with more": lambda state: state["optimizer"]["state"][2].update(more=torch.zeros(3)),
    "an optimizer that is no number": lambda state: state["optimizer"]["state"][0]["average"].fill_(float("inf")),
    "rows that are text": lambda state: state.update(rows="all"),
    "rows without end": lambda state: state.update(rows=torch.zeros(1, dtype=torch.int64).expand(10**9)),
    "rows that fall": lambda state: state.update(rows=torch.tensor([1, 3, 2])),
    "rows beyond the step": lambda state: state.update(rows=torch.tensor([1, 10**15])),
    "rows below zero": lambda state: state.update(rows=torch.tensor([-5, 1])),
    "an unfinished row that is text": lambda state: state.update(unfinished="all"),
    "an unfinished row of another step": lambda state: state.update(unfinished=ROW | {"step": 9}),
    "an unfinished row that is there as well": lambda state: state.update(unfinished=ROW),
    "an unfinished row without a loss": lambda state: state.update(unfinished={"step": 10}, rows=torch.tensor([1])),
    "an unfinished row with a list": lambda state: state.update(unfinished=ROW | {"train/loss": [1.0]}, rows=torch.tensor([1])),
    "an unfinished row with a number for a name": lambda state: state.update(unfinished=ROW | {1: 2.0}, rows=torch.tensor([1])),
    "facts that are text": lambda state: state.update(facts="none"),
    "a fact that is a tensor": lambda state: state["facts"].update(mean=torch.zeros(3)),
    "what is trained is text": lambda state: state.update(trained="all"),
    "what is trained is numbers": lambda state: state.update(trained=[1, 2]),
    "what is trained is long": lambda state: state.update(trained=["x" * 10**6] * 100),
    "evaluated on a tensor": lambda state: state.update(evaluated=torch.zeros(3)),
    "a model backwards": lambda state: state.update(model=dict(reversed(state["model"].items()))),
    "a weight of eight bits": lambda state: state["model"].update({"conv1.bias": torch.zeros(32).to(torch.float8_e4m3fn)}),
    "a weight of sixteen bits": lambda state: state["model"].update({"conv1.bias": torch.zeros(32).half()}),
    "a format that is a tensor": lambda state: state.update(format=torch.tensor([1, 2])),
    "another step than its name": lambda state: state.update(step=9),
    "rows that are a matrix": lambda state: state.update(rows=torch.zeros(3, 3)),
    "a format that is text": lambda state: state.update(format="x" * 10_000),
}


OFTEN = set(list(DAMAGES)[::4])


@dataclass(frozen=True)
class ResumeEach:
    """A process that resumes from the damaged checkpoint in each of some folders, and prints how each start ended."""

    folder: str

    def __call__(self):
        from mnist_dist.train import main

        for run_dir in sorted(Path(self.folder).iterdir()):
            print(f"\n=== {run_dir.name}", file=sys.stderr, flush=True)
            status = main([*TINY, "--optimizer", "muon", "--run_dir", str(run_dir)])
            print(f"\nstatus {status}", file=sys.stderr, flush=True)


@pytest.mark.parametrize("names", [OFTEN, pytest.param(DAMAGES.keys() - OFTEN, marks=pytest.mark.slow)], ids=["often", "the rest"])
def test_a_checkpoint_with_the_right_checksum_and_odd_fields_is_named_in_one_message(stopped, tmp_path, names):
    newest = list_newest_first(stopped / "checkpoints")[0]
    names = sorted(names)
    for number, name in enumerate(names):
        folder = shutil.copytree(stopped, tmp_path / "runs" / f"{number:02}", ignore=shutil.ignore_patterns("step_*"))
        state = torch.load(newest, weights_only=True)
        DAMAGES[name](state)
        buffer = tmp_path / "state.pt"
        torch.save(state, buffer)
        checkpoint.write(folder / "checkpoints", 10, buffer.read_bytes(), keep=1)
    text = run_ranks(tmp_path, ResumeEach(str(tmp_path / "runs")))
    assert "Traceback" not in text
    answers = re.findall(r"=== (\d\d)\n(.*?)\nstatus (\d)", text, re.DOTALL)
    assert len(answers) == len(names)
    for name, (number, answer, status) in zip(names, answers, strict=True):
        lines = answer.strip().splitlines()
        assert status in "12", (name, answer)
        assert f"error: checkpoint {tmp_path / 'runs' / number}/checkpoints/step_00000010-" in lines[0], (name, answer)
        assert all(line.startswith("error: ") for line in lines), (name, answer)
        assert len(answer) < 2500, name


@dataclass(frozen=True)
class WriteOften:
    """A process that replaces a file by a text of its own, again and again."""

    path: str
    letter: bytes

    def __call__(self):
        for _ in range(200):
            write_atomically(Path(self.path), self.letter * 50_000)


def test_a_file_that_two_processes_write_at_once_is_complete_at_any_moment(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"c" * 50_000)
    writers = [start_ranks(tmp_path / letter, WriteOften(str(path), letter.encode()))[0] for letter in "ab"]
    while any(writer.is_alive for writer in writers):
        content = path.read_bytes()
        assert len(content) == 50_000
        assert len(set(content)) == 1
    assert [writer.wait() for writer in writers] == [0, 0]
    assert os.listdir(tmp_path).count("file") == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_that_would_unpack_to_more_is_refused():
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200_000_000))
    start = time.process_time()
    with pytest.raises(Exception, match="unpack to more than its size"):
        checkpoint.decode(buffer.getvalue())
    assert time.process_time() - start < 1


def test_options_that_came_later_do_not_part_a_run_from_its_older_checkpoints(run_dir):
    newest = list_newest_first(run_dir / "checkpoints")[0]
    state = checkpoint.decode(newest.read_bytes())
    for name in ("holdout", "nesterov", "label_smoothing"):  # as if these options had not been there yet
        assert state["recipe"].pop(name) == configure().fields()[name].default
    del state["rows"]
    newest.unlink()
    checkpoint.write(run_dir / "checkpoints", 10, checkpoint.encode(state), keep=1)
    lines = (run_dir / "config.yaml").read_text().splitlines()
    (run_dir / "config.yaml").write_text("\n".join(line for line in lines if not line.startswith(("holdout", "nesterov", "label_sm"))))
    assert "finished" in resume(run_dir)


# Files that are none


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "huge"])
@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "starts.jsonl", "result.json", "checkpoints/step_00000011-0123456789abcdef.pt", "lock"]
)
def test_what_is_no_regular_file_of_a_sensible_size_is_named_and_never_waited_for(run_dir, tmp_path, name, kind):
    path = run_dir / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    start = time.monotonic()
    state = read_state(run_dir, [])
    assert time.monotonic() - start < 30  # a fifo and a device never end
    if name not in ("lock", "checkpoints/step_00000011-0123456789abcdef.pt", "starts.jsonl") or kind != "huge":
        assert name.startswith(("lock", "checkpoints")) or f"damaged {name}" in state.state or kind == "huge"
    if name == "lock":
        return  # it only says who has the folder
    text = resume(run_dir, expect=None)
    assert "Traceback" not in text
    assert str(path) in text or path.name in text
    assert os.path.lexists(path)


def test_a_file_is_read_within_its_bounds(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert read_file(path, 10) == b"0123456789"
    assert read_file(path, 4, tail=True) == b"6789"
    with pytest.raises(OSError, match="it has 10 bytes, more than the 9"):
        read_file(path, 9)
    with pytest.raises(OSError, match="cannot be the name"):
        read_file("a\0b", 9)


# What is read for a listing

ODD_ROWS = {
    "a loss that is text": '{"step": 1, "train/loss": "low"}',
    "a loss that is a list": '{"step": 1, "train/loss": [1, 2]}',
    "an accuracy that is a list": '{"step": 1, "test/accuracy": [0.5]}',
    "an accuracy above one": '{"step": 1, "test/accuracy": 1e250}',
    "a step beyond the end": '{"step": 9007199254740991}',
    "a loss that is a list of text": '{"step": 1, "train/loss": ["low"]}',
    "an accuracy that is an object": '{"step": 1, "test/accuracy": {}}',
    "NaN": '{"step": 1, "train/loss": NaN}',
    "a step that is text": '{"step": "1"}',
    "a step that is true": '{"step": true}',
    "a step below zero": '{"step": -5}',
    "a huge step": '{"step": 1' + "0" * 400 + "}",
    "endless digits": '{"step": 1' + "0" * 10_000 + "}",
    "deep JSON": '{"step": ' + "[" * 20_000 + "]" * 20_000 + "}",
    "a deep list": '{"step": 1, "test/x": ' + "[" * 900 + "]" * 900 + "}",
    "no object": "[1, 2]",
    "no JSON": "\x1b[31mred",
}
ODD_ANYWHERE = ("NaN", "no object", "no JSON", "deep JSON", "endless digits")
ODD_YAML = {
    "a tag": "seed: !!python/name:os.system",
    "a tagged whole number": "seed: !!int x",
    "a tagged time": "run_dir: !!timestamp ''",
    "a tagged float": "learning_rate: !!float ''",
    "a tagged set": "seed: !!set [1]",
    "a tagged pair": "seed: !!omap [1]",
    "bytes": "seed: !!binary =",
    "a tag for nothing": "seed: !!null x",
    "a whole number of a megabyte": "seed: " + "9" * 60_000,
    "the same in other digits": "seed: 0x" + "f" * 60_000,
    "the same by sixties": "seed: 1" + ":59" * 2_000,
    "a time that is none": "run_dir: 2020-99-99",
    "deep": "seed: " + "[" * 30_000,
    "deep mappings": "".join(" " * level + "a:\n" for level in range(300)),
    "many whole numbers as keys": "".join(f"{number}: 1\n" for number in range(7_000)),
    "keys that are lists": "? [1, 2]\n: 3",
    "aliases of aliases": "".join(["a: &a0 [x]\n", *(f"b{n}: &a{n + 1} [*a{n}, *a{n}, *a{n}, *a{n}]\n" for n in range(30))]),
}


@pytest.mark.parametrize("name", ODD_ROWS)
@pytest.mark.parametrize("file", ["metrics.jsonl", "starts.jsonl", "result.json"])
def test_one_damaged_file_does_not_end_the_listing_of_the_others(run_dir, capsys, name, file):
    other = shutil.copytree(run_dir, run_dir.parent / "second")
    (run_dir / file).write_text(ODD_ROWS[name] + "\n")
    assert jobs.main([str(run_dir.parent)]) == 0
    answer = capsys.readouterr()
    lines = answer.out.splitlines()
    assert any(line.startswith("second ") and "stopped" in line for line in lines), answer.out
    if "list" in name and file == "starts.jsonl":
        return
    if (
        file != "starts.jsonl"
        or name in ("NaN", "no object", "no JSON", "deep JSON", "endless digits")
        or ("step" in name and "end" not in name)
    ):
        assert any(line.startswith("run ") and f"damaged {file}" in line for line in lines), answer.out
    assert answer.err == ""
    assert jobs.main([str(run_dir.parent), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert other


@pytest.mark.parametrize("name", ODD_YAML)
def test_odd_yaml_is_one_message_within_a_second(run_dir, capsys, name):
    good = (run_dir / "config.yaml").read_text()
    shutil.copytree(run_dir, run_dir.parent / "second")
    (run_dir / "config.yaml").write_text(ODD_YAML[name] + "\n")
    start = time.process_time()
    with pytest.raises(UserError) as error:
        read_config(run_dir)
    assert time.process_time() - start < 1.5
    assert len(str(error.value).splitlines()[0]) < 500
    assert jobs.main([str(run_dir.parent)]) == 0
    assert "damaged config.yaml" in capsys.readouterr().out
    assert good


@pytest.mark.parametrize("value", ["9" * 100_000, "1e400", "-" + "9" * 30, "0x10", "٣" * 5_000], ids=range(5))
def test_a_number_of_any_length_on_the_command_line_is_one_short_message(value):
    for option in ("--seed", "--batch_size", "--learning_rate", "--steps"):
        with pytest.raises(UserError) as error:
            parse_command_line([f"{option}={value}"])
        assert len(str(error.value)) < 300


def test_a_result_beyond_the_end_is_not_believed(run_dir):
    resume(run_dir)
    config = read_config(run_dir)
    result = json.loads((run_dir / "result.json").read_text())
    for step in (10**12, 11, 0, -1, 10.0, "10"):
        (run_dir / "result.json").write_text(json.dumps(result | {"step": step}))
        with pytest.raises(UserError, match="no valid step"):
            read_result(run_dir, config)
    for elapsed_s in ("long", None, True):
        (run_dir / "result.json").write_text(json.dumps(result | {"elapsed_s": elapsed_s}))
        with pytest.raises(UserError, match="no valid elapsed_s"):
            read_result(run_dir, config)
    for more in ({"test/loss": None}, {"test/loss": [1.0]}, {"test/" + "x" * 200_000: 1.0}):
        (run_dir / "result.json").write_text(json.dumps(result | more))
        with pytest.raises(UserError, match="no valid test/") as error:
            read_result(run_dir, config)
        assert len(str(error.value)) < 500


def test_held_out_figures_of_older_runs_are_found_under_their_own_name(tmp_path):
    arguments = [*TINY, "--train_size", "74", "--test_size", "none", "--holdout", "24", "--run_dir", str(tmp_path / "run")]
    run_ranks(tmp_path, Train(arguments))
    new = read_run(tmp_path / "run")
    assert {"holdout/accuracy", "holdout/loss", "holdout/class_accuracy"} < {*new.rows[-1]}
    for name in ("metrics.jsonl", "result.json"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace('"holdout/', '"test/'))
    assert read_run(tmp_path / "run") == new
    assert read_state(tmp_path / "run", []).best == new.result["holdout/accuracy"]


# Paths


def test_a_folder_is_found_as_a_shell_would_find_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand_path("~/runs") == f"{tmp_path}/runs"
    assert expand_path("$SCRATCH/x-${SCRATCH}") == "/scratch/me/x-/scratch/me"
    assert expand_path("runs/a~b") == "runs/a~b"
    for text, words in (("~nobody-here/x", "no user '~nobody-here'"), ("$NOWHERE/x", "NOWHERE is not set"), ("a$", "must begin")):
        with pytest.raises(ValueError, match=re.escape(words)):
            expand_path(text)
    (tmp_path / "config.yaml").write_text("run_dir: ~/runs\ndataset: kmnist\ndata_dir: $SCRATCH/data\n")
    config = parse_command_line(["--config", "~/config.yaml"])
    assert (config.run_dir, config.task.data_dir) == (f"{tmp_path}/runs", "/scratch/me/data")
    assert make_config({"run_dir": "~/x"}).run_dir == parse_command_line(["--run_dir=~/x"]).run_dir == f"{tmp_path}/x"
    with pytest.raises(UserError, match=r"run_dir is '\$NOWHERE/x'; the environment variable NOWHERE is not set"):
        parse_command_line(["--run_dir", "$NOWHERE/x"])


@pytest.mark.parametrize(
    "program", ["train", "evaluate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("predict", "export", "report", "plots"))]
)
def test_every_program_finds_folders_alike(program, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = "$NOWHERE_AT_ALL/x"
    words = {"train": [f"--run_dir={folder}"], "predict": [folder, "picture.png"], "export": [folder, "a.pt2"]}
    command = [sys.executable, "-m", f"mnist_dist.{program}", *words.get(program, [folder])]
    answer = subprocess.run(command, text=True, capture_output=True, cwd=Path(__file__).parents[1], timeout=60)
    assert answer.returncode == 2
    assert "NOWHERE_AT_ALL is not set" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_the_launchers_find_folders_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "fashion").mkdir()
    arguments = ["--dry_run", "--dataset", "fashion_mnist", "--data_dir=~/fashion", "--run_dir=~/runs/x"]
    assert submit.main(arguments) == 0
    assert f"{tmp_path}/runs/x/slurm" in capsys.readouterr().out
    assert jobs.main(["$NOWHERE_AT_ALL/runs"]) == 2
    assert "NOWHERE_AT_ALL is not set" in capsys.readouterr().err


# The lock


def test_a_removed_lock_does_not_let_a_second_run_in(tmp_path):
    folder = tmp_path / "run"
    arguments = [*LONG, "--run_dir", str(folder)]
    [first] = start_ranks(tmp_path, Train(arguments))
    first.wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size)
    (folder / "lock").unlink()
    assert "is in use by" in run_ranks(tmp_path, Train(arguments), expect=2)
    first.wait_for(lambda: read_holder(folder) is not None)  # it is taken again
    assert f"somebody has removed the lock of {folder}" in first.text
    assert read_state(folder, []).pid == first.process.pid
    assert f"in use by process {first.process.pid} on" in run_ranks(tmp_path, Train(arguments), expect=2)
    first.kill(15)
    assert first.wait() == 143
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, len(rows) + 1)]


def test_where_folders_have_no_lock_a_run_that_lost_its_file_to_another_stops(tmp_path, monkeypatch):
    """As on NFS, where only files that are open for writing can be locked."""
    flock = fcntl.flock

    def only_files(descriptor, operation):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", only_files)
    monkeypatch.setattr(lock, "_LOCK_WAIT_S", 0.1)
    first = Lock(tmp_path)
    with pytest.raises(UserError, match="is in use by process"):
        Lock(tmp_path)
    (tmp_path / "lock").unlink()
    second = Lock(tmp_path)
    for _ in range(2):  # whoever asks first may be the thread that writes checkpoints
        with pytest.raises(RunError, match=r"somebody has removed the lock of .*, and this run stops: .* is in use by process"):
            first.check()
    second.release()


@pytest.mark.parametrize("is_same_process", [False, True])
def test_a_run_whose_lock_was_lost_to_another_holder_stops(tmp_path, monkeypatch, is_same_process):
    """As on NFS, which forgets the locks of a node that was cut off: the file and what is held of it look as before."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    first = Lock(tmp_path)
    first.check()
    os.truncate(tmp_path / "lock", 0)  # as it is for a moment while another one writes
    first.check()
    if not is_same_process:
        monkeypatch.setattr(os, "getpid", lambda: 77)
    second = Lock(tmp_path)
    second.check()
    other = read_holder(tmp_path)
    second.release()
    for _ in range(2):
        with pytest.raises(RunError, match=re.escape(f"run_dir {tmp_path}: its lock was lost to {other}; this run stops")) as caught:
            first.check()
        assert find_kind(str(caught.value)) == "in use"
    with pytest.raises(RunError, match="was lost to"):
        first.find_folder()
    first.release()


def test_the_lock_of_an_older_version_is_read(tmp_path):
    (tmp_path / "lock").write_text("process 77 on there (Slurm job 5)\n")
    assert str(read_holder(tmp_path)) == "process 77 on there (Slurm job 5)"
    for token in ("", "0123456789abcdef\n"):
        (tmp_path / "lock").write_text(f"process 77 on there\n{mark_folder(tmp_path)}\n{token}")
        assert str(read_holder(tmp_path)) == "process 77 on there"
        inode, path = mark_folder(tmp_path).split(" ", 1)  # as of a folder that came back from a backup
        (tmp_path / "lock").write_text(f"process 77 on there\n{int(inode) + 1} {path}\n{token}")
        assert str(read_holder(tmp_path)) == "process 77 on there"
        (tmp_path / "lock").write_text(f"process 77 on there\n{int(inode) + 1} '/original'\n{token}")
        assert read_holder(tmp_path) is None
        assert _find_original(tmp_path) == "/original"


def test_a_file_server_that_does_not_answer_for_a_moment_costs_no_run(tmp_path, monkeypatch):
    held, stat = Lock(tmp_path), os.stat

    def be_stale(path, *given, **more):
        if str(path).startswith(str(tmp_path)):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, *given, **more)

    monkeypatch.setattr(os, "stat", be_stale)
    held.check()
    monkeypatch.undo()
    held.check()
    held.release()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])  # of NFS, and of FUSE
@pytest.mark.parametrize("another_is_there", [False, True])
def test_a_folder_that_a_file_server_says_was_removed_is_lost(tmp_path, monkeypatch, number, another_is_there):
    run, fstat = tmp_path / "run", os.fstat
    run.mkdir()
    held = Lock(run)
    folder = held._descriptors[0]
    shutil.rmtree(run)
    if another_is_there:
        run.mkdir()

    def know_nothing_of_it(descriptor):
        if descriptor == folder:
            raise OSError(number, os.strerror(number))
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", know_nothing_of_it)
    if number == errno.ENOENT and not another_is_there:  # it may have been moved, and may be moved back
        held.check()
        monkeypatch.undo()
        with pytest.raises(RunError, match="is gone"):
            held.check(at_end=True)
    else:
        reason = (
            "another folder is in the place" if number == errno.ENOENT else f"run_dir {run} is gone: somebody removed it, and the run stops"
        )
        for _ in range(2):
            with pytest.raises(RunError, match=reason):
                held.check()
    assert [*run.glob("*")] == []
    monkeypatch.undo()
    held.release()


def test_two_threads_that_find_the_lock_removed_take_it_once(tmp_path, monkeypatch, caplog):
    held, open_file = Lock(tmp_path), os.open

    def open_slowly(path, *given):
        descriptor = open_file(path, *given)
        time.sleep(0.1 if str(path).endswith("lock") else 0)
        return descriptor

    monkeypatch.setattr(os, "open", open_slowly)
    (tmp_path / "lock").unlink()
    with ThreadPoolExecutor(2) as pool:
        for check in [pool.submit(held.check) for _ in range(2)]:
            check.result()
    assert caplog.text.count("it is taken again") == 1
    held.release()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["goes", "stays", "a signal"])
def test_a_job_waits_for_a_lock_that_may_be_of_a_lost_node(tmp_path, end):
    folder = tmp_path / "run"
    arguments = [*TINY, "--steps", "2", "--timeout_s", "4" if end == "stays" else "20", "--run_dir", str(folder)]
    run_ranks(tmp_path, Train(arguments))
    (folder / "result.json").unlink()
    held = Lock(folder)
    (folder / "lock").write_text(f"process 77 on absent (Slurm job 5)\n{mark_folder(folder)}\n")
    text = run_ranks(tmp_path, Train(arguments), expect=2)
    assert "wait for it, or use another run_dir" in text
    assert "which may be a lost node's" not in text  # without Slurm somebody waits at a prompt
    ranks = start_ranks(tmp_path, Train(arguments), 2, {"SLURM_JOB_ID": "6"})
    ranks[0].wait_for(lambda: "is in use by process 77 on absent (Slurm job 5), which may be a lost node's" in ranks[0].text)
    if end == "goes":
        held.release()
    if end == "a signal":
        ranks[0].kill(signal.SIGUSR1)
    assert [rank.wait() for rank in ranks] == [int(end != "goes")] * 2, ranks[0].text
    assert ("still after 2 s" in ranks[0].text) is (end == "stays")
    assert ("and a signal came after" in ranks[0].text) is (end == "a signal")
    if end != "goes":
        held.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524, errno.EINVAL, errno.EIO, errno.EPERM])
def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "_LOCK_WAIT_S", 0.1)
    Lock(tmp_path).release()
    assert [record.getMessage() for record in caplog.records] == [
        f"the file system of {tmp_path} has no locks: make sure that no second job uses this folder"
    ]


def test_a_process_that_was_forked_from_a_run_does_not_keep_its_folder(tmp_path, monkeypatch):
    """As one of a pool that a data set keeps, which outlives a run that is killed."""
    monkeypatch.setattr(lock, "_LOCK_WAIT_S", 0.1)
    held = Lock(tmp_path)
    fork = multiprocessing.get_context("fork")
    ready, go_on = fork.Event(), fork.Event()

    def live():
        with pytest.raises(RunError, match="forked from"):
            held.find_folder()
        with open(os.devnull):  # where it may have the number of the lock's file
            held.release()
        ready.set()
        go_on.wait()

    child = fork.Process(target=live)
    child.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match="is in use by process"):  # the lock is still the parent's
            Lock(tmp_path)
        held.check()
        held.release()
        Lock(tmp_path).release()
    finally:
        go_on.set()
        child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_a_file_system_whose_locks_fail_for_a_moment_has_locks(tmp_path, monkeypatch, caplog, number):
    flock, failures = fcntl.flock, iter(range(3))

    def refuse_at_first(*given):
        if next(failures, None) is not None:
            raise OSError(number, os.strerror(number))
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", refuse_at_first)
    held = Lock(tmp_path)
    assert not caplog.records
    monkeypatch.setattr(lock, "_LOCK_WAIT_S", 0.1)
    with pytest.raises(UserError, match="is in use by process"):
        Lock(tmp_path)
    held.release()


# The record


def rows_of(*steps):
    return "".join(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in steps)


@pytest.mark.parametrize(
    ("text", "kept", "words"),
    [
        (rows_of(1, 2, 3, 4), [1, 2, 3], []),
        (rows_of(1, 2, 3) + '{"step": 4, "tra', [1, 2, 3], []),
        ("", [], ["lacks rows that the checkpoint promises, those of 3 steps from 1 to 3"]),
        (rows_of(1, 3), [1, 3], ["lacks rows that the checkpoint promises, those of step 2"]),
        (rows_of(1, 2, 2, 3), [1, 2, 3], ["line 3 is damaged or out of order and left out"]),
        (rows_of(1, 2, 1, 2, 3), [1, 2, 3], ["2 lines from 3 to 4 are damaged or out of order"]),
        (rows_of(1) + "garbage\n" + rows_of(2, 3), [1, 2, 3], ["line 2 is damaged"]),
        (rows_of(3, 2, 1), [3], ["2 lines from 2 to 3 are damaged", "those of 2 steps from 1 to 2"]),
    ],
)
def test_the_record_is_compared_with_what_the_checkpoint_promises(tmp_path, caplog, text, kept, words):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    record = Record(path)
    record.cut_back(3, [1, 2, 3])
    record.append({"step": 9})
    record.sync()
    record.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, 9]
    messages = [entry.getMessage() for entry in caplog.records]
    assert len(messages) == len(words)
    assert all(word in message for word, message in zip(words, messages, strict=True)), messages


def test_a_record_of_any_size_is_continued_while_others_read_so_many_bytes(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "config.yaml").write_text(configure().to_yaml())
    monkeypatch.setattr(record_module, "_RECORD_BYTES_MAX", 100)
    for text in (rows_of(*range(1, 12)), "garbage\n" + rows_of(*range(1, 12))):
        path.write_text(text)
        record = Record(path)
        record.cut_back(10, range(1, 11))
        record.append({"step": 11, "train/loss": 1.0})
        record.close()
        assert path.read_text() == rows_of(*range(1, 12))
    with pytest.raises(UserError, match="more than the 100 that are read"):
        read_run(tmp_path)
    path.write_bytes(rows_of(1).encode() + bytes(200))
    record = Record(path)
    with pytest.raises(OSError, match="line 2 has more than the 99 bytes that are read"):
        record.cut_back(10)
    record.close()


def test_rows_that_are_lost_between_two_starts_are_named(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:4]))
    text = resume(run_dir)
    assert f"{run_dir / 'metrics.jsonl'} lacks rows that the checkpoint promises, those of 6 steps from 5 to 10" in text


@pytest.mark.parametrize("change", ["remove", "empty", "replace", "shorten", "lengthen"])
def test_a_record_that_somebody_changes_during_the_run_is_noticed(tmp_path, caplog, change):
    path = tmp_path / "metrics.jsonl"
    record = Record(path)
    record.cut_back(0)
    for step in (1, 2, 3):
        record.append({"step": step})
    if change == "remove":
        path.unlink()
    elif change == "empty":
        os.truncate(path, 0)
    elif change == "shorten":
        os.truncate(path, 20)
    elif change == "lengthen":
        with path.open("a") as file:
            file.write("a note of mine\n")
    else:  # as an editor saves
        (tmp_path / "new").write_text("")
        os.replace(tmp_path / "new", path)
    record.append({"step": 4})
    record.append({"step": 5})
    record.sync()
    expected = {"empty": [4, 5], "shorten": [1, 4, 5]}.get(change, [1, 2, 3, 4, 5])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == expected == record.steps.tolist()
    words = {
        "remove": "has removed or replaced",
        "lengthen": "what is not the run's own is removed",
        "replace": "has removed or replaced",
        "empty": "the rows of 3 steps from 1 to 3 are lost",
        "shorten": "the rows of 2 steps from 2 to 3 are lost",
    }
    assert len(caplog.records) == 1
    assert words.get(change, "") in caplog.text


# Copies


def test_a_copy_is_not_taken_for_the_original(tmp_path, capsys, monkeypatch):
    original = tmp_path / "original"
    (original / "slurm").mkdir(parents=True)
    (original / "config.yaml").write_text(make_config({"run_dir": str(original)}).to_yaml())
    write_note(original, "job", {"job": "12", "log": "12.log"})
    held = Lock(original)
    os.pwrite(held._descriptors[-1], (original / "lock").read_bytes().replace(b"\n", b" (Slurm job 12)\n", 1), 0)
    copy = shutil.copytree(original, tmp_path / "copy")
    queue = [cluster.Job("12", "12", "RUNNING", "", "node1", 0)]
    assert read_state(original, queue).is_active
    assert read_state(original, queue).job == "12"
    assert not read_state(copy, queue).is_active
    assert read_state(copy, queue).job == ""
    monkeypatch.setattr(cluster, "read_jobs", lambda *_: queue)
    monkeypatch.setattr(cluster, "run_slurm", lambda *command: pytest.fail(f"{command} must not be called"))
    assert jobs.main(["cancel", str(copy)]) == 2
    assert "does not run" in capsys.readouterr().err
    held.release()
    moved = original.rename(tmp_path / "moved")
    assert read_state(moved, queue).job == "12"


def test_a_folders_mark_knows_moves_and_copies(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    mark = mark_folder(folder)
    assert is_marked(folder, mark)
    assert is_marked(folder, "")
    copy = shutil.copytree(folder, tmp_path / "b")
    assert not is_marked(copy, mark)
    moved = folder.rename(tmp_path / "c")
    assert is_marked(moved, mark)
    restored = shutil.copytree(moved, folder)  # a backup comes back to the old place
    assert is_marked(restored, mark)


# The terminal


def test_escape_sequences_in_names_do_not_reach_the_terminal(tmp_path, capsys):
    folder = tmp_path / "runs" / "red\x1b[31m\x07"
    (folder / "slurm").mkdir(parents=True)
    (folder / "config.yaml").write_text(configure().to_yaml())
    (folder / "starts.jsonl").write_text(json.dumps({"step": 0, "host": "node\x1b[2J"}) + "\n")
    log = folder / "slurm/1.log"
    log.write_text("fine\tso far\n\x1b]0;title\x07done\n")
    write_note(folder, "job", {"job": "1\x1b[5m", "log": str(log)})
    assert jobs.main([str(tmp_path / "runs")]) == 0
    assert jobs.main(["follow", str(folder)]) == 1
    answer = capsys.readouterr()
    assert "fine\tso far\n" in answer.out
    for word in (r"red\x1b[31m\x07", r"node\x1b[2J", r"1\x1b[5m", r"\x1b]0;title"):
        assert word in answer.out
    assert not {"\x1b", "\x07"} & {*answer.out, *answer.err}


def test_a_task_that_cannot_be_remembered_is_told_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))  # as a home that cannot be written to, for root, too
    for _ in range(2):
        note_named("/somewhere/mine.py")
        note_named("mnist")
    assert not is_named_before("/somewhere/mine.py")
    assert [record.getMessage() for record in caplog.records] == [
        f"the task /somewhere/mine.py cannot be remembered as yours, {tmp_path}/file/mnist-dist/tasks cannot be written (Not a directory): "
        "later programs need --task /somewhere/mine.py"
    ]


# The same bytes


def test_two_equal_runs_have_equal_files_of_weights(stopped, tmp_path):
    run_ranks(tmp_path, Train([*TINY, "--optimizer", "muon", "--run_dir", str(tmp_path / "run")]))
    digests = {hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in (stopped, tmp_path / "run")}
    assert len(digests) == 1


def test_the_header_of_the_weights_has_the_same_bytes_at_every_save():
    task = find_task("mnist")().with_facts({"dataset": "mnist", "mean": 0.1, "std": 0.3})
    for header, orders in (make_header(task), 1), (dict(task.facts), 2):  # several entries have another order at nearly every save
        saved = {safetensors.torch.save({"a": torch.zeros(2)}, {name: str(value) for name, value in header.items()}) for _ in range(50)}
        assert min(len(saved), 2) == orders


def test_a_config_file_of_many_keys_is_read_in_time(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{number}: 1\n" for number in range(20_000)))
    start = time.process_time()
    with pytest.raises(UserError):
        read_options_file(path)
    assert time.process_time() - start < 1
