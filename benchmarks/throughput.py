"""Images per second of the real training loop, beside the stock way, the bare model step and the matrix-product ceiling.

`python -m benchmarks.throughput`; how to read it: benchmarks/README.md.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks import common, stock
from benchmarks.common import Row
from mnist_dist.batches import Batch
from mnist_dist.config import Config, make_config, read_recipe, resolve_config
from mnist_dist.errors import UserError
from mnist_dist.program import run_program
from mnist_dist.state import TrainingState
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.tasks.mnist.augment import STEPS_AT_ONCE
from mnist_dist.tasks.mnist.model import CNN

_WARM_UP_STEPS = 10
_WARM_UP_BATCHES = 2  # of the stock loader: its workers must have filled their queues
_TRIAL_BATCHES = 2
_MOST_STOCK_BATCH_SIZE = 60_000 // (_WARM_UP_BATCHES + _TRIAL_BATCHES)
_NOT_WAYS = ("products", "medians")  # what a round holds beside seconds an image of each way
_TRIALS = 2  # of each setting of the stock loader, to find the best


class PartTimer:
    """Where the time of the loop's steps goes: by clocks in its task, and in torch's hooks around the optimizer's step."""

    def __init__(self) -> None:
        self.on = False
        self.spent_s: dict[str, float] = defaultdict(float)
        self.device = torch.device("cpu")
        self._losses_end_s: float | None = None
        self._optimizer_s = 0.0

    def read_clock(self) -> float:
        """The time, when the device has done what it was given."""
        common.wait_for_device(self.device)
        return time.perf_counter()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a block to `part` while the timer is on."""
        start_s = self.read_clock() if self.on else 0.0
        yield
        if self.on:
            self.spent_s[part] += self.read_clock() - start_s

    @contextmanager
    def timed_forward(self) -> Iterator[None]:
        """Add the time of the losses to the forward pass, but for their inputs; from their end on, it is the backward pass."""
        self._end_backward()
        start_s, inputs_s = self.read_clock() if self.on else 0.0, self.spent_s["augment"]
        yield
        if self.on:
            self._losses_end_s = self.read_clock()
            self.spent_s["forward"] += self._losses_end_s - start_s - (self.spent_s["augment"] - inputs_s)

    def _end_backward(self) -> None:
        if self.on and self._losses_end_s is not None:
            self.spent_s["backward"] += self.read_clock() - self._losses_end_s
        self._losses_end_s = None

    @contextmanager
    def timed_optimizers(self) -> Iterator[None]:
        """Add the time of each optimizer's step."""

        def begin(*_: Any) -> None:
            self._end_backward()
            self._optimizer_s = self.read_clock() if self.on else 0.0

        def end(*_: Any) -> None:
            if self.on:
                self.spent_s["optimizer"] += self.read_clock() - self._optimizer_s

        hooks = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def make_task(self) -> type[Mnist]:
        """The built-in task with clocks in it."""
        timer = self

        class TimedMnist(Mnist):
            """Draws, augments and computes as the built-in task does."""

            def draw(self, seed: int, step: int, size: int) -> Tensor:
                with timer.timed("augment"):
                    return super().draw(seed, step, size)

            def make_inputs(self, batch: Any, drawn: Any = None) -> tuple[Tensor, Tensor]:
                with timer.timed("augment"):
                    return super().make_inputs(batch, drawn)

            def losses(self, model: nn.Module, batch: Any, drawn: Any) -> Tensor:
                with timer.timed_forward():
                    return super().losses(model, batch, drawn)

        return TimedMnist


