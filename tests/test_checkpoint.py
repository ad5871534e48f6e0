"""Checkpoints are whole or absent: killed at every stage of a save, damaged in every way."""

import errno
import io
import os
import pickle
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from processes import TINY, Train, run_ranks

from mnist_dist import checkpoint, files, record
from mnist_dist.errors import RunError, UserError

ROOM = 1 << 20  # more than the weights below have bytes
STATE = {"step": 1, "recipe": {"seed": 1}, "model": {"weight": torch.arange(1000.0)}}


def content_of(step):
    return bytes(checkpoint.encode({**STATE, "step": step}))


def newest_step(folder):
    saved = checkpoint.read_newest(folder, ROOM)
    return None if saved is None else checkpoint.decode(saved.content)["step"]


def test_a_checkpoint_comes_back_and_only_the_newest_are_kept(tmp_path):
    assert newest_step(tmp_path) is None
    for step in (1, 20, 300, 4000):
        path = checkpoint.write(tmp_path, step, content_of(step), keep=2)
    assert path.name.startswith("step_00004000-")
    assert [name.name[:13] for name in checkpoint.list_newest_first(tmp_path)] == ["step_00004000", "step_00000300"]
    assert newest_step(tmp_path) == 4000
    # It is an ordinary torch file for anybody else.
    assert torch.equal(torch.load(path, weights_only=True)["model"]["weight"], STATE["model"]["weight"])


