"""Accuracy of recipes over seeds: mean, standard deviation, minimum, and a 95 % interval of the mean.

`python -m benchmarks.accuracy --configs fast mnist`; how to read it: benchmarks/README.md. Options after `--` go to the training, as in
`-- --holdout 10000 --learning_rate 0.002`. Each recipe and seed is a run of its own and a row of the results file; the same command goes on
where it was stopped.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import Row
from mnist_dist.config import Config, read_recipe, resolve_config
from mnist_dist.errors import RunError
from mnist_dist.machine import choose_precision
from mnist_dist.options import Parser
from mnist_dist.program import run_program
from mnist_dist.record import read_result
from mnist_dist.tasks.mnist import SIZES, Mnist

# Student's t for 95 %, by degrees of freedom from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def make_config(recipe: str, training: Sequence[str]) -> Config:
    """The config of a recipe with the options of the training over it. Raises `UserError`."""
    parser = Parser("benchmarks.accuracy ... --", "Options of the training.")
    parser.add_options(Config)
    parser.add_options(Mnist)
    config = resolve_config(parser.parse(training), read_recipe(recipe))
    common.find_mnist(config)
    return config


def train(settings: Row, config: Config) -> Row:
    """Train in a process of its own; the row. Raises `RunError` if it fails."""
    with common.temporary_folder() as folder:
        file, run_dir = folder / "config.yaml", folder / "run"
        file.write_text(config.replace(run_dir=str(run_dir), report=False, wandb="disabled").to_yaml())
        # Its progress stays on the screen, out of the way of the table.
        status = subprocess.run([sys.executable, "-m", "mnist_dist.train", "--config", str(file)], stdout=2, check=False).returncode
        result = read_result(run_dir, config)
        if status or result is None:
            raise RunError(f"{settings['config']}, seed {config.seed}: the training ended with status {status} and left no result")
    names = [f"{config.evaluated_split}/{name}" for name in ("accuracy", "errors", "images", "loss")]
    names += ["step", "elapsed_s", "world_size", "precision", "threads"]
    return {
        "benchmark": "accuracy",
        "seed": config.seed,
        "settings": settings,
        **{name: result[name] for name in names},
        "machine": common.describe_machine(),
        **common.describe_origin(),
    }


def _identify(row: Row) -> Row:
    """What makes a row needless to measure again."""
    named = {name: row[name] for name in ("seed", "settings", "precision")}
    return {**named, "machine": common.identify_machine(row)}


def measure(options: argparse.Namespace, training: Sequence[str]) -> None:
    """Train what the results file lacks."""
    machine = common.describe_machine()
    done = [_identify(row) for row in common.read_rows(options.results)]
    for recipe in options.configs:
        config = make_config(recipe, training)
        settings = {"config": common.name_recipe(recipe), "recipe": common.describe_recipe(config)}
        device = "cuda" if machine["gpu"] and config.device != "cpu" else "cpu"
        wanted = {"settings": settings, "precision": choose_precision(config, device), "machine": machine}
        for seed in options.seeds:
            if _identify({"seed": seed, **wanted}) in done:
                common.tell(f"{settings['config']}, seed {seed}: is in the results")
            else:
                common.append_row(options.results, train(settings, config.replace(seed=seed)))


def format_rows(rows: Sequence[Row]) -> str:
    """The table of the rows of one machine, as markdown; recipes in the order of their means."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(common.name_settings(row["settings"]), []).append(row)
    ranked = sorted(groups.items(), key=lambda item: -statistics.mean(_find_value(row, "accuracy") for row in item[1]))
    header = ["recipe", "epochs", "images", "seeds", "mean %", "sd", "95 % interval", "lowest %", "time, s"]
    lines = [[name, *_describe_group(group)] for name, group in ranked]
    return f"{common.describe_rows(rows)}\n\n{common.format_table(header, lines)}"


def _find_value(row: Row, name: str) -> Any:
    """What was measured on the images that the run was evaluated on; rows by older versions call held-out ones `test/`, too."""
    return row.get(f"holdout/{name}", row.get(f"test/{name}"))


def _describe_group(group: Sequence[Row]) -> list[str]:
    accuracies = [100 * _find_value(row, "accuracy") for row in group]
    recipe = group[0]["settings"]["recipe"]
    mean, spread = statistics.mean(accuracies), ["-", "-"]
    if len(group) > 1:
        deviation = statistics.stdev(accuracies)
        quantile = _T[len(group) - 2] if len(group) - 2 < len(_T) else 1.96
        half = quantile * deviation / len(group) ** 0.5
        spread = [f"{deviation:.3f}", f"{mean - half:.3f} - {mean + half:.3f}"]
    where = f"{_find_value(group[0], 'images'):,} {'held out' if recipe['holdout'] else 'test'}"
    trained = (recipe["train_size"] or SIZES[recipe["dataset"]][0]) - recipe["holdout"]
    epochs = f"{recipe['steps'] * recipe['batch_size'] / trained:.2g}" if recipe["steps"] else str(recipe["epochs"])
    elapsed_s = statistics.median(row["elapsed_s"] for row in group)
    return [epochs, where, str(len(group)), f"{mean:.3f}", *spread, f"{min(accuracies):.2f}", f"{elapsed_s:,.0f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = common.make_parser("accuracy", "Accuracy of recipes over seeds. Options after -- go to the training.")
    parser.add_argument("--configs", nargs="+", default=["mnist"], help="recipes: names or files")
    parser.add_argument("--seeds", type=common.whole, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of each recipe")
    options = parser.parse_args(arguments[:split])
    if not options.table:
        measure(options, arguments[split + 1 :])
    newest = common.newest_of_each(common.find_rows(options.results), _identify)
    tables = common.group_rows(
        newest, lambda row: [common.identify_machine(row), row["precision"], bool(row["settings"]["recipe"]["holdout"])]
    )
    print("\n\n".join(map(format_rows, tables)))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