class Session:
    """One measurement: the loop runs, and between its steps the others have their turns."""

    def __init__(self, options: argparse.Namespace, config: Config, folder: Path) -> None:
        self.options = options
        self.config = config
        self.folder = folder
        self.rounds: list[Row] = []
        self.candidates: list[Row] = []
        self.parts_ms: dict[str, float] = {}
        self.precision = ""
        self.threads = 0
        self.timer = PartTimer()
        self._batches: Iterator[Batch] = iter(())
        self._device = torch.device("cpu")

    def take_turns(self, loaded: Iterable[Batch], state: TrainingState) -> Iterator[Batch]:
        """The loop's batches, and all measuring between them."""
        batches, accelerator, device = iter(loaded), state.group.accelerator, state.group.device
        self._batches, self._device, self.timer.device = batches, device, device
        self.precision, self.threads = common.name_precision(accelerator), torch.get_num_threads()
        bare_step = common.make_step(common.make_model(accelerator), self.config, accelerator, self.config.batch_size)
        for _ in range(_WARM_UP_STEPS):
            yield next(batches)
            bare_step()
        best = {kind: self._find_best_stock(kind) for kind in ("stock", "stock without augmentation")}
        for number in range(self.options.rounds):
            row: Row = {"products": common.measure_products(self._device)}
            yield from self._alternate(bare_step, row)
            for kind, (workers, threads) in best.items():
                row[kind] = self._time_stock(kind, workers, threads, math.ceil(self._images / self.options.stock_batch_size))
            self.rounds.append(row)
            rates = ", ".join(f"{name} {1 / value:,.0f}" for name, value in row.items() if name not in _NOT_WAYS)
            common.tell(f"round {number + 1} of {self.options.rounds}, images/s: {rates}")
        yield from self._time_parts()
        yield next(batches)  # the loop ends with this one

    @property
    def _images(self) -> int:
        return int(self.options.steps * self.config.batch_size)

    def _alternate(self, bare_step: common.Step, row: Row) -> Iterator[Batch]:
        """Steps of the loop and bare steps in turn: one by one, or on a GPU, which must not be waited for at each step, in two blocks."""
        turn = self.options.steps if self._device.type == "cuda" else 1
        turns_s: dict[str, list[float]] = {"loop": [], "bare": []}
        for _ in range(self.options.steps // turn):
            start = self.timer.read_clock()
            for _ in range(turn):
                yield next(self._batches)
            turns_s["loop"].append(self.timer.read_clock() - start)
            start = self.timer.read_clock()
            for _ in range(turn):
                bare_step()
            turns_s["bare"].append(self.timer.read_clock() - start)
        row |= {name: sum(values) / self._images for name, values in turns_s.items()}
        # What hits single steps, as another program does, is not in the medians; nor is a row of the record or a draw of transforms.
        row["medians"] = {name: statistics.median(values) / turn / self.config.batch_size for name, values in turns_s.items()}

    def _find_best_stock(self, kind: str) -> tuple[int, int]:
        """The number of workers and of threads with which the stock way is quickest here."""
        found: dict[tuple[int, int], list[float]] = defaultdict(list)
        settings = {(workers, threads) for workers in self.options.workers for threads in (self.threads, max(1, self.threads - workers))}
        for _ in range(_TRIALS):
            for workers, threads in sorted(settings):
                found[workers, threads].append(self._time_stock(kind, workers, threads, _TRIAL_BATCHES))
        self.candidates += [
            {"kind": kind, "workers": workers, "threads": threads, "image_s": times} for (workers, threads), times in sorted(found.items())
        ]
        best = min(found, key=lambda setting: statistics.median(found[setting]))
        common.tell(f"{kind}: best with {best[0]} workers and {best[1]} threads")
        return best

    def _time_stock(self, kind: str, workers: int, threads: int, batches: int) -> float:
        """Seconds an image of the stock way."""
        augmentation = stock.make_augmentation(common.find_mnist(self.config).limits) if kind == "stock" else None
        loader = stock.make_loader(
            self.folder, train=True, batch_size=self.options.stock_batch_size, workers=workers, augmentation=augmentation
        )
        model: nn.Module = CNN().to(self._device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        torch.set_num_threads(threads)
        start, timed_images = 0.0, 0
        try:
            # At most one pass: the loader may end before so many batches.
            for number, (images, labels) in enumerate(itertools.islice(loader, _WARM_UP_BATCHES + batches), start=1):
                stock.train_batch(model, optimizer, images, labels)
                if number == _WARM_UP_BATCHES:
                    start = self.timer.read_clock()
                elif number > _WARM_UP_BATCHES:
                    timed_images += len(images)
            return (self.timer.read_clock() - start) / timed_images
        finally:
            torch.set_num_threads(self.threads)

    def _time_parts(self) -> Iterator[Batch]:
        timer = self.timer
        timer.on = True
        begin = timer.read_clock()
        for _ in range(STEPS_AT_ONCE):  # of which one draws the transforms of them all
            start = timer.read_clock()
            batch = next(self._batches)
            timer.spent_s["load"] += timer.read_clock() - start
            yield batch
        total_s = timer.read_clock() - begin
        timer.on = False
        timer.spent_s["rest"] = total_s - sum(timer.spent_s.values())
        self.parts_ms = {part: spent_s / STEPS_AT_ONCE * 1e3 for part, spent_s in timer.spent_s.items()}


def measure(options: argparse.Namespace) -> Row:
    """One row of results."""
    given = {} if options.batch_size is None else {"batch_size": options.batch_size}
    if options.stock_batch_size > _MOST_STOCK_BATCH_SIZE:
        raise UserError(
            f"stock_batch_size is {options.stock_batch_size}; allowed: at most {_MOST_STOCK_BATCH_SIZE}, to time some in one pass"
        )
    steps = _WARM_UP_STEPS + options.rounds * options.steps + STEPS_AT_ONCE + 1
    with common.temporary_folder() as folder:
        stock.write_files(folder)
        limits = {"steps": steps, "evaluate_every": steps, "test_size": 100, "report": False, "wandb": options.wandb}
        config = resolve_config(given | limits | {"run_dir": str(folder / "run")}, read_recipe(options.config))
        session = Session(options, config, folder)
        config = make_config(config.values(), task=session.timer.make_task())
        with session.timer.timed_optimizers():
            common.run_loop(config, session.take_turns)
    return {
        "benchmark": "throughput",
        "settings": {
            "config": common.name_recipe(options.config),
            "batch_size": config.batch_size,
            "steps": options.steps,
            "stock_batch_size": options.stock_batch_size,
            "wandb": options.wandb,
        },
        "precision": session.precision,
        "threads": session.threads,
        "rounds": session.rounds,
        "stock_settings": session.candidates,
        "parts_ms": session.parts_ms,
        "machine": common.describe_machine(),
        **common.describe_origin(),
    }


def format_row(row: Row) -> str:
    """The tables of a row, as markdown."""
    rounds, settings = row["rounds"], row["settings"]
    image_s = {name: [round_[name] for round_ in rounds] for name in rounds[0] if name not in _NOT_WAYS}
    for precision in ("fp32", "bf16") if row["machine"]["bfloat16"] or row["machine"]["gpu"] else ("fp32",):
        image_s[f"ceiling {precision}"] = [common.TRAINING_FLOP / round_["products"][precision] for round_ in rounds]
    names = {
        "loop": f"the loop, batch {settings['batch_size']}, {row['precision']}",
        "bare": "the bare step on a fixed batch",
        "stock": f"stock, batch {settings['stock_batch_size']}, {_name_best(row, 'stock')}",
        "stock without augmentation": f"stock without augmentation, {_name_best(row, 'stock without augmentation')}",
        "ceiling fp32": "ceiling, matrix products in fp32",
        "ceiling bf16": "ceiling, matrix products in bf16",
    }
    lines = [
        [names[name], f"{1 / statistics.median(values):,.0f}", common.compare(values, image_s["loop"])] for name, values in image_s.items()
    ]
    loop_s, bare_s = ([round_["medians"][name] for round_ in rounds] for name in ("loop", "bare"))
    lines.insert(2, ["the bare step, medians of single steps", f"{1 / statistics.median(bare_s):,.0f}", common.compare(bare_s, loop_s)])
    total_ms = sum(row["parts_ms"].values())
    parts = [[part, f"{spent_ms:.2f}", f"{spent_ms / total_ms:.1%}"] for part, spent_ms in row["parts_ms"].items()]
    return "\n\n".join(
        [
            f"{common.describe_rows([row])}, {row['threads']} threads, recipe {settings['config']}, {len(rounds)} rounds;\n"
            + common.describe_products(rounds),
            common.format_table(["way", "images/s", "the loop is times as fast"], lines),
            common.format_table([f"part of a step of {settings['batch_size']}", "ms", "share"], parts),
        ]
    )


def _name_best(row: Row, kind: str) -> str:
    found = [candidate for candidate in row["stock_settings"] if candidate["kind"] == kind]
    best = min(found, key=lambda candidate: statistics.median(candidate["image_s"]))
    return f"{best['workers']} workers, {best['threads']} threads"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    parser = common.make_parser("throughput", "Images/s of the training loop beside the stock way, the bare step and the ceiling.")
    parser.add_argument("--config", default="mnist", help="recipe of the loop")
    parser.add_argument("--batch_size", type=common.positive, help="batch of the loop; None: the recipe's")
    parser.add_argument("--rounds", type=common.positive, default=9, help="alternations")
    parser.add_argument("--steps", type=common.positive, default=50, help="steps of the loop in each round; 50 hold one row of its record")
    parser.add_argument("--stock_batch_size", type=common.positive, default=512, help="batch of the stock way")
    parser.add_argument(
        "--workers", type=common.whole, nargs="+", default=[0, 1, 2], help="numbers of loader workers to try for the stock way"
    )
    parser.add_argument("--wandb", choices=("offline", "disabled"), default="offline", help="the mirror of the loop's run")
    options = parser.parse_args(arguments)
    return common.measure_or_show(options, lambda: measure(options), format_row)


if __name__ == "__main__":
    sys.exit(run_program(main))
