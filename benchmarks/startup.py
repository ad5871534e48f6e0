"""From command to first step, by part; and what the imports cost.

`python -m benchmarks.startup`; how to read it: benchmarks/README.md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import torch

from benchmarks import common
from benchmarks.common import Row
from mnist_dist.config import find_config_file
from mnist_dist.errors import RunError
from mnist_dist.program import run_program

_LAUNCHERS = {
    "python -m": ["-m"],
    "accelerate launch -m": ["-m", "accelerate.commands.launch", "-m"],
}
_SHOWN_IMPORTS = 15


def measure_start(launcher: str, config: str, wandb: str) -> Row:
    """Start the training once, for two steps; the seconds of each part. Raises `RunError` if it fails."""
    with common.temporary_folder() as folder:
        answer = folder / "answer.json"
        program = ["benchmarks.startup_probe", "--config", config, "--run_dir", str(folder / "run"), "--wandb", wandb]
        program += ["--steps", "2", "--test_size", "10", "--report", "false"]
        environ = dict(os.environ) | {"BENCHMARK_ANSWER": str(answer), "PYTHONPATH": str(common.ROOT)}
        environ["BENCHMARK_COMMAND_S"] = repr(time.monotonic())
        command = [sys.executable, *_LAUNCHERS[launcher], *program]
        child = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, errors="replace")
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RunError(f"the training under {launcher} failed with status {child.returncode}: {reason}")
        row: Row = json.loads(answer.read_text())
        return row


def measure_imports(config: str) -> list[tuple[str, float, float]]:
    """Each module that the training program imports until its first steps are done: name, seconds alone, seconds with all it brings.

    Not all are import statements of its own: torch imports more when it is first used. Raises `RunError`.
    """
    with common.temporary_folder() as folder:
        command = [sys.executable, "-X", "importtime", "-m", "mnist_dist.train", "--config", config, "--run_dir", str(folder / "run")]
        command += ["--steps", "2", "--test_size", "10", "--report", "false", "--wandb", "disabled"]
        child = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, errors="replace")
    if child.returncode:
        raise RunError(f"the training failed with status {child.returncode}: {child.stderr.strip().splitlines()[-1]}")
    pattern = re.compile(r"^import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)$", re.MULTILINE)
    return [(name, int(alone) / 1e6, int(all_) / 1e6) for alone, all_, name in pattern.findall(child.stderr)]


def sum_by_package(imports: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """Seconds of each package's own modules, without those that they import from others; the slowest first."""
    sums: dict[str, float] = defaultdict(float)
    for name, alone_s, _ in imports:
        sums[name.partition(".")[0]] += alone_s
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def measure(options: argparse.Namespace) -> Row:
    """One row of results."""
    config = str(find_config_file(options.config).resolve())
    measure_start("python -m", config, "disabled")  # the first start reads the files from the disk
    rounds: list[Row] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for number in range(options.rounds):
        round_: Row = {"products": common.measure_products(device), "starts": {}}
        for launcher in _LAUNCHERS:
            round_["starts"][launcher] = measure_start(launcher, config, options.wandb)
        imports = measure_imports(config)
        round_["packages_s"] = dict(list(sum_by_package(imports).items())[: 2 * _SHOWN_IMPORTS])
        slowest = sorted(imports, key=lambda entry: -entry[2])[: 4 * _SHOWN_IMPORTS]
        round_["modules_s"] = {name: all_s for name, _, all_s in slowest}
        rounds.append(round_)
        totals = ", ".join(f"{launcher} {start['total_s']:.1f} s" for launcher, start in round_["starts"].items())
        common.tell(f"round {number + 1} of {options.rounds}: {totals}")
    return {
        "benchmark": "startup",
        "settings": {"config": common.name_recipe(options.config), "wandb": options.wandb},
        "rounds": rounds,
        "machine": common.describe_machine(),
        **common.describe_origin(),
    }


def format_row(row: Row) -> str:
    """The tables of a row, as markdown."""
    rounds = row["rounds"]
    parts = list(dict.fromkeys(part for round_ in rounds for start in round_["starts"].values() for part in start["parts_s"]))
    lines = [[part, *(_describe([_part_s(round_, launcher, part) for round_ in rounds]) for launcher in _LAUNCHERS)] for part in parts]
    for name, key in (
        ("command to first step, in all", "total_s"),
        ("W&B's process ready, in the background", "wandb_ready_s"),
        ("processor time of W&B's process", "wandb_cpu_s"),
    ):
        lines.append([name, *(_describe([round_["starts"][launcher][key] for round_ in rounds]) for launcher in _LAUNCHERS)])
    packages = _format_imports("imports of the training: package, its own modules", [round_["packages_s"] for round_ in rounds])
    modules = _format_imports("imports of the training: module, with all it brings", [round_["modules_s"] for round_ in rounds])
    head = f"{common.describe_rows([row])}, recipe {row['settings']['config']}, {len(rounds)} rounds;\n{common.describe_products(rounds)}"
    return "\n\n".join([head, common.format_table(["part, seconds", *_LAUNCHERS], lines), packages, modules])


def _part_s(round_: Row, launcher: str, part: str) -> float:
    return float(round_["starts"][launcher]["parts_s"].get(part, 0.0))


def _describe(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def _format_imports(title: str, rounds: Sequence[dict[str, float]]) -> str:
    names = [name for name in rounds[0] if all(name in round_ for round_ in rounds)]
    medians = {name: statistics.median(round_[name] for round_ in rounds) for name in names}
    slowest = sorted(medians, key=lambda name: -medians[name])[:_SHOWN_IMPORTS]
    return common.format_table([title, "ms"], [[name, f"{medians[name] * 1e3:.0f}"] for name in slowest])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    parser = common.make_parser("startup", "From command to first step, by part, and what the imports cost.")
    parser.add_argument("--config", default="mnist", help="recipe")
    parser.add_argument("--rounds", type=common.positive, default=7, help="alternations")
    parser.add_argument("--wandb", choices=("offline", "disabled"), default="offline", help="the mirror of the runs")
    options = parser.parse_args(arguments)
    return common.measure_or_show(options, lambda: measure(options), format_row)


if __name__ == "__main__":
    sys.exit(run_program(main))
