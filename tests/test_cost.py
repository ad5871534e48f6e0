"""What the loop costs beside the bare training step, measured step by step in turn: the machine may be busy with other things."""

import itertools
import json
import platform
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import pytest
from processes import Train, run_ranks

from benchmarks.common import make_model, make_step, run_loop
from mnist_dist import run_folder, tracking
from mnist_dist.config import configure
from mnist_dist.distributed import Agreement
from mnist_dist.loop import train
from mnist_dist.tasks.mnist.augment import STEPS_AT_ONCE
from mnist_dist.world import count_usable_cores


@pytest.mark.slow
def test_a_step_of_the_loop_costs_at_most_five_percent_more_than_the_bare_step(tmp_path):
    warm_up, blocks = 10, 8
    config = configure(steps=warm_up + blocks * STEPS_AT_ONCE, test_size=100, report=False, wandb="disabled", run_dir=str(tmp_path))
    times = {"loop": [], "bare": []}

    def take_turns(batches, state):
        """After each step of the loop, a bare one. A step of the loop lasts from asking for a batch to asking for the next."""
        bare_step = make_step(make_model(state.group.accelerator), config, state.group.accelerator, config.batch_size)
        begin = time.perf_counter()
        for batch in batches:
            yield batch
            times["loop"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            bare_step()
            times["bare"].append(time.perf_counter() - begin)
            begin = time.perf_counter()

    run_loop(config, take_turns)
    # In blocks of as many steps as share one draw of transforms, so that it counts; each place in the block at its fastest, as whatever
    # else the machine does only adds to a time.
    blocks_s = {
        name: [spent[begin : begin + STEPS_AT_ONCE] for begin in range(warm_up, config.total_steps, STEPS_AT_ONCE)]
        for name, spent in times.items()
    }
    loop_s, bare_s = (sum(map(min, *blocks_s[name])) for name in ("loop", "bare"))
    ratio = loop_s / bare_s
    print(f"a block of {STEPS_AT_ONCE} steps: loop {loop_s:.2f} s, bare {bare_s:.2f} s, ratio {ratio:.3f}")
    assert ratio <= 1.05


@pytest.mark.slow
def test_a_step_looks_for_no_package(tmp_path, monkeypatch):
    looked = []

    class Finder:
        @staticmethod
        def find_spec(name, *_):
            looked.append(name)

    def watch(batches, state):
        for batch in batches:
            yield batch
            if state.step == 3:
                monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        monkeypatch.undo()

    run_loop(configure(batch_size=8, steps=9, test_size=100, report=False, wandb="disabled", run_dir=str(tmp_path)), watch)
    assert looked == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives each step's memory back to the system")
@pytest.mark.slow
def test_steps_use_the_memory_of_the_steps_before(tmp_path):
    faults = []

    def count_faults(batches, _):
        for batch in batches:
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
            yield batch

    # So large a batch that its tensors exceed what glibc may learn to keep.
    run_loop(configure(batch_size=512, steps=10, test_size=100, report=False, wandb="disabled", run_dir=str(tmp_path)), count_faults)
    new_pages = statistics.median(after - before for before, after in itertools.pairwise(faults[4:]))
    assert new_pages < 1000  # tens of thousands, where the memory is given back


@dataclass(frozen=True)
class TimeAgreement(Train):
    """A rank that measures how long it is held up by the agreement on stop signals."""

    def __call__(self):
        exchange, spent, ends = Agreement.exchange, [], []

        def timed(agreement, value):
            start = time.perf_counter()
            agreed = exchange(agreement, value)
            ends.append(time.perf_counter())
            spent.append(ends[-1] - start)
            return agreed

        Agreement.exchange = timed
        code = super().__call__()
        steps = [end - begin for begin, end in itertools.pairwise(ends)]
        print(json.dumps({"agreement_s": statistics.median(spent), "step_s": statistics.median(steps)}))
        return code


@pytest.mark.slow
def test_agreeing_on_stop_signals_costs_less_than_one_percent_of_a_step(tmp_path):
    text = run_ranks(
        tmp_path,
        TimeAgreement(
            ["--report", "false", "--wandb", "disabled", "--steps", "60", "--test_size", "100", "--run_dir", str(tmp_path / "run")]
        ),
        2,
    )
    for line in text.splitlines():
        if line.startswith("{"):
            cost = json.loads(line)
            print(f"agreement {cost['agreement_s'] * 1e3:.3f} ms of a step of {cost['step_s'] * 1e3:.1f} ms")
            assert cost["agreement_s"] < 0.01 * cost["step_s"]
    assert text.count("agreement_s") == 2


@pytest.mark.slow
def test_tracking_costs_a_default_run_less_than_a_second_or_one_percent(tmp_path, monkeypatch):
    """What a whole run with as many rows as the default recipe writes spends on the mirror, against the time that recipe trains."""
    spent = []

    def timed(function):
        def call(*arguments, **named):
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent.append(time.perf_counter() - start)

        return call

    monkeypatch.setattr(run_folder, "open_tracker", timed(run_folder.open_tracker))
    for name in ("log", "log_images", "log_panels", "finish"):
        monkeypatch.setattr(tracking.WandbTracker, name, timed(getattr(tracking.WandbTracker, name)))
    default, steps = configure(), 200
    log_every = steps // (default.total_steps // default.log_every)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    train(configure(steps=steps, log_every=log_every, test_size=100, wandb="offline", run_dir=str(tmp_path)))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The mirror's process takes its time from the training's cores.
    stolen_s = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / count_usable_cores()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    training_s = default.total_steps * default.batch_size / statistics.median(row["train/images_per_s"] for row in rows)
    print(
        f"{len(rows)} rows: {sum(spent):.2f} s in calls, {stolen_s:.2f} s of the mirror's process; a default run trains {training_s:.0f} s"
    )
    assert len(spent) > len(rows) >= default.total_steps // default.log_every
    # Most of it is the start of the mirror's process, which takes as long whether the run lasts one minute or three.
    assert sum(spent) + stolen_s < max(1.0, 0.01 * training_s)


LARGE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from mnist_dist.task import Data
from mnist_dist.tasks.classification import Classification


class Large(Classification):
    class_names = ("low", "high")

    def load(self):
        numbers = torch.linspace(-1, 1, 512)
        data = TensorDataset(numbers[:, None].expand(-1, 64).clone(), (numbers > 0).long())
        return Data(data, TensorDataset(*data[:64]))

    def build_model(self):
        return nn.Sequential(nn.Linear(64, 7000), nn.ReLU(), nn.Linear(7000, 7000), nn.ReLU(), nn.Linear(7000, 2))
"""


@pytest.mark.slow
def test_fifty_million_parameters_are_saved_beside_the_training(tmp_path):
    (tmp_path / "large.py").write_text(LARGE)
    run = tmp_path / "run"
    arguments = [
        "--task",
        str(tmp_path / "large.py"),
        "--optimizer",
        "adamw",
        "--learning_rate",
        "1e-4",
        "--batch_size",
        "8",
        "--steps",
        "24",
    ]
    arguments += ["--log_every", "1", "--checkpoint_every", "8", "--report", "false", "--wandb", "disabled", "--run_dir", str(run)]
    text = run_ranks(tmp_path / "logs", Train(arguments))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    size_gb = max(path.stat().st_size for path in (run / "checkpoints").iterdir()) / 1e9
    memory_gb = rows[-1]["health/memory_gb"]
    print(f"a checkpoint has {size_gb:.2f} GB, the process used {memory_gb:.1f} GB")
    assert 0.5 < size_gb < 0.7
    assert memory_gb < 3.2
    assert "finished" in text