def test_a_checkpoint_may_be_as_large_as_its_optimizer_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_ROOM_BYTES", 10_000)
    weight = torch.arange(100_000.0)
    slots = {"exp_avg": weight.clone(), "exp_avg_sq": weight.clone(), "third": weight.clone()}
    path = checkpoint.write(
        tmp_path, 1, checkpoint.encode({**STATE, "model": {"weight": weight}, "optimizer": {"state": {0: slots}}}), keep=2
    )
    assert path.stat().st_size > 3.9 * weight.nbytes
    assert checkpoint.read_newest(tmp_path, weight.nbytes).path == path
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.read_newest(tmp_path, weight.nbytes // 2)  # of a model that is half as large


@dataclass(frozen=True)
class KillDuringSave:
    """A writer that is killed at the nth thing it asks of the disk; `half` kills it in the middle of the write instead."""

    folder: str
    at: int
    half: bool = False

    def __call__(self):
        folder = Path(self.folder)
        for step in (1, 2, 3):
            checkpoint.write(folder, step, content_of(step), keep=2)
        calls = 0

        def count(function):
            def counted(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return counted

        def open_half(descriptor, mode):
            file = open(descriptor, mode)  # noqa: SIM115
            if self.half:
                file.write(content_of(4)[:1000])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return file

        files.open, Path.unlink = open_half, count(Path.unlink)
        os.fsync, os.replace, os.open = count(os.fsync), count(os.replace), count(os.open)
        checkpoint.write(folder, 4, content_of(4), keep=2)
        return calls


def remove_temporary_files(checkpoints):
    (checkpoints.parent / "run").mkdir(exist_ok=True)
    link = checkpoints.parent / "run/checkpoints"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoints)
    record.remove_temporary_files(link.parent)


def test_a_writer_killed_at_any_stage_leaves_a_valid_checkpoint(tmp_path):
    (tmp_path / "whole").mkdir()
    run_ranks(tmp_path, KillDuringSave(str(tmp_path / "whole"), at=0), expect=6)  # open, fsync, replace, open, fsync, unlink
    for at in range(1, 7):
        folder = tmp_path / str(at)
        folder.mkdir()
        run_ranks(tmp_path, KillDuringSave(str(folder), at), expect=-signal.SIGKILL)
        assert newest_step(folder) == (3 if at <= 3 else 4)
        remove_temporary_files(folder)
        assert len(list(folder.iterdir())) == (2 if at <= 3 else 3)
        # The next save tidies up what the killed one could not.
        checkpoint.write(folder, 5, content_of(5), keep=2)
        assert newest_step(folder) == 5
        assert len(list(folder.iterdir())) == 2
    half = tmp_path / "half"
    half.mkdir()
    run_ranks(tmp_path, KillDuringSave(str(half), 0, half=True), expect=-signal.SIGKILL)
    assert newest_step(half) == 3
    assert [path.suffix for path in half.iterdir()].count(".tmp") == 1
    remove_temporary_files(half)
    assert len(list(half.iterdir())) == 2


def damages(content):
    chance = random.Random(0)
    for length in [0, 1, 2, 100, *range(200, len(content), 450), len(content) - 1]:
        yield f"truncated to {length}", content[:length]
    for position in [0, 1, len(content) - 1, *(chance.randrange(len(content)) for _ in range(50))]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << chance.randrange(8)
        yield f"bit flipped at {position}", bytes(flipped)
    yield "longer", content + b"\0"
    yield "zeros", bytes(len(content))
    yield "garbage", chance.randbytes(len(content))
    yield "text", b"not a checkpoint\n"


def test_any_damage_to_the_newest_is_seen_and_the_one_before_is_used(tmp_path, caplog):
    checkpoint.write(tmp_path, 1, content_of(1), keep=9)
    good = content_of(2)
    newest = checkpoint.write(tmp_path, 2, good, keep=9)
    for what, content in damages(good):
        newest.write_bytes(content)
        caplog.clear()
        assert newest_step(tmp_path) == 1, what
        assert str(newest) in caplog.text
        assert "damaged" in caplog.text
    newest.write_bytes(good)
    assert newest_step(tmp_path) == 2


def test_no_whole_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        checkpoint.write(tmp_path, step, content_of(step), keep=9).write_bytes(b"")
    with pytest.raises(RunError, match=r"none of the 2 checkpoints .* is valid"):
        checkpoint.read_newest(tmp_path, ROOM)


def test_of_two_checkpoints_of_a_step_the_later_stays(tmp_path):
    checkpoint.write(tmp_path, 2, content_of(2), keep=2)
    checkpoint.write(tmp_path, 4, content_of(4), keep=2)
    later = checkpoint.write(tmp_path, 4, content_of(5), keep=2)
    assert [path.name[5:13] for path in checkpoint.list_newest_first(tmp_path)] == ["00000004", "00000002"]
    assert later.exists()


def test_damaged_checkpoints_of_later_steps_do_not_take_the_place_of_whole_ones(tmp_path):
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, content_of(step), keep=9)
    for step in (8, 9):
        checkpoint.write(tmp_path, step, content_of(step), keep=9).write_bytes(b"")
    checkpoint.write(tmp_path, 4, content_of(4), keep=2)
    assert [int(path.name[5:13]) for path in checkpoint.list_newest_first(tmp_path)] == [9, 8, 4, 3]
    for step in (8, 9, 10):
        checkpoint.write(tmp_path, step, content_of(step), keep=2)
    assert [int(path.name[5:13]) for path in checkpoint.list_newest_first(tmp_path)] == [10, 9]


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(tmp_path):
    whole = checkpoint.write(tmp_path, 1, content_of(1), keep=9)
    unreadable = tmp_path / whole.name.replace("step_00000001", "step_00000002")
    unreadable.mkdir()
    with pytest.raises(RunError, match=r"step_00000002-\w+.pt cannot be read \(it is a folder\)"):
        checkpoint.read_newest(tmp_path, ROOM)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/should-not-exist",))


def test_a_file_that_holds_code_is_refused_even_with_the_right_checksum(tmp_path):
    buffer = io.BytesIO()
    torch.save({"format": 1, "evil": Evil()}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Evil()), b"", b"PK\x03\x04"):
        with pytest.raises(RunError, match="not a checkpoint of this program"):
            checkpoint.decode(content)


def test_a_newer_format_is_refused():
    buffer = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT + 1}, buffer)
    with pytest.raises(UserError, match=f"format {checkpoint.FORMAT + 1}, "):
        checkpoint.decode(buffer.getvalue())


