"""The promises, of any task: the built-in one, the examples, and one with BatchNorm and dropout."""

import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cluster import ROOT
from pictures import write_classes
from processes import Programs, Train, find_free_ports, run_ranks
from test_resume import StopAt

from mnist_dist.config import parse_command_line
from mnist_dist.data import load_data
from mnist_dist.reader import read_on
from mnist_dist.record import list_newest_first
from mnist_dist.weights import load_model

STEPS, BATCH_SIZE = 5, 12
OPTIONS = [
    "--steps",
    str(STEPS),
    "--batch_size",
    str(BATCH_SIZE),
    "--evaluate_every",
    "2",
    "--log_every",
    "1",
    "--precision",
    "fp32",
    "--threads",
    "1",
]
OPTIONS += ["--optimizer", "sgd", "--momentum", "0.9", "--report", "false", "--wandb", "disabled", "--learning_rate", "0.01"]
CALM = ["--learning_rate", "0.001", "--schedule", "constant", "--momentum", "0"]  # rounding stays rounding


class Case(NamedTuple):
    """A task with the options that make it small; `tested` of its samples are for the test."""

    options: list[str]
    tested: int
    is_any_world: bool


CASES = {
    "mnist": Case(["--dataset", "synthetic", "--train_size", "60", "--test_size", "31"], 31, True),
    "forecast": Case(["--task", f"{ROOT}/examples/forecast.py", "--train_size", "60", "--test_size", "31"], 31, True),
    "image_folder": Case(
        ["--task", f"{ROOT}/examples/image_folder.py", "--arch", "mobilenet_v3_small", "--side", "32", "--data_dir", "$PICTURES"], 15, False
    ),
    "noisy": Case(["--task", f"{ROOT}/tests/noisy_task.py", "--norm", "--dropout", "0.3"], 31, False),
}
ANY_WORLD = [name for name, case in CASES.items() if case.is_any_world]
THIS_WORLD = [name for name, case in CASES.items() if not case.is_any_world]
SLOW = ("image_folder",)  # a step of this network takes as long as all of the others'


