"""Nothing is lost: stopped anywhere, by anything, a run ends as if it had never been stopped."""

import contextlib
import fcntl
import json
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from processes import TINY, StopAt, Train, find_free_ports, run_ranks, start_ranks
from safetensors.torch import load_file

from mnist_dist import checkpoint, run_folder
from mnist_dist.config import configure, parse_command_line
from mnist_dist.errors import NotFiniteError
from mnist_dist.loop import train as train_config
from mnist_dist.meter import Meter
from mnist_dist.preemption import Stop
from mnist_dist.record import read_run
from mnist_dist.run_folder import RunFolder
from mnist_dist.train import main

CALM = ["--learning_rate", "0.001", "--schedule", "constant", "--momentum", "0"]  # rounding stays rounding
RARE = ["--log_every", "1000", "--evaluate_every", "1000", "--checkpoint_every", "1000"]


def read_rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "train/images_per_s" and not name.startswith("health/")} for row in rows]


def read_weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_run(folder, expected, exactly):
    assert read_result(folder)["test/images"] == read_result(expected)["test/images"]
    rows, expected_rows = read_rows(folder), read_rows(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    if exactly:
        assert rows == expected_rows
        assert read_result(folder)["test/confusion_matrix"] == read_result(expected)["test/confusion_matrix"]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row.pop("test/class_accuracy", None) == expected_row.pop("test/class_accuracy", None)
        assert row.pop("train/gradient_norm") == pytest.approx(
            expected_row.pop("train/gradient_norm"), rel=0.05
        )  # jumps where a ReLU flips
        assert row == pytest.approx(expected_row, rel=1e-4)
    weights = read_weights(expected)
    for name, value in read_weights(folder).items():
        assert torch.equal(value, weights[name]) if exactly else float((value - weights[name]).abs().max()) < 1e-4, name


def read_result(folder):
    return json.loads((folder / "result.json").read_text())


@dataclass(frozen=True)
class TrainUntil:
    """One rank that trains until it is stopped in the course of a given step of this start, then goes on in further starts."""

    arguments: list[str]
    stops: list[int] = field(default_factory=list)

    def __call__(self):
        from mnist_dist.loop import train

        for step in self.stops:
            result = train(parse_command_line(self.arguments), StopAt(step))
            assert (result.stop, result.step) != (Stop.NONE, 10) or step >= 10
        return train(parse_command_line(self.arguments)).stop.exit_code


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The tiny run, never stopped, in worlds of one and two."""
    folder = tmp_path_factory.mktemp("unbroken")
    for world in (1, 2):
        run_ranks(folder, Train([*TINY, *CALM, "--run_dir", str(folder / str(world))]), world)
    return folder


@dataclass(frozen=True)
class StopAtEveryStep:
    """A process that stops and resumes at each step of the run, in a folder for each."""

    folder: str
    recipe: list[str]

    def __call__(self):
        for step in range(1, 10):
            TrainUntil([*self.recipe, "--run_dir", f"{self.folder}/{step}"], [step])()


# The optimizers without a state of their own (no momentum), and with the most.
@pytest.mark.slow
@pytest.mark.parametrize("recipe", [[*TINY, *CALM], [*TINY, "--optimizer", "muon"]], ids=["sgd", "muon"])
def test_stopped_at_every_step_and_resumed_gives_the_same_bits(tmp_path, recipe):
    recipe = [*recipe, "--test_size", "12"]  # of one batch, amid which no stop is heeded
    run_ranks(tmp_path, Train([*recipe, "--run_dir", str(tmp_path / "unbroken")]))
    run_ranks(tmp_path, StopAtEveryStep(str(tmp_path), recipe))
    for step in range(1, 10):
        starts = [json.loads(line)["step"] for line in (tmp_path / str(step) / "starts.jsonl").read_text().splitlines()]
        assert starts == [0, step]  # no step is done twice
        assert_same_run(tmp_path / str(step), tmp_path / "unbroken", exactly=True)


@pytest.mark.slow
def test_stopped_after_every_step_in_turn_and_on_two_ranks(tmp_path, unbroken):
    folder = tmp_path / "run"
    run_ranks(tmp_path, TrainUntil([*TINY, *CALM, "--run_dir", str(folder)], [1] * 9), 1)
    assert_same_run(folder, unbroken / "1", exactly=True)
    for step in (1, 8):
        folder = tmp_path / f"two {step}"
        arguments = [*TINY, *CALM, "--run_dir", str(folder)]
        run_ranks(tmp_path, TrainOnce(arguments, step), 2, expect=85)
        run_ranks(tmp_path, Train(arguments), 2)
        assert_same_run(folder, unbroken / "2", exactly=True)


@dataclass(frozen=True)
class StopInTurn:
    """A process that makes a run for each name, in whose starts stops come as listed: the how many-th time that one is asked for."""

    folder: str
    recipe: list[str]
    stops: dict[str, list[int]]

    def __call__(self):
        for name, stops in self.stops.items():
            TrainUntil([*self.recipe, "--run_dir", f"{self.folder}/{name}"], stops)()


# After a step; amid and at the end of the first evaluation, and at the beginning of the second. All places are a slow test.
@pytest.mark.parametrize("places", [(1, 5, 9, 11), pytest.param(range(1, 18), marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_stop_amid_an_evaluation_is_heeded_and_the_next_start_evaluates(tmp_path, places):
    # A stop is asked for after each step but the last, and between the eight batches of each of the two evaluations.
    steps = [1, *[2] * 8, 3, *[4] * 7]
    stops = {str(asked): [asked] for asked in places}
    recipe = [*TINY, *CALM, "--steps", "4", "--evaluate_every", "2", "--micro_batch", "4"]
    run_ranks(tmp_path, Train([*recipe, "--run_dir", str(tmp_path / "unbroken")]))
    text = run_ranks(tmp_path, StopInTurn(str(tmp_path), recipe, stops | {"again": [4, 1, 6, 12, 5]}))
    for name, expected in [*((str(asked), [0, steps[asked - 1]]) for asked in places), ("again", [0, 2, 2, 2, 4, 4])]:
        starts = [json.loads(line)["step"] for line in (tmp_path / name / "starts.jsonl").read_text().splitlines()]
        assert starts == expected  # no step is done twice
        assert_same_run(tmp_path / name, tmp_path / "unbroken", exactly=True)
    assert (
        text.count("of 4, amid an evaluation, which the next start repeats; saved") == sum(asked not in (1, 9, 10) for asked in places) + 5
    )


NOISY = ["--task", str(Path(__file__).with_name("noisy_task.py")), "--batch_size", "12", "--steps", "12", "--evaluate_every", "4", "--norm"]
NOISY += ["--optimizer", "sgd", "--precision", "fp32", "--threads", "1", "--report", "false", "--wandb", "disabled"]


def run_twice(folder, recipe, faulty, world, words, status=1):
    """A run that fails and is started again, without the fault, has lost no step; the steps at which it was started."""
    for name, more in (("unbroken", ()), ("run", faulty), ("run", ())):
        arguments = [*recipe, "--checkpoint_every", "1000", *more, "--run_dir", str(folder / name)]
        text = run_ranks(folder, Train(arguments), world, {"LAST": str(world - 1)}, expect=status if more else 0)
        assert all((word in text) is (more == faulty) for word in (*words, "the steps before the failure"))
    assert read_rows(folder / "run") == read_rows(folder / "unbroken")
    assert all(torch.equal(value, read_weights(folder / "unbroken")[name]) for name, value in read_weights(folder / "run").items())
    return [json.loads(line)["step"] for line in (folder / "run/starts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world", [1, 2])
def test_what_was_trained_before_an_evaluation_that_fails_is_saved(tmp_path, world):
    assert run_twice(tmp_path, NOISY, ["--fault", "in tally", "--fault_at", "8"], world, ["these weights are odd"]) == [0, 8]


@pytest.mark.parametrize(("fault", "workers"), [("raises", 0), ("raises", 2), ("dies", 2)])
def test_what_was_trained_before_a_sample_that_cannot_be_read_is_saved(tmp_path, fault, workers):
    faulty = ["--workers", str(workers), "--fault", fault, "--fault_at", "37"]
    first, second = run_twice(tmp_path, NOISY, faulty, 1, ["sample 37"])
    assert first == 0 < second


@pytest.mark.parametrize("more", [(), ("--shards", "4"), ("--shards", "4", "--norm")], ids=["plain", "shards", "statistics in shards"])
def test_what_was_trained_before_losses_fail_is_saved(tmp_path, more):
    """Amid a step, before the optimizer has changed anything."""
    plain = [name for name in NOISY if name != "--norm"]
    kept = run_twice(tmp_path, [*plain, *more], ["--fault", "in losses", "--fault_at", "7"], 1, ["these samples are odd"])
    assert kept == [0, 7]


def test_a_step_that_has_moved_statistics_and_fails_is_not_saved(tmp_path):
    arguments = [*NOISY, "--checkpoint_every", "5", "--run_dir", str(tmp_path / "run")]
    text = run_ranks(tmp_path, Train([*arguments, "--fault", "in losses", "--fault_at", "7"]), expect=1)
    assert "the steps before the failure" not in text
    run_ranks(tmp_path, Train([*NOISY, "--run_dir", str(tmp_path / "unbroken")]))
    run_ranks(tmp_path, Train(arguments))
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "unbroken")


def test_what_was_trained_before_a_rank_is_killed_is_saved(tmp_path):
    plain = [name for name in NOISY if name != "--norm"]
    steps = run_twice(tmp_path, plain, ["--fault", "killed in losses", "--fault_at", "7"], 2, ["is gone"], status=None)
    assert steps == [0, 7]
    assert json.loads((tmp_path / "run/ends.jsonl").read_text().splitlines()[0])["saved"] == 7
    for path in (tmp_path / "run/checkpoints").iterdir():
        path.unlink()
    (tmp_path / "run/result.json").unlink()
    (tmp_path / "run/starts.jsonl").write_text("")
    text = run_ranks(tmp_path, Train([*plain, "--checkpoint_every", "1000", "--run_dir", str(tmp_path / "run")]), 2, expect=2)
    assert "has no checkpoint any more" in text


@dataclass(frozen=True)
class LoseARankAtAStop(Train):
    """Two ranks that stop after three steps, of which the second is killed where it enters a function of the stop."""

    place: str

    def __call__(self):
        from mnist_dist.loop import train
        from mnist_dist.program import run_program

        if os.environ["RANK"] == "1":
            kind, name = {"check": (Meter, "check"), "save_last": (RunFolder, "save_last")}[self.place]
            setattr(kind, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return run_program(lambda: train(parse_command_line(self.arguments), StopAt(2)).stop.exit_code)


@pytest.mark.parametrize(("place", "status"), [("check", 1), pytest.param("save_last", 85, marks=pytest.mark.slow)])
def test_a_rank_that_is_lost_amid_a_stop_costs_no_step(tmp_path, place, status):
    arguments = [*TINY, *RARE, "--run_dir", str(tmp_path / "run")]
    main, other = start_ranks(tmp_path, LoseARankAtAStop(arguments, place), 2)
    assert (main.wait(60), other.wait(60)) == (status, -signal.SIGKILL), main.text
    assert "rank 1 on host" in main.text
    [end] = [json.loads(line) for line in (tmp_path / "run/ends.jsonl").read_text().splitlines()]
    assert (end["saved"], end["status"]) == (3, status)
    assert [checkpoint.find_step(path) for path in checkpoint.list_newest_first(tmp_path / "run/checkpoints")] == [3]


def test_a_loss_that_is_not_finite_and_is_found_at_a_stop_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(Meter, "add", lambda meter, loss: meter._losses.append(loss * float("nan")))
    with pytest.raises(NotFiniteError, match="the loss is nan at step 1"):
        train_config(parse_command_line([*TINY, *RARE, "--run_dir", str(tmp_path / "run")]), StopAt(3))
    assert not list((tmp_path / "run/checkpoints").iterdir())


@dataclass(frozen=True)
class DieAfter(TrainUntil):
    """A start that is killed after a step, whose row is in the record."""

    step: int = 0

    def __call__(self):
        from mnist_dist.loop import train

        def die(batches, state):
            for batch in batches:
                if state.step == self.step:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        return train(parse_command_line(self.arguments), turns=die).stop.exit_code


@pytest.mark.slow
def test_a_start_that_is_killed_after_it_finished_an_evaluation_is_no_obstacle(tmp_path):
    recipe = [*TINY, *CALM, "--steps", "4", "--evaluate_every", "2", "--micro_batch", "4"]
    run_ranks(tmp_path, Train([*recipe, "--run_dir", str(tmp_path / "unbroken")]))
    arguments = [*recipe, "--run_dir", str(tmp_path / "run")]
    run_ranks(tmp_path, TrainOnce(arguments, 4), expect=85)
    run_ranks(tmp_path, DieAfter(arguments, step=3), expect=-signal.SIGKILL)
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [1, 2, 3]
    run_ranks(tmp_path, Train(arguments))
    assert_same_run(tmp_path / "run", tmp_path / "unbroken", exactly=True)


@dataclass(frozen=True)
class StopAndResume:
    """A rank that trains each recipe unbroken, and stopped after each of its six steps in one of two further runs."""

    folder: str
    world: int
    ports: list[int]  # a start joins at a port of its own

    def __call__(self):
        from mnist_dist.loop import train

        ports = iter(self.ports)

        # With more ranks than one, a stop is agreed upon in one step and heeded after the next.
        runs = {"unbroken": [], "even": [1, 1], "odd": [2, 1]} if self.world > 1 else {"unbroken": [], "even": [2, 2], "odd": [1, 2, 2]}
        for name, recipe in RECIPES.items():
            for kind, stops in runs.items():
                for step in [*stops, 99]:
                    os.environ["MASTER_PORT"] = str(next(ports))
                    train(parse_command_line([*TINY, *recipe, "--steps", "6", "--run_dir", f"{self.folder}/{name} {kind}"]), StopAt(step))


RECIPES = {
    f"{optimizer} {precision}": ["--optimizer", optimizer, "--precision", precision]
    for optimizer in ("sgd", "muon")
    for precision in ("fp32", "bf16")
}


@pytest.mark.slow  # test_promises.py has shorter ones
@pytest.mark.parametrize("world", [1, 2, 3])
def test_on_any_number_of_ranks_a_resumed_run_has_the_bits_of_the_unbroken_one(tmp_path, world):
    run_ranks(tmp_path, StopAndResume(str(tmp_path), world, find_free_ports(40)), world)
    for name in RECIPES:
        expected = (tmp_path / f"{name} unbroken/model.safetensors").read_bytes()
        steps = set()
        for kind in ("even", "odd"):
            folder = tmp_path / f"{name} {kind}"
            steps |= {json.loads(line)["step"] for line in (folder / "starts.jsonl").read_text().splitlines()}
            assert (folder / "model.safetensors").read_bytes() == expected, folder
        assert steps == ({0, 1, 2, 3, 4, 5} if world == 1 else {0, 2, 3, 4, 5})


@dataclass(frozen=True)
class TrainOnce(TrainUntil):
    """One start that is stopped in the course of a step."""

    step: int = 0

    def __init__(self, arguments, step):
        object.__setattr__(self, "arguments", arguments)
        object.__setattr__(self, "step", step)

    def __call__(self):
        from mnist_dist.loop import train

        return train(parse_command_line(self.arguments), StopAt(self.step)).stop.exit_code


def test_resumed_on_other_worlds_the_run_is_the_same_up_to_rounding(tmp_path, unbroken):
    folder = tmp_path / "run"
    arguments = [*TINY, *CALM, "--run_dir", str(folder)]
    run_ranks(tmp_path, TrainOnce(arguments, 2), 2, expect=85)
    run_ranks(tmp_path, TrainOnce(arguments, 4), 1, expect=85)
    run_ranks(tmp_path, Train(arguments), 4)
    assert [json.loads(line)["world_size"] for line in (folder / "starts.jsonl").read_text().splitlines()] == [2, 1, 4]
    assert_same_run(folder, unbroken / "1", exactly=False)


@pytest.mark.slow
def test_the_tolerance_would_see_a_step_that_is_lost(tmp_path, unbroken):
    folder = tmp_path / "run"
    arguments = [*TINY, *CALM, "--run_dir", str(folder)]
    run_ranks(tmp_path, TrainOnce(arguments, 4), 1, expect=85)
    path = checkpoint.list_newest_first(folder / "checkpoints")[0]
    state = checkpoint.decode(path.read_bytes())
    path.unlink()
    checkpoint.write(path.parent, 5, checkpoint.encode({**state, "step": 5}), keep=1)  # the planted fault
    run_ranks(tmp_path, Train(arguments))
    with pytest.raises(AssertionError):
        assert_same_run(folder, unbroken / "1", exactly=False)


def test_a_killed_run_repeats_no_more_than_to_its_last_checkpoint(tmp_path, unbroken):
    folder = tmp_path / "run"
    arguments = [*TINY, *CALM, "--run_dir", str(folder), "--checkpoint_every", "6"]
    ranks = start_ranks(tmp_path, Train(arguments), 2)
    ranks[0].wait_for(lambda: any((folder / "checkpoints").glob("step_00000006-*.pt")))
    for rank in ranks:
        rank.kill(signal.SIGKILL)
    text = run_ranks(tmp_path, Train(arguments), 2)
    assert "from step 6 of 10" in text
    assert_same_run(folder, unbroken / "2", exactly=True)


@dataclass(frozen=True)
class KillBeforeResult(Train):
    """A rank that is killed between the last checkpoint and the result."""

    def __call__(self):
        from mnist_dist import run_folder

        run_folder.RunFolder.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__()


def test_a_run_killed_before_its_result_needs_no_further_step(tmp_path, unbroken):
    folder = tmp_path / "run"
    arguments = [*TINY, *CALM, "--run_dir", str(folder)]
    run_ranks(tmp_path, KillBeforeResult(arguments), expect=-signal.SIGKILL)
    assert not (folder / "result.json").exists()
    assert "from step 10 of 10" in run_ranks(tmp_path, Train(arguments))
    assert_same_run(folder, unbroken / "1", exactly=True)


# The run folder is the identity.


@dataclass(frozen=True)
class Alone:
    """A group of this process, without Accelerate."""

    on_main: Callable = lambda work: work()


def test_a_finished_run_is_a_no_op(tmp_path):
    folder = tmp_path / "run"
    arguments = [*TINY, "--run_dir", str(folder)]
    run_ranks(tmp_path, Train(arguments), 2)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}
    text = run_ranks(tmp_path, Train([*arguments, "--threads", "2"]), 2)
    assert text.count("is finished: test accuracy") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"} == before


def test_another_config_in_the_folder_is_an_error_that_shows_the_difference(tmp_path):
    folder = tmp_path / "run"
    run_ranks(tmp_path, TrainOnce([*TINY, "--run_dir", str(folder)], 3), expect=85)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    text = run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder), "--seed", "5", "--batch_size", "10"]), 2, expect=2)
    assert "batch_size: 6 there, 10 asked for" in text
    assert "seed: 0 there, 5 asked for" in text
    assert "learning_rate" not in text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"} == {
        path: content for path, content in files.items() if path.name != "lock"
    }


def test_a_start_that_is_refused_leaves_no_config(tmp_path):
    folder = tmp_path / "run"
    run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder), "--dataset", "kmnist", "--data_dir", str(tmp_path / "none")]), expect=2)
    assert not (folder / "config.yaml").exists()
    run_ranks(tmp_path, TrainOnce([*TINY, "--run_dir", str(folder)], 3), expect=85)
    (folder / "config.yaml").unlink()
    assert "seed: 0 there, 5 asked for" in run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder), "--seed", "5"]), expect=2)
    run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder)]))


def test_a_look_at_the_lock_does_not_refuse_a_start(tmp_path):
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with RunFolder(configure(run_dir=str(tmp_path)), Alone()) as run:
            run.open(model_bytes=0)
        timer.join()


def test_a_run_has_ended_well_though_the_others_did_not_wait_for_its_report(tmp_path, caplog):
    def lose(_work):
        raise RuntimeError("[gloo] Timed out waiting 1000ms for recv operation to complete")

    RunFolder(configure(run_dir=str(tmp_path)), Alone(lose)).publish({}, None, None)
    assert "see --timeout_s" in caplog.text


@dataclass(frozen=True)
class LoseRankOne:
    """Train, and kill rank one when rank zero has written the result."""

    run_dir: str

    def __call__(self):
        pid, write = Path(f"{self.run_dir}.pid"), run_folder.write_atomically

        def write_and_kill(path, content):
            write(path, content)
            if path.name == "result.json":
                os.kill(int(pid.read_text()), signal.SIGKILL)

        run_folder.write_atomically = write_and_kill
        if os.environ["RANK"] == "1":
            pid.write_text(str(os.getpid()))
        return main([*TINY, "--run_dir", self.run_dir])


def test_a_run_whose_result_is_written_has_ended_well_though_a_rank_is_lost_then(tmp_path):
    folder = tmp_path / "run"
    zero, one = start_ranks(tmp_path, LoseRankOne(str(folder)), 2)
    assert (one.wait(), zero.wait()) == (-signal.SIGKILL, 0), zero.text
    assert "finished: test accuracy" in zero.text
    assert "the other ranks did not wait" in zero.text
    assert "Traceback" not in zero.text
    assert json.loads((folder / "ends.jsonl").read_text())["why"] == "finished"


@pytest.mark.parametrize(
    ("shards", "before", "words"),
    [
        (None, {}, ""),
        (None, {"threads": 7, "processor": "x"}, "a run that is resumed has the same bits .* had processor x, now y; threads 7, now 1"),
        (None, {"torch": "2.10"}, "torch 2.10, now 2.11"),
        (None, {"mnist_dist": "6"}, "mnist_dist 6, now 7"),
        (None, {"mnist_dist": None}, "mnist_dist of an older version, now 7"),
        (None, {"threads": 7, "world_size": 4}, ""),  # which is the same up to rounding in any case
        (4, {"threads": 7, "world_size": 4}, "shards give the same bits .* had threads 7, now 1"),
    ],
)
def test_a_resumed_run_that_computes_otherwise_is_told_what_differs(tmp_path, caplog, shards, before, words):
    start = {"step": 0, "source": "", "world_size": 2, "processor": "y", "device": "cpu", "threads": 1, "torch": "2.11"}
    start |= {"precision": "fp32", "micro_batch": 6, "mnist_dist": "7"}
    noted = {name: value for name, value in (start | before).items() if value is not None}
    (tmp_path / "starts.jsonl").write_text(json.dumps(noted) + "\n")
    RunFolder(configure(run_dir=str(tmp_path), shards=shards), Alone())._compare(start)
    assert re.search(words, caplog.text) if words else not caplog.text


def test_a_second_live_job_in_the_folder_is_refused_and_a_dead_one_does_not_hold_it(tmp_path):
    folder = tmp_path / "run"
    arguments = [*TINY, "--run_dir", str(folder), "--steps", "5000"]
    first = start_ranks(tmp_path, Train(arguments))[0]
    first.wait_for(lambda: (folder / "metrics.jsonl").exists())
    text = run_ranks(tmp_path, Train(arguments), 2, expect=2)
    assert f"is in use by process {first.process.pid} on " in text
    first.kill(signal.SIGKILL)
    first.wait()
    again = start_ranks(tmp_path, Train(arguments))[0]
    again.wait_for(lambda: "from step 0" in again.text)
    again.kill(signal.SIGTERM)
    assert again.wait() == 143


@pytest.mark.slow
def test_a_moving_average_in_a_frozen_parameter_is_resumed_on_as_many_processes(tmp_path):
    task = str(Path(__file__).with_name("ragged_task.py"))
    arguments = ["--task", task, *CALM, "--steps", "8", "--batch_size", "6", "--precision", "fp32", "--test_size", "10"]
    arguments += ["--report", "false", "--wandb", "disabled"]
    for size in (1, 2):
        run_ranks(tmp_path, Train([*arguments, "--run_dir", str(tmp_path / f"whole{size}")]), size)
        broken = [*arguments, "--run_dir", str(tmp_path / f"broken{size}")]
        assert "because each forward pass changes average.weight" in run_ranks(tmp_path, TrainOnce(broken, 3), size, expect=85)
        assert "start as many, or use" in run_ranks(tmp_path, Train(broken), 3 - size, expect=2)
        if size == 1:
            text = run_ranks(tmp_path, Train([*broken, "--micro_batch", "2"]), size, expect=2)
            assert "without micro_batch, and this start has" in text
            assert "micro_batch 2; a step of this task" in text
            assert "start as many with the same micro_batch, or use" in text
            shards = [*arguments, "--shards", "2", "--run_dir", str(tmp_path / "shards")]
            run_ranks(tmp_path, TrainOnce(shards, 3), size, expect=85)
            text = run_ranks(tmp_path, Train([*shards, "--micro_batch", "2"]), size, expect=2)
            assert "it was made with no micro_batch, and this start has micro_batch 2; a step" in text
            assert "leave micro_batch out, or use" in text
        run_ranks(tmp_path, Train(broken), size)
        whole, resumed = (load_file(tmp_path / f"{name}{size}/model.safetensors") for name in ("whole", "broken"))
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
        assert not torch.equal(whole["average.weight"], whole["embedding.weight"])


def test_rows_after_the_checkpoint_and_a_torn_row_are_cut_off(tmp_path, unbroken):
    folder = tmp_path / "run"
    arguments = [*TINY, *CALM, "--run_dir", str(folder)]
    run_ranks(tmp_path, TrainOnce(arguments, 4), expect=85)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/loss": 9.0}\n{"step": 6, "tra')
    with (folder / "starts.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    run_ranks(tmp_path, Train(arguments))
    assert [start["step"] for start in read_run(folder).starts] == [0, 4]
    assert_same_run(folder, unbroken / "1", exactly=True)


@pytest.mark.parametrize("content", ['{"step": 10', "{}", "[]"])
def test_a_damaged_result_is_named_and_nothing_is_lost(tmp_path, content):
    folder = tmp_path / "run"
    arguments = [*TINY, "--run_dir", str(folder)]
    run_ranks(tmp_path, Train(arguments))
    (folder / "result.json").write_text(content)
    assert "result.json is damaged" in run_ranks(tmp_path, Train(arguments), expect=2)
    assert len(read_rows(folder)) == 10


# The random soak.


class TrainElsewhere(Train):
    """A rank whose temporary files go to a folder of their own."""

    def __call__(self):
        tempfile.tempdir = os.environ["TMPDIR"]
        return super().__call__()


def find_processes(variable):
    """The processes that have this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


# On changing worlds; and on one, where the end must have the very bits of the unbroken run.
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [int(os.environ.get("SOAK_SEED", "0"))])
@pytest.mark.parametrize("worlds", [(1, 2, 3, 4), (3,)], ids=["any world", "three ranks"])
def test_a_run_that_is_stopped_at_random_again_and_again_ends_right(tmp_path, seed, worlds):
    chance = random.Random(seed)
    steps = ["--learning_rate", "0.0005", "--steps", "500", "--evaluate_every", "25", "--checkpoint_every", "3", "--timeout_s", "20"]
    expected, folder, scratch = tmp_path / "expected", tmp_path / "run", tmp_path / "tmp"
    scratch.mkdir()
    environ = {"TMPDIR": str(scratch)}
    run_ranks(tmp_path, Train([*TINY, *CALM, *steps, "--run_dir", str(expected)]), worlds[0])
    arguments = [*TINY, *CALM, *steps, "--run_dir", str(folder), "--wandb", "offline"]
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]
    interruptions = 0
    while interruptions < 25:
        ranks = start_ranks(tmp_path, TrainElsewhere(arguments), chance.choice(worlds), environ)
        if chance.random() < 0.85:  # let it come to the training; otherwise stop it anywhere before
            begun = time.monotonic()
            while ranks[0].is_alive and "from step" not in ranks[0].text and time.monotonic() - begun < 60:
                time.sleep(0.005)
        time.sleep(chance.random() * 0.15)
        number = chance.choice(signals)
        for rank in ranks if chance.random() < 0.6 else [chance.choice(ranks)]:
            if rank.is_alive:
                rank.kill(number)
        codes = [rank.wait(90) for rank in ranks]
        assert set(codes) <= {0, 1, 85, 143, 130, *(-number for number in signals)}, ranks[0].text
        if set(codes) != {0}:
            interruptions += 1
        if (folder / "result.json").exists():
            break
    assert interruptions >= 25, "the run is too short for this soak"
    run_ranks(tmp_path, TrainElsewhere(arguments), worlds[-1] if len(worlds) == 1 else 2, environ)
    assert_same_run(folder, expected, exactly=len(worlds) == 1)
    assert len(checkpoint.list_newest_first(folder / "checkpoints")) <= 3
    assert len((folder / "starts.jsonl").read_text().splitlines()) > 15
    # Nothing is left behind: no file, no process, no folder.
    end = time.monotonic() + 60
    while find_processes(str(folder)) or find_processes(str(scratch)):
        assert time.monotonic() < end, find_processes(str(folder))
        time.sleep(0.2)
    assert not list(folder.rglob("*.tmp"))
    assert list(scratch.iterdir()) == []
    assert {path.name for path in folder.iterdir()} <= {
        *("config.yaml", "metrics.jsonl", "starts.jsonl", "ends.jsonl", "result.json", "model.safetensors", "lock", "checkpoints", "wandb")
    }
    own = ("offline-run-", "run_id", "cache", "data", "pictures")
    assert not [path for path in (folder / "wandb").iterdir() if not path.name.startswith(own)]