def test_every_load_in_the_package_is_weights_only():
    package = Path(checkpoint.__file__).parent
    for path in package.rglob("*.py"):
        for line in path.read_text().splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, path
            assert "pickle.load" not in line, path


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(tmp_path):
    folder = tmp_path / "run"
    arguments = [*TINY, "--run_dir", str(folder), "--checkpoint_every", "8"]
    run_ranks(tmp_path, Train(arguments))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "result.json").unlink()
    newest = checkpoint.list_newest_first(folder / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    text = run_ranks(tmp_path, Train(arguments), world=2)
    assert f"skipped checkpoint {newest}" in text
    assert "from step 8 of 10" in text
    run_ranks(tmp_path, Train(arguments))  # finished: a no-op
    (folder / "result.json").unlink()
    for path in checkpoint.list_newest_first(folder / "checkpoints"):
        path.write_bytes(b"")
    rows = (folder / "metrics.jsonl").read_bytes()
    text = run_ranks(tmp_path, Train(arguments), world=2, expect=1)
    assert text.count("is valid: restore one of them") == 2
    assert (folder / "metrics.jsonl").read_bytes() == rows
    assert whole


def edit_newest(folder, edit):
    path = checkpoint.list_newest_first(folder / "checkpoints")[0]
    state = checkpoint.decode(path.read_bytes())
    edit(state)
    path.unlink()
    checkpoint.write(folder / "checkpoints", state["step"], checkpoint.encode(state), keep=9)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda state: state["recipe"].update(learning_rate=0.5), "learning_rate: 0.5 there, 0.01 asked for"),
        (lambda state: state["recipe"].update(lookahead=5), "lookahead: 5 there, not asked for"),
        (lambda state: state["model"].update({"linear2.bias": torch.zeros(11)}), "linear2.bias: [11] there, [10] asked for"),
        (lambda state: state["model"].pop("conv1.weight"), "conv1.weight: not there, ["),
        (lambda state: state.update(data="0123"), "it was trained on other data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_keys_that_differ(tmp_path, edit, words):
    folder = tmp_path / "run"
    run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder)]))
    (folder / "result.json").unlink()
    edit_newest(folder, edit)
    rows = (folder / "metrics.jsonl").read_bytes()
    text = run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder)]), expect=2)
    assert words in text
    assert "Traceback" not in text
    assert (folder / "metrics.jsonl").read_bytes() == rows


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_what_could_not_be_read_again_is_not_written(tmp_path, caplog, what):
    """A checkpoint whose numbers are not finite counts as damaged when it is read."""
    model, slots = {"weight": torch.ones(3)}, {"exp_avg_sq": torch.ones(3)}
    state = {**STATE, "model": model, "optimizer": {"state": {0: slots}, "param_groups": [{"lr": 0.1}]}}
    writer = checkpoint.Writer(tmp_path, keep=2, sync_record=lambda: None)
    writer.submit(1, state)
    writer.close()
    assert len(checkpoint.list_newest_first(tmp_path)) == 1
    {"model": model["weight"], "optimizer": slots["exp_avg_sq"]}[what][1] = torch.inf
    writer = checkpoint.Writer(tmp_path, keep=2, sync_record=lambda: None)
    writer.submit(2, state)
    name = {"model": "weight", "optimizer": "exp_avg_sq of parameter 0"}[what]
    with pytest.raises(RunError, match=rf"are not finite after step 3 \({name}\)"):
        writer.finish(3, state)
    assert f"no checkpoint at step 2: its weights, or the optimizer's state, are not finite ({name})" in caplog.text
    assert len(checkpoint.list_newest_first(tmp_path)) == 1


def test_a_checkpoint_that_cannot_be_written_is_told_at_once(tmp_path, caplog, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", fail)
    writer = checkpoint.Writer(tmp_path, keep=2, sync_record=lambda: None)
    writer.submit(7, STATE)
    writer._thread.shutdown(wait=True)  # and nothing is asked of it after that
    assert "a checkpoint could not be written, training goes on without it: No space left on device (step 7)" in caplog.text


def test_a_checkpoint_that_fails_in_another_way_than_the_disk_is_raised_once(tmp_path, monkeypatch):
    def fail(_):
        raise MemoryError("no room to encode it")

    writer = checkpoint.Writer(tmp_path, keep=2, sync_record=lambda: None)
    monkeypatch.setattr(checkpoint, "encode", fail)
    writer.submit(1, STATE)
    with pytest.raises(MemoryError):
        writer.submit(2, STATE)
    writer.submit(3, STATE)
    with pytest.raises(MemoryError):
        writer.close()
    writer.close()


def test_lines_of_two_processes_are_all_kept_and_a_torn_one_goes(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    assert files.append_line(path, b"a") == 1
    monkeypatch.setattr(files, "read_file", lambda *_: b"a\n")
    assert files.append_line(path, b"b") == 2
    assert files.append_line(path, b"c") == 2  # read before the line of the other was there
    monkeypatch.undo()
    assert path.read_bytes() == b"a\nb\nc\n"
    path.write_bytes(b"a\nto")
    assert files.append_line(path, b"d") == 2
    assert path.read_bytes() == b"a\nd\n"
