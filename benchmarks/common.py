"""What the benchmarks share: facts of the machine, its matrix-product rate, the real loop with turns in it, result rows, tables."""

import argparse
import contextlib
import datetime
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from mnist_dist.config import Config, read_recipe, resolve_config
from mnist_dist.errors import UserError
from mnist_dist.loop import Turns, train
from mnist_dist.machine import find_processor, has_native_bfloat16
from mnist_dist.model import build_model
from mnist_dist.optimization import build_optimizer
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.world import count_usable_cores

Row = dict[str, Any]
Step = Callable[[], None]

ROOT = Path(__file__).resolve().parents[1]
# Floating-point operations of one training step of the CNN, for one image: forward, and backward without the gradient of the input.
TRAINING_FLOP = 223.2e6
_STILL = 1e-15  # a learning rate that changes no weight: the option must be above zero


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has: where the results are, and --table."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Path(os.path.relpath(ROOT / "benchmarks" / "results" / f"{name}.jsonl"))
    parser.add_argument("--results", type=Path, default=default, metavar="FILE", help="JSON lines: rows are appended and read here")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the tables of the results file as markdown")
    return parser


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def whole(text: str) -> int:
    """A whole number, zero allowed, for argparse."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, zero or above")
    return int(text)


def name_recipe(config: str) -> str:
    """The name of a recipe for a row of results: without the folder of a file."""
    return Path(config).stem


def describe_machine() -> Row:
    """Facts that belong beside every number. No host name and no path."""
    facts: Row = {
        "cpu": find_processor(),
        "cores": count_usable_cores(),
        "bfloat16": has_native_bfloat16(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return facts


def describe_recipe(config: Config) -> Row:
    """The options that decide what is trained, but for the seed, and for the task: it is the built-in one."""
    return {name: value for name, value in config.recipe().items() if name not in ("seed", "task")}


def name_settings(settings: Row) -> str:
    """The recipe's name, with what differs from the recipe of that name as it is now; or the default one's, where less differs from it."""

    def list_differing(recipe: str) -> list[str]:
        now = describe_recipe(resolve_config({}, read_recipe(recipe)))
        unsaid = {"holdout", "epochs" if settings["recipe"]["steps"] else "steps"}  # steps override epochs
        return [f"{key}={value}" for key, value in settings["recipe"].items() if now.get(key) != value and key not in unsaid]

    from_default = list_differing("mnist")
    try:
        differing = list_differing(settings["config"])
    except UserError:  # a file of one's own
        return " ".join([settings["config"], *from_default])
    return " ".join(["mnist", *from_default] if len(from_default) < len(differing) else [settings["config"], *differing])


def find_mnist(config: Config) -> Mnist:
    """The built-in task with its options. Raises `UserError` for the config of another one."""
    if not isinstance(config.task, Mnist):
        raise UserError(f"task is {config.task.name}; the benchmarks measure the built-in one: leave task out")
    return config.task


def describe_origin() -> Row:
    """When, and with which code, a row was measured."""
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": _read_commit()}


def _read_commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # New results do not make the code another one.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def wait_for_device(device: torch.device) -> None:
    """Let the work given to `device` end, so that the clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_products(device: torch.device, budget_s: float = 0.3) -> Row:
    """FLOP/s of a product of two square matrices in float32 and bfloat16: what this machine could do at this moment."""
    size = 8192 if device.type == "cuda" else 2048
    # Without units for it, bfloat16 is emulated, hundreds of times slower: a small product tells as much.
    bf16_size = size if device.type == "cuda" or has_native_bfloat16() else 256
    return {
        "fp32": _measure_product(torch.float32, device, size, budget_s),
        "bf16": _measure_product(torch.bfloat16, device, bf16_size, budget_s),
    }


def _measure_product(dtype: torch.dtype, device: torch.device, size: int, budget_s: float) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = left @ right
    wait_for_device(device)
    best_s, spent_s = math.inf, 0.0
    while spent_s < budget_s:
        start = time.perf_counter()
        torch.matmul(left, right, out=out)
        wait_for_device(device)
        elapsed_s = time.perf_counter() - start
        best_s, spent_s = min(best_s, elapsed_s), spent_s + elapsed_s
    return 2 * size**3 / best_s


def name_precision(accelerator: Accelerator) -> str:
    """What the loop computes in: fp32 or bf16."""
    return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"


def build_still_optimizer(parameters: Iterable[nn.Parameter], config: Config, accelerator: Accelerator) -> torch.optim.Optimizer:
    """The loop's optimizer at a rate that changes no weight.

    A model that learned a fixed batch by heart would come to numbers below the normal range, and a CPU takes twice as long for these.
    """
    return build_optimizer(parameters, config.replace(learning_rate=_STILL), name_precision(accelerator))


