"""The training program with clocks in it, for `benchmarks.startup`: prints when each part of its start was over.

It imports nothing before its first clock that the program would not. Times are of the system's monotonic clock, which all processes share.
"""

import time

_BEGIN_S = time.monotonic()

import importlib  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

_WAIT_S = 60.0  # how long W&B's process may take to say that it is there

_spent_s: dict[str, float] = {}


def _note(part: str, start_s: float) -> None:
    _spent_s[part] = _spent_s.get(part, 0.0) + time.monotonic() - start_s


def _import(part: str, name: str) -> Any:
    start_s = time.monotonic()
    module = importlib.import_module(name)
    _note(part, start_s)
    return module


class _Said(logging.Handler):
    """Knows whether W&B's process has said how the run is mirrored."""

    heard = False

    def emit(self, record: logging.LogRecord) -> None:
        """Note it."""
        self.heard = True


def main() -> int:
    """Train with the arguments of this program, as the training program does; its exit status."""
    command_s = float(os.environ.pop("BENCHMARK_COMMAND_S"))
    answer = Path(os.environ.pop("BENCHMARK_ANSWER"))
    _spent_s["launcher and interpreter"] = _BEGIN_S - command_s
    options = _import("import of options", "mnist_dist.config")
    given = options.parse_command_line(sys.argv[1:])
    given.task.load_ahead()
    tracking = _import("import of options", "mnist_dist.tracking")
    with tracking.starting_ahead(given.wandb, importlib.import_module("mnist_dist.world").find_world(os.environ)):
        return _train(given, command_s, answer)


def _train(given: Any, command_s: float, answer: Path) -> int:
    options, program = (importlib.import_module(f"mnist_dist.{name}") for name in ("config", "program"))
    with program.importing():
        _import("import torch", "torch")
        _import("import accelerate", "accelerate")
        loop = _import("import of the loop", "mnist_dist.loop")
    preemption, run_folder, mnist = (importlib.import_module(f"mnist_dist.{name}") for name in ("preemption", "run_folder", "tasks.mnist"))

    said, first_step_s = _Said(), 0.0
    trackers: list[tuple[Any, float]] = []
    logging.getLogger("mnist_dist.tracking").addHandler(said)
    open_tracker = run_folder.open_tracker
    since_s = 0.0  # when the last part of those that follow each other was over

    def end_part(name: str) -> None:
        nonlocal since_s
        _note(name, since_s)
        since_s = time.monotonic()

    class TimedMnist(mnist.Mnist):  # type: ignore[misc, name-defined]
        """The built-in task, which notes when it is asked for data and model."""

        def load(self) -> Any:
            end_part("process group")
            return super().load()

        def build_model(self) -> Any:
            end_part("data")
            model = super().build_model()
            end_part("model")
            return model

    def open_noted(*arguments: Any, **named: Any) -> Any:
        nonlocal since_s
        end_part("optimizer and run folder")
        start_s = since_s
        tracker = open_tracker(*arguments, **named)
        end_part("start of W&B's process")
        if type(tracker).__name__ != "NoTracker":
            trackers.append((tracker, start_s))
        return tracker

    def take_turns(loaded: Iterable[Any], _: Any) -> Iterator[Any]:
        nonlocal first_step_s
        batches, start_s = iter(loaded), time.monotonic()
        yield next(batches)
        _note("first step", start_s)
        first_step_s = time.monotonic()
        # Then wait for W&B's process, which starts beside all this.
        end_s = time.monotonic() + _WAIT_S
        while trackers and not said.heard and time.monotonic() < end_s:
            trackers[0][0].log({"step": 1})
            time.sleep(0.05)
        _spent_s["W&B ready, in the background"] = time.monotonic() - trackers[0][1] if trackers and said.heard else 0.0
        yield next(batches)

    def run() -> int:
        nonlocal since_s
        config = options.make_config(given.values(), task=TimedMnist)
        since_s = time.monotonic()
        return int(loop.train(config, preemption.StopSignals().install(), take_turns).stop.exit_code)

    with mock.patch.object(run_folder, "open_tracker", open_noted):
        status = program.run_program(run)
    total_s = first_step_s - command_s
    background_s = _spent_s.pop("W&B ready, in the background", 0.0)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    _spent_s["rest"] = total_s - sum(_spent_s.values())
    times = {"parts_s": _spent_s, "total_s": total_s, "wandb_ready_s": background_s, "wandb_cpu_s": children.ru_utime + children.ru_stime}
    answer.write_text(json.dumps(times))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
