"""Is this checkout as fast as another one? `python -m benchmarks.commits --beside DIR`, for example of `git worktree add DIR COMMIT`.

Both train the same recipe in processes of their own, in turn. What counts are the rows of their record, without the first one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.common import ROOT, Row
from mnist_dist.errors import RunError, UserError
from mnist_dist.program import run_program

_LOG_EVERY = 50


def train(checkout: Path, config: str, steps: int) -> float:
    """Images per second of a training of `checkout`: the median of its rows. Raises `RunError`."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "config": config,
            "steps": steps,
            "run_dir": f"{folder}/run",
            "log_every": _LOG_EVERY,
            "report": "false",
            "wandb": "disabled",
        }
        options |= {"test_size": 100, "evaluate_every": 0, "checkpoint_every": 0}
        command = [
            sys.executable,
            "-m",
            "mnist_dist.train",
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        ]
        environ = {**os.environ, "PYTHONPATH": str(checkout)}
        done = subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"the training of {checkout} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    return statistics.median([row["train/images_per_s"] for row in rows if "train/images_per_s" in row][1:])


def measure(options: argparse.Namespace) -> Row:
    """One row of results."""
    other = options.beside
    if other is None or not (other / "mnist_dist/train.py").is_file():
        raise UserError(f"beside is {other}; expected the folder of another checkout")
    if options.steps < 2 * _LOG_EVERY:
        raise UserError(f"steps is {options.steps}; expected at least {2 * _LOG_EVERY}: the first {_LOG_EVERY} do not count")
    checkouts = {"this": ROOT, "other": other.resolve()}
    rounds: list[Row] = []
    for number in range(options.rounds):
        rounds.append({name: train(checkouts[name], options.config, options.steps) for name in sorted(checkouts, reverse=number % 2 == 1)})
        common.tell(f"round {number + 1}: {rounds[-1]['this'] / rounds[-1]['other']:.3f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=other, capture_output=True, text=True).stdout.strip()
    settings = {
        "config": common.name_recipe(options.config),
        "rounds": options.rounds,
        "steps": options.steps,
        "other": commit or "unknown",
    }
    return {
        "benchmark": "commits",
        "settings": settings,
        "rounds": rounds,
        "machine": common.describe_machine(),
        **common.describe_origin(),
    }


def format_row(row: Row) -> str:
    """The table of a row."""
    rates = {name: statistics.median(one[name] for one in row["rounds"]) for name in ("other", "this")}
    ratio = common.compare([1 / one["other"] for one in row["rounds"]], [1 / one["this"] for one in row["rounds"]])
    line = [row["settings"]["config"], row["settings"]["other"], f"{rates['other']:,.0f}", f"{rates['this']:,.0f}", ratio]
    header = ["recipe", "other commit", "it, images/s", "this one", "ratio"]
    return f"{common.describe_rows([row])}\n\n{common.format_table(header, [line])}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    parser = common.make_parser("commits", "Images per second of the training in this checkout, beside another one.")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="the other checkout")
    parser.add_argument("--config", default="configs/mnist.yaml", help="recipe of the training")
    parser.add_argument("--rounds", type=common.positive, default=9, help="rounds of one training each")
    parser.add_argument("--steps", type=common.positive, default=600, help="steps of a training")
    options = parser.parse_args(arguments)
    return common.measure_or_show(options, lambda: measure(options), format_row)


if __name__ == "__main__":
    sys.exit(run_program(main))