def list_cases(names):
    """The cases as a test takes them, the slow ones marked."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@dataclass(frozen=True)
class Story:
    """A rank that trains a task unbroken, stopped in the course of each step, and with its newest checkpoint damaged, in a folder each."""

    folder: Path
    options: list[str]
    stops: tuple[int, ...]  # of each run that is stopped once
    rounds: int  # batches of an evaluation, between which a stop is asked for as well
    evaluate_every: int = 2
    with_damage: bool = False
    ports: list[int] = field(default_factory=list)  # a start of several ranks joins at a port of its own

    def __call__(self):
        ports = iter(self.ports)

        def train(name, *stops):
            from mnist_dist import loop

            for step in stops:
                if self.ports:
                    os.environ["MASTER_PORT"] = str(next(ports))
                asked = step + (self.rounds - 1) * (step // self.evaluate_every)
                loop.train(parse_command_line([*self.options, "--run_dir", str(self.folder / name)]), StopAt(asked))

        train("unbroken", 99)
        for step in self.stops:
            train(f"stopped {step}", step, 99)
        if self.with_damage:
            train("damaged", 2, 2)
            newest, _ = list_newest_first(self.folder / "damaged/checkpoints")
            newest.write_bytes(newest.read_bytes()[:-1] + b"x")
            train("damaged", 99)
            train("interrupted", 2)


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    """Where the pictures are, and where it is noted which tasks a user has named."""
    folder = tmp_path_factory.mktemp("environ")
    return {"PICTURES": str(write_classes(folder / "pictures")), "XDG_STATE_HOME": str(folder)}


@pytest.fixture(scope="module", params=list_cases(CASES))
def story(request, tmp_path_factory, environ):
    """What `Story` made of a task in one process: the case, the folder, and what was printed."""
    folder = tmp_path_factory.mktemp(request.param)
    case = CASES[request.param]
    rounds = math.ceil(case.tested / (2 * BATCH_SIZE))
    text = run_ranks(folder, Story(folder, [*case.options, *OPTIONS], tuple(range(1, STEPS)), rounds, with_damage=True), environ=environ)
    return case, folder, text


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_rows(folder):
    kept = "train/loss", "train/gradient_norm", "step", "test/"
    return [{name: row[name] for name in row if name.startswith(kept)} for row in read_lines(folder / "metrics.jsonl")]


def assert_same_bits(folder, expected):
    assert (folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert read_rows(folder) == read_rows(expected)


def test_stopped_at_every_step_and_resumed_it_has_the_bits_of_the_unbroken_run(story):
    _, folder, _ = story
    for step in range(1, STEPS):
        assert [start["step"] for start in read_lines(folder / f"stopped {step}/starts.jsonl")] == [0, step]  # no step is done twice
        assert_same_bits(folder / f"stopped {step}", folder / "unbroken")
    assert len(read_rows(folder / "unbroken")) == STEPS


def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_nothing_else_is_lost(story):
    _, folder, text = story
    assert text.count("skipped checkpoint") == 1
    assert [start["step"] for start in read_lines(folder / "damaged/starts.jsonl")] == [0, 2, 2]
    assert_same_bits(folder / "damaged", folder / "unbroken")


def test_the_record_names_the_tier(story):
    case, folder, _ = story
    assert read_lines(folder / "unbroken/starts.jsonl")[0]["tier"] == ("any world" if case.is_any_world else "this world")


def test_an_evaluation_counts_every_sample_once_on_any_number_of_processes(story, tmp_path, environ, monkeypatch):
    case, folder, _ = story
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    # By hand: the whole split at once, and no sharing of it.
    model, config = load_model(folder / "unbroken")
    found, data = load_data(config)
    [batch] = read_on(data.test, found.replace(batch_size=case.tested), torch.device("cpu"))
    with torch.no_grad():
        sums = config.task.tally(model, batch).sums
    assert sums[0] == case.tested
    expected = {f"test/{name}": value for name, value in config.task.measure(sums).items()}
    for world in (1, 2, 3):
        line = ["evaluate", str(folder / "unbroken"), "--precision", "fp32", "--threads", "1", "--json"]
        text = run_ranks(tmp_path, Programs([line]), world, environ)
        evaluated = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
        assert evaluated["world_size"] == world
        for name, value in expected.items():
            assert evaluated[name] == (value if name == "test/confusion_matrix" else pytest.approx(value, rel=1e-5)), (world, name)


def test_resumed_on_another_number_of_processes_it_goes_on_or_is_refused(story, tmp_path, environ):
    case, folder, _ = story
    run = shutil.copytree(folder / "interrupted", tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    arguments = [*case.options, *OPTIONS, "--run_dir", str(run)]
    text = run_ranks(tmp_path, Train(arguments), 2, environ, expect=0 if case.is_any_world else 2)
    if case.is_any_world:
        assert "from step 2" in text
        for row, expected in zip(read_rows(run), read_rows(folder / "unbroken"), strict=True):
            assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-3)
    else:
        assert "made with 1 process, and this start has 2 processes" in text
        assert "start as many, or use another run_dir" in text
        assert "Traceback" not in text
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"} == before


@pytest.mark.parametrize("name", [pytest.param("forecast", marks=pytest.mark.slow), "noisy"])
def test_on_two_processes_a_resumed_run_has_the_bits_of_the_unbroken_one(tmp_path, environ, name):
    # A stop is agreed upon in one step and heeded after the next.
    run_ranks(tmp_path, Story(tmp_path, [*CASES[name].options, *OPTIONS], (1, 2, 3), 1, ports=find_free_ports(7)), 2, environ)
    for step in (1, 2, 3):
        assert [start["step"] for start in read_lines(tmp_path / f"stopped {step}/starts.jsonl")] == [0, step + 1]
        assert_same_bits(tmp_path / f"stopped {step}", tmp_path / "unbroken")


def train_on_worlds(tmp_path, environ, name, worlds, *options):
    """The losses of each world. `options` make a folder of their own."""
    folders = [tmp_path / " ".join([str(world), *options]) for world in worlds]
    for world, folder in zip(worlds, folders, strict=True):
        run_ranks(tmp_path, Train([*CASES[name].options, *OPTIONS, *CALM, *options, "--run_dir", str(folder)]), world, environ)
    return [[row["train/loss"] for row in read_rows(folder)] for folder in folders]


@pytest.mark.parametrize("name", list_cases(ANY_WORLD))
def test_the_losses_are_the_same_on_any_number_of_processes(tmp_path, environ, name):
    one, *others = train_on_worlds(tmp_path, environ, name, (1, 2, 4))
    assert len(one) == STEPS
    for losses in others:
        assert losses == pytest.approx(one, rel=1e-5)


def test_the_tolerance_would_see_that_a_step_depends_on_the_number_of_processes(tmp_path, environ):
    one, two = train_on_worlds(tmp_path, environ, "noisy", (1, 2))
    assert one != pytest.approx(two, rel=1e-3)


def test_neither_micro_batches_nor_clipping_depend_on_the_number_of_processes(tmp_path, environ):
    clip = ["--clip_norm", "0.1"]
    whole, *cut = train_on_worlds(tmp_path, environ, "forecast", (1,), *clip)
    cut += train_on_worlds(tmp_path, environ, "forecast", (1, 2), *clip, "--micro_batch", "5")  # twelve samples, or six, by five
    for losses in cut:
        assert losses == pytest.approx(whole, rel=1e-5)
    [unclipped] = train_on_worlds(tmp_path, environ, "forecast", (1,))
    assert unclipped != pytest.approx(whole, rel=1e-5)
