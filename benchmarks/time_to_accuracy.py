"""Time to 99.0 % and 99.4 % test accuracy: the training loop beside three stock ways, over seeds.

`python -m benchmarks.time_to_accuracy`; how to read it: benchmarks/README.md. Each entry and seed is a process of its own and a row of
the results file; the same command goes on where it was stopped.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from benchmarks import common, stock
from benchmarks.common import Row
from mnist_dist.batches import Batch
from mnist_dist.config import Config, make_config, read_recipe, resolve_config
from mnist_dist.errors import RunError, UserError
from mnist_dist.program import run_program
from mnist_dist.state import TrainingState
from mnist_dist.task import Tally
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.tasks.mnist.model import CNN
from mnist_dist.world import count_usable_cores

_NAMES = {
    "ours": "the loop",
    "course": "the course's recipe, stock",
    "example": "PyTorch's MNIST example",
    "lightning": "the CNN under Lightning",
}
_PEERS = {"course": (20, 512), "example": (14, 64), "lightning": (14, 64)}  # epochs, batch size
_MARKS = (0.990, 0.994)
_TRIAL_IMAGES = 4096  # on which numbers of workers and threads are tried
_FIRST_STEPS = 10  # in which libraries load and choose their kernels, and a graph is recorded


class Clock:
    """Counts the time of training; stands still while a model is evaluated."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._spent_s = 0.0
        self._since_s: float | None = None

    def start(self) -> None:
        """Go on."""
        self._since_s = time.perf_counter()

    def stop(self) -> float:
        """Stand still, once the device has done its work; the seconds so far."""
        if self._since_s is not None:
            common.wait_for_device(self.device)
            self._spent_s += time.perf_counter() - self._since_s
            self._since_s = None
        return self._spent_s