def make_step(model: nn.Module, config: Config, accelerator: Accelerator, batch_size: int) -> Step:
    """Forward, backward and optimizer step of `model` on one fixed batch, in the precision of the loop."""
    optimizer = build_still_optimizer(model.parameters(), config, accelerator)
    label_smoothing = find_mnist(config).label_smoothing
    images = torch.randn(batch_size, 1, 28, 28, device=accelerator.device)
    labels = torch.arange(batch_size, device=accelerator.device) % 10

    def step() -> None:
        with accelerator.autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def make_model(accelerator: Accelerator) -> nn.Module:
    """The CNN in the layout of the loop, on the device."""
    return build_model(Mnist(), 0).to(accelerator.device)


def run_loop(config: Config, turns: Turns) -> None:
    """Run the real training loop with `turns` between it and its loader; of what it logs, only warnings are shown.

    `turns` gets the loop's batches and its state, hands the batches on, and may measure something else in between. The loop asks
    for a batch when all of the step before is done, and after the last step for one that need not come.
    """
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        train(config, turns=turns)
    finally:
        logging.disable(before)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that goes when it is no longer needed."""
    with tempfile.TemporaryDirectory(prefix="benchmark", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def append_row(path: Path, row: Row) -> None:
    """Add a row to a results file. Raises `UserError` where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"results {path} cannot be written: {error.strerror}") from error


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; none if there is no such file. Raises `UserError` for a damaged one."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"results {path} cannot be read: {error.strerror}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"line {number} of {path} is not JSON: correct or remove it") from error
    return rows


def find_rows(path: Path) -> list[Row]:
    """As `read_rows`, but raises `UserError` if there is none."""
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} holds no results yet: run the benchmark without --table first")
    return rows


def identify_machine(row: Row) -> Row:
    """What makes a machine another one, of the facts in a row."""
    return {name: row["machine"][name] for name in ("cpu", "cores", "gpu", "bfloat16")}


def group_rows(rows: Sequence[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    """The rows with the same key together, in the order of the keys' first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(key(row), sort_keys=True), []).append(row)
    return list(groups.values())


def newest_of_each(rows: Sequence[Row], key: Callable[[Row], Any]) -> list[Row]:
    """The last of the rows with the same key, in the order of the keys' first appearance."""
    return [group[-1] for group in group_rows(rows, key)]


def describe_rows(rows: Sequence[Row]) -> str:
    """One line: the machine of some rows, and each precision, commit and date that they have."""
    machine = rows[-1]["machine"]
    where = f"{machine['gpu']}, " if machine["gpu"] else ""
    where += f"{machine['cpu']}, {machine['cores']} cores"
    words = [where, f"torch {machine['torch']}"]
    precisions = dict.fromkeys(row["precision"] for row in rows if "precision" in row)
    if precisions:
        words.append(f"precision {' and '.join(precisions)}")
    commits = dict.fromkeys(row["commit"] for row in rows)
    words.append(f"commit{'s' * (len(commits) > 1)} {' '.join(commits)}")
    days = sorted({row["date"][:10] for row in rows})
    return ", ".join([*words, " to ".join(dict.fromkeys([days[0], days[-1]]))])


def describe_products(rounds: Sequence[Row]) -> str:
    """One line: the matrix-product rates measured in the rounds, as median (lowest - highest)."""
    words = []
    for name in ("fp32", "bf16"):
        rates = [round_["products"][name] / 1e9 for round_ in rounds]
        words.append(f"{name} {statistics.median(rates):,.0f} ({min(rates):,.0f} - {max(rates):,.0f})")
    return f"matrix products, GFLOP/s: {', '.join(words)}"


def compare(above: Sequence[float], below: Sequence[float]) -> str:
    """The ratio of the medians, and the lowest and highest ratio of two values of the same round."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(above) / statistics.median(below):.2f} ({min(pairs):.2f} - {max(pairs):.2f})"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns stand under each other; the first column is text, the others are numbers."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def write(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(line, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "|".join(("-" * (width + 1) + ":") if column else "-" * (width + 2) for column, width in enumerate(widths))
    return "\n".join([write(header), f"|{rule}|", *map(write, rows)])


def measure_or_show(options: argparse.Namespace, measure: Callable[[], Row], format_row: Callable[[Row], str]) -> int:
    """Measure a row, keep it and print its tables; with --table, those of the newest row of each machine and settings. The exit status."""
    if options.table:
        rows = newest_of_each(
            find_rows(options.results),
            lambda row: [row["machine"]["cpu"], row["machine"]["gpu"], row.get("precision"), row["settings"]],
        )
        print("\n\n".join(map(format_row, rows)))
    else:
        row = measure()
        append_row(options.results, row)
        print(format_row(row))
    return 0


def tell(text: str) -> None:
    """A line about the progress of a benchmark, on standard error."""
    print(text, file=sys.stderr, flush=True)
