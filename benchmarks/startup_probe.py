"""The training program with clocks in it, for `benchmarks.startup`: prints when each part of its start was over.

It imports nothing before its first clock that the program would not. Times are of the system's monotonic clock, which all processes share.
"""

import time

_BEGIN_S = time.monotonic()

import contextlib  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

_WAIT_S = 60.0  # how long W&B's process may take to say that it is there

_spent_s: dict[str, float] = {}


def _note(part: str, start_s: float) -> None:
    _spent_s[part] = _spent_s.get(part, 0.0) + time.monotonic() - start_s


def _import(part: str, name: str) -> Any:
    start_s = time.monotonic()
    module = importlib.import_module(name)
    _note(part, start_s)
    return module


def _timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        start_s = time.monotonic()
        try:
            return function(*arguments, **named)
        finally:
            _note(part, start_s)

    return call


class _Said(logging.Handler):
    """Knows whether W&B's process has said how the run is mirrored."""

    heard = False

    def emit(self, record: logging.LogRecord) -> None:
        """Note it."""
        self.heard = True


def main() -> int:
    """Run the training program with the arguments of this one; its exit status."""
    command_s = float(os.environ.pop("BENCHMARK_COMMAND_S"))
    answer = Path(os.environ.pop("BENCHMARK_ANSWER"))
    _spent_s["launcher and interpreter"] = _BEGIN_S - command_s
    program = _import("import of options", "mnist_dist.train")
    _import("import torch", "torch")
    _import("import accelerate", "accelerate")
    loop = _import("import of the loop", "mnist_dist.loop")
    run_folder: Any = importlib.import_module("mnist_dist.run_folder")

    said, first_step_s = _Said(), 0.0
    trackers: list[tuple[Any, float]] = []
    logging.getLogger("mnist_dist.tracking").addHandler(said)
    make_loader, open_tracker, join_group = loop.make_loader, run_folder.open_tracker, loop.join_group

    def take_turns(batches: Iterator[Any]) -> Iterator[Any]:
        nonlocal first_step_s
        start_s = time.monotonic()
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

    def open_noted(*arguments: Any, **named: Any) -> Any:
        start_s = time.monotonic()
        tracker = open_tracker(*arguments, **named)
        _note("start of W&B's process", start_s)
        if type(tracker).__name__ != "NoTracker":
            trackers.append((tracker, start_s))
        return tracker

    @contextlib.contextmanager
    def join_noted(*arguments: Any) -> Iterator[Any]:
        start_s = time.monotonic()
        with join_group(*arguments) as group:
            _note("process group", start_s)
            yield group

    replaced = {
        "make_loader": lambda *arguments: take_turns(iter(make_loader(*arguments))),
        "join_group": join_noted,
        "load_dataset": _timed("data", loop.load_dataset),
        "TrainingState": _timed("model and optimizer", loop.TrainingState),
    }
    for name, value in replaced.items():
        setattr(loop, name, value)
    run_folder.open_tracker = open_noted
    status = program.main(sys.argv[1:])
    total_s = first_step_s - command_s
    background_s = _spent_s.pop("W&B ready, in the background", 0.0)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    _spent_s["rest"] = total_s - sum(_spent_s.values())
    times = {"parts_s": _spent_s, "total_s": total_s, "wandb_ready_s": background_s, "wandb_cpu_s": children.ru_utime + children.ru_stime}
    answer.write_text(json.dumps(times))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