def make_our_config(options: argparse.Namespace, seed: int, run_dir: str) -> Config:
    """The options of the loop: the recipe, evaluated several times an epoch, with its record and no mirror."""
    given: Row = {"seed": seed, "run_dir": run_dir, "report": False, "wandb": "disabled"}
    given |= {name: getattr(options, name) for name in ("train_size", "test_size", "epochs") if getattr(options, name) is not None}
    given |= {"steps": None} if "epochs" in given else {}
    config = resolve_config(given, read_recipe(options.config))
    if getattr(config, "holdout", 0):
        raise UserError(f"the recipe {options.config} holds training images out; expected one that is evaluated on the test images")
    common.find_mnist(config)
    return config.replace(evaluate_every=max(1, config.steps_per_epoch // options.evaluations))


def describe_settings(entry: str, options: argparse.Namespace) -> Row:
    """What decides about an entry's rows, beside seed and machine."""
    if entry == "ours":
        recipe = common.describe_recipe(make_our_config(options, 0, "unused"))  # it has the sizes
        return {"config": common.name_recipe(options.config), "evaluations": options.evaluations, "recipe": recipe}
    epochs, batch_size = _PEERS[entry]
    settings = {"epochs": options.epochs or epochs, "batch_size": batch_size}
    settings |= {"train_size": options.train_size, "test_size": options.test_size}
    if entry == "example":
        if options.example is None:
            raise UserError(
                "the entry example needs --example FILE, mnist/main.py of github.com/pytorch/examples; or leave it out by --entries"
            )
        try:
            settings["sha256"] = hashlib.sha256(options.example.read_bytes()).hexdigest()[:12]
        except OSError as error:
            raise UserError(f"--example {options.example} cannot be read: {error.strerror}") from error
    return settings


def train_ours(options: argparse.Namespace, seed: int, folder: Path) -> Row:
    """Train by the loop. What it took and reached."""
    clock, step, precision, first_steps_s = Clock(), 0, "", 0.0
    evaluations: list[Row] = []

    class OffTheClock(Mnist):
        """The built-in task; the clock stands still while a split is counted."""

        def tally(self, model: nn.Module, batch: Any) -> Tally:
            clock.stop()  # where it stands already, it stays so
            return super().tally(model, batch)

        def measure(self, sums: Tensor) -> Row:
            measures = super().measure(sums)
            if not step:  # before the first one, it is tried on a few samples
                return measures
            evaluations.append({"epoch": step / config.steps_per_epoch, "time_s": clock.stop(), "accuracy": measures["accuracy"]})
            clock.start()
            return measures

    config = make_config(make_our_config(options, seed, str(folder / "run")).values(), task=OffTheClock)

    def take_turns(batches: Iterable[Batch], state: TrainingState) -> Iterator[Batch]:
        nonlocal step, precision, first_steps_s
        precision = common.name_precision(state.group.accelerator)
        clock.start()
        for batch in batches:
            if step == _FIRST_STEPS:
                first_steps_s = clock.stop()
                clock.start()
            step += 1
            yield batch

    common.run_loop(config, take_turns)
    return {"precision": precision, "evaluations": evaluations, "first_steps_s": first_steps_s}


def train_course(settings: Row, seed: int, folder: Path, workers: int) -> Row:
    """Train the course's way. What it took and reached."""
    train_loader, test_loader = _make_loaders(settings, folder, workers, stock.make_course_augmentation())
    clock = Clock()
    torch.manual_seed(seed)
    model, optimizer, scheduler = stock.build_course(clock.device)
    evaluations: list[Row] = []
    clock.start()
    for epoch in range(1, settings["epochs"] + 1):
        for images, labels in train_loader:
            stock.train_batch(model, optimizer, images, labels)
        scheduler.step()
        time_s = clock.stop()
        evaluations.append({"epoch": epoch, "time_s": time_s, "accuracy": stock.measure_accuracy(model, test_loader)})
        clock.start()
    return {"precision": "fp32", "evaluations": evaluations}


def _make_loaders(settings: Row, folder: Path, workers: int, augmentation: Any = None) -> tuple[Any, Any]:
    stock.write_files(folder)
    train_loader = stock.make_loader(
        folder, train=True, batch_size=settings["batch_size"], workers=workers, augmentation=augmentation, size=settings["train_size"]
    )
    return train_loader, stock.make_loader(folder, train=False, batch_size=500, workers=workers, size=settings["test_size"])


def train_example(file: Path, settings: Row, seed: int, folder: Path) -> Row:
    """Run the program `file`, with a clock around its `train` and an exact count for its `test`. What it took and reached.

    Raises `UserError` if it is another program.
    """
    program: Any = ModuleType("example")
    SourceFileLoader(program.__name__, str(file)).exec_module(program)
    if not all(hasattr(program, name) for name in ("train", "test", "main")):
        raise UserError(f"--example {file} has no train, test and main; expected mnist/main.py of github.com/pytorch/examples")
    clock, train = Clock(), program.train
    evaluations: list[Row] = []

    def cut(loader: Any, size: int | None) -> Any:
        return loader if size is None else DataLoader(Subset(loader.dataset, range(size)), batch_size=loader.batch_size)

    def train_timed(arguments: Any, model: Any, device: Any, loader: Any, *rest: Any) -> None:
        loader = cut(loader, settings["train_size"])
        clock.start()
        train(arguments, model, device, loader, *rest)
        clock.stop()

    def evaluate(model: Any, _: Any, loader: Any) -> None:
        accuracy = stock.measure_accuracy(model, cut(loader, settings["test_size"]))
        evaluations.append({"epoch": len(evaluations) + 1, "time_s": clock.stop(), "accuracy": accuracy})

    program.train, program.test = train_timed, evaluate
    stock.write_files(folder / "data")  # where it looks for MNIST before it would fetch it: ../data
    (folder / "program").mkdir()
    sys.argv = ["main.py", "--seed", str(seed), "--epochs", str(settings["epochs"])]
    with contextlib.chdir(folder / "program"):
        program.main()
    return {"precision": "fp32", "evaluations": evaluations}


def train_lightning(settings: Row, seed: int, folder: Path, workers: int) -> Row:
    """Train the CNN as a user of Lightning would, until the last mark is reached. What it took and reached."""
    try:
        import lightning
    except ImportError as error:
        raise UserError("the entry lightning needs its package: pip install lightning, or leave it out by --entries") from error

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = CNN()

        def training_step(self, batch: Any, _: int) -> Any:
            images, labels = batch
            loss = F.cross_entropy(self.model(images), labels)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, _: int) -> None:
            images, labels = batch
            self.log("accuracy", (self.model(images).argmax(dim=1) == labels).float().mean(), batch_size=len(labels))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    class Watch(lightning.Callback):  # type: ignore[misc]
        def on_train_start(self, *_: Any) -> None:
            clock.start()

        def on_validation_start(self, trainer: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                times_s.append(clock.stop())

        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                # Lightning has counted the epoch only after this.
                accuracy = float(trainer.callback_metrics["accuracy"])
                evaluations.append({"epoch": trainer.current_epoch + 1, "time_s": times_s[-1], "accuracy": accuracy})
                trainer.should_stop = accuracy >= _MARKS[-1]
                clock.start()

    train_loader, test_loader = _make_loaders(settings, folder, workers)
    clock = Clock()
    times_s: list[float] = []
    evaluations: list[Row] = []
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    lightning.seed_everything(seed, verbose=False)
    trainer = lightning.Trainer(max_epochs=settings["epochs"], default_root_dir=str(folder), callbacks=[Watch()])
    trainer.fit(Classifier(), train_loader, test_loader)
    return {"precision": "fp32", "evaluations": evaluations}


def train_entry(entry: str, options: argparse.Namespace, seed: int, way: Row) -> Row:
    """One row: train an entry with a seed in this process, with the workers and threads of `way`."""
    clock, threads, settings = Clock(), torch.get_num_threads(), describe_settings(entry, options)
    products = [common.measure_products(clock.device)]
    torch.set_num_threads(way["threads"])
    with common.temporary_folder() as folder:
        if entry == "ours":
            trained = train_ours(options, seed, folder)
        elif entry == "lightning":
            trained = train_lightning(settings, seed, folder, way["workers"])
        elif entry == "example":
            trained = train_example(options.example, settings, seed, folder)
        else:
            trained = train_course(settings, seed, folder, way["workers"])
    torch.set_num_threads(threads)
    products.append(common.measure_products(clock.device))
    return {
        "benchmark": "time_to_accuracy",
        "entry": entry,
        "seed": seed,
        "settings": settings,
        **trained,
        **way,
        "products": products,
        "machine": common.describe_machine(),
        **common.describe_origin(),
    }


def find_time(row: Row, mark: float) -> float:
    """Seconds of training until the first evaluation that reached `mark` (fraction); infinity if none did."""
    return next((evaluation["time_s"] for evaluation in row["evaluations"] if evaluation["accuracy"] >= mark), math.inf)


def _identify(row: Row) -> Row:
    """What makes a row needless to measure again."""
    return {"entry": row["entry"], "seed": row["seed"], "settings": row["settings"], "machine": common.identify_machine(row)}


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Train each entry with each seed that the results file lacks, each in a process of its own; the number of failures."""
    wanted = {entry: {"settings": describe_settings(entry, options), "machine": common.describe_machine()} for entry in options.entries}
    rows = common.read_rows(options.results)
    done = [_identify(row) for row in rows]
    ways: dict[str, Row] = {}
    failures = 0
    for seed, entry in itertools.product(options.seeds, options.entries):
        row = {"entry": entry, "seed": seed, **wanted[entry]}
        if _identify(row) in done:
            common.tell(f"{entry}, seed {seed}: is in the results")
            continue
        try:
            if entry not in ways:
                ways[entry] = _choose_way(row, rows, arguments)
            _start([*arguments, "--only", entry, str(seed), json.dumps(ways[entry])])
        except RunError as error:
            failures += 1
            common.tell(f"{entry}, seed {seed}: {error}")
            continue
        last = common.read_rows(options.results)[-1]["evaluations"][-1]
        common.tell(f"{entry}, seed {seed}: {last['accuracy']:.2%} after {last['epoch']:g} epochs, {last['time_s']:,.1f} s")
    return failures


def _start(arguments: Sequence[str]) -> None:
    """Run this program for one entry and seed. Raises `RunError` if it fails."""
    lifeline, kept = os.pipe()
    try:
        # The child prints much, and what it says last tells why it failed.
        command = [sys.executable, "-m", "benchmarks.time_to_accuracy", *arguments]
        child = subprocess.run(command, stdin=lifeline, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    finally:
        os.close(lifeline)
        os.close(kept)
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"failed with status {child.returncode}: {reason}")


def _choose_way(row: Row, rows: Sequence[Row], arguments: Sequence[str]) -> Row:
    """The numbers of loader workers and of threads of an entry: the loop's own, or those of the same peer's earlier rows, or the best."""
    if row["entry"] == "ours":
        return {"workers": 0, "threads": count_usable_cores(), "tried": []}
    for old in reversed(rows):
        if _identify({**old, "seed": row["seed"]}) == _identify(row):
            return {name: old[name] for name in ("workers", "threads", "tried")}
    return _find_best(row["entry"], arguments)


def _find_best(entry: str, arguments: Sequence[str]) -> Row:
    """The numbers of loader workers and of threads with which a peer is quickest here, and the seconds of all that were tried."""
    cores = count_usable_cores()
    tried: list[Row] = []
    numbers = [0] if entry == "example" else sorted({0, 1, cores})  # the example chooses its workers by itself
    for workers, threads in itertools.product(numbers, sorted({1, cores})):
        way = {"workers": workers, "threads": threads}
        with common.temporary_folder() as folder:
            file = folder / "trial.jsonl"
            short = ["--results", str(file), "--epochs", "1", "--train_size", str(_TRIAL_IMAGES), "--test_size", "500"]
            _start([*arguments, *short, "--only", entry, "0", json.dumps(way)])
            tried.append({**way, "time_s": common.read_rows(file)[-1]["evaluations"][-1]["time_s"]})
    best = min(tried, key=lambda way: way["time_s"])
    common.tell(f"{entry}: quickest with {best['workers']} workers and {best['threads']} threads")
    return {"workers": best["workers"], "threads": best["threads"], "tried": tried}


def format_rows(rows: Sequence[Row]) -> str:
    """The tables of the rows of one machine, as markdown."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_name(row), []).append(row)
    ours = next((group for group in groups.values() if group[0]["entry"] == "ours"), None)
    header = ["entry", "seeds", "last accuracy", "its time, s"]
    for mark in _MARKS:
        header += [f"to {mark:.1%}, s", "reached", "times ours"]
    lines = []
    for name, group in groups.items():
        accuracies = [row["evaluations"][-1]["accuracy"] for row in group]
        line = [name, str(len(group)), f"{statistics.median(accuracies):.2%}", f"{_median_end(group):,.0f}"]
        for mark in _MARKS:
            line += _describe_mark(group, ours, mark)
        lines.append(line)
    text = [f"{common.describe_rows(rows)};\n{_describe_rates(rows)}", common.format_table(header, lines)]
    return "\n\n".join(text + _compare_ends(groups, ours))


def _name(row: Row) -> str:
    """The entry, and what its rows have in common."""
    if row["entry"] == "ours":
        return f"{_NAMES['ours']}, recipe {common.name_settings(row['settings'])}, {row['precision']}"
    workers = row["settings"].get("workers", row.get("workers"))  # older rows had them among the settings
    return f"{_name_peer(row)}, {row['precision']}, {workers} workers, {row['threads']} threads"


def _name_peer(row: Row) -> str:
    # Older rows of the example are of a program that was written after its description.
    return _NAMES[row["entry"]] + (" (rewritten)" if row["entry"] == "example" and "sha256" not in row["settings"] else "")


def _describe_rates(rows: Sequence[Row]) -> str:
    return common.describe_products([{"products": products} for row in rows for products in row["products"]])


def _describe_mark(group: Sequence[Row], ours: Sequence[Row] | None, mark: float) -> list[str]:
    times_s = [find_time(row, mark) for row in group]
    reached = [time_s for time_s in times_s if time_s < math.inf]
    median_s = statistics.median(times_s)
    spread = f" ({min(reached):,.1f} - {max(reached):,.1f})" if reached else ""
    our_median_s = statistics.median(find_time(row, mark) for row in ours) if ours else math.inf
    ratio = f"{median_s / our_median_s:.1f}" if max(median_s, our_median_s) < math.inf else "-"
    return [f"{median_s:,.1f}{spread}" if median_s < math.inf else f"not reached{spread}", f"{len(reached)} of {len(group)}", ratio]


def _median_end(group: Sequence[Row]) -> float:
    return statistics.median(row["evaluations"][-1]["time_s"] for row in group)


def _compare_ends(groups: dict[str, list[Row]], ours: Sequence[Row] | None) -> list[str]:
    """How much sooner the loop is where the course's recipe ends, and where the example ends."""
    lines = []
    for group in groups.values():
        if not ours or group[0]["entry"] not in ("course", "example"):
            continue
        final = statistics.median(row["evaluations"][-1]["accuracy"] for row in group)
        there_s = statistics.median(find_time(row, row["evaluations"][-1]["accuracy"]) for row in group)
        marks = {
            f"{_MARKS[-1]:.1%}": (_MARKS[-1], _median_end(group), "ends"),
            f"{final:.2%}": (final, there_s, "has the accuracy that it ends with"),
        }
        for shown, (mark, their_s, event) in marks.items():
            our_s = statistics.median(find_time(row, mark) for row in ours)
            theirs = f"{_name_peer(group[0])} {event} ({their_s:,.1f} s)"
            reaches = f"reaches {shown} in {our_s:,.1f} s, {their_s / our_s:.1f} times sooner than"
            lines.append(f"- The loop {reaches if our_s < math.inf else f'does not reach {shown};'} {theirs}.")
    return ["\n".join(lines)] if lines else []


def make_parser() -> argparse.ArgumentParser:
    """The options of the program."""
    parser = common.make_parser("time_to_accuracy", "Time to 99.0 % and 99.4 % test accuracy. Takes hours; the same command goes on.")
    parser.add_argument("--entries", nargs="+", choices=list(_NAMES), default=list(_NAMES), help="what is measured")
    parser.add_argument("--seeds", type=common.whole, nargs="+", default=[0, 1, 2], help="seeds of each entry")
    parser.add_argument("--config", default="fast", help="recipe of the loop")
    parser.add_argument("--evaluations", type=common.positive, default=8, help="evaluations of the loop in each epoch; the others have one")
    parser.add_argument("--example", type=Path, metavar="FILE", help="mnist/main.py of github.com/pytorch/examples: this code is run")
    parser.add_argument("--epochs", type=common.positive, help="epochs of every entry; None: each recipe's own")
    parser.add_argument("--train_size", type=common.positive, help="use only the first N training images; None: all")
    parser.add_argument("--test_size", type=common.positive, help="use only the first N test images; None: all")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)  # how the program starts itself: entry, seed, way
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(arguments)
    if options.only:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        entry, seed, way = options.only
        common.append_row(options.results, train_entry(entry, options, int(seed), json.loads(way)))
        return 0
    failures = 0 if options.table else measure(options, arguments)
    # By the name in the table: older rows have other settings for the same entry, and a seed must not count twice.
    newest = common.newest_of_each(common.find_rows(options.results), lambda row: [_name(row), row["seed"], common.identify_machine(row)])
    print("\n\n".join(map(format_rows, common.group_rows(newest, common.identify_machine))))
    if failures:
        raise RunError(f"{failures} of {len(options.entries) * len(options.seeds)} failed; the same command tries them again")
    return 0


def _end_with_parent() -> None:
    """End when the other end of the pipe at standard input closes: a child left behind would disturb what is measured next."""
    os.read(0, 1)
    os._exit(RunError.exit_code)


if __name__ == "__main__":
    sys.exit(run_program(main))
