"""The program `python -m launch.sweep`: one run for each combination of options, as one job array, and the table of what came of them.

    python -m launch.sweep configs/sweep.yaml --parallel 4
    python -m launch.sweep --config smoke lr=0.05,0.1 seed=0,1,2

The same command again submits only what is neither finished nor queued. Imports no torch.
"""

if __name__ == "__main__":
    from mnist_dist.program import end_on_interrupt

    end_on_interrupt()


import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launch import cluster
from launch.jobs import make_table
from launch.request import Request, place_config
from launch.runs import RunState, read_state
from launch.submission import make_slurm_executor, run_locally, submit_to_slurm, write_script
from launch.submit import collect_mistakes, compare_with_cluster, read_request, say
from mnist_dist.config import Config, add_config_options, read_recipe, resolve_config
from mnist_dist.errors import RunError, UserError
from mnist_dist.options import Options, Parser, find_by_initials, make_options, option, path_argument, read_options_file
from mnist_dist.program import print_answer
from mnist_dist.record import check_folder

_RUNS_MAX = 1000  # Slurm's own limit for an array is 1001, unless its site raised it
_FIXED_OPTIONS = ("run_dir", "data_dir", "world_size")  # each run has its own, or all have one


class Sweep(Options):
    """How the runs of a sweep are queued."""

    parallel: int | None = option("The sweep", None, "runs at a time; none: as many as there is room for, locally one", ge=1, le=_RUNS_MAX)
    table: bool = option("The sweep", False, "print the table of results and queue nothing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 submitted, or nothing left to do, 2 a mistake, 1 anything else."""
    return print_answer(lambda: _sweep(arguments))


def _sweep(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        "launch.sweep",
        "Train once for each combination of some options. --run_dir is the folder of them all (default: runs/sweep).",
        usage="FILE.yaml | option=value,value ... [--config FILE] [--option of the sweep, the job or the training value ...]",
    )
    parser.add_argument("words", nargs="*", metavar="option=value,value", help="values of one option; or a YAML file: config, sweep, fixed")
    parser.add_options(Sweep)
    parser.add_options(Request)
    add_config_options(parser)
    given = parser.parse(arguments)
    file, fixed, axes, name = read_axes(given)
    sweep, request, configs = collect_mistakes(
        lambda: make_options(Sweep, {name: value for name, value in given.items() if name in Sweep.model_fields}),
        lambda: read_request(given),
        lambda: combine(axes, fixed | {key: value for key, value in given.items() if key in Config.model_fields}, file, name),
    )
    placed, _ = collect_mistakes(
        lambda: collect_mistakes(*(partial(place_config, config, request) for config in configs)),
        lambda: None if sweep.table else compare_with_cluster(request),
    )
    folder = Path(placed[0].run_dir).parent
    if set(axes) != {"seed"} and not placed[0].holdout and not sweep.table:
        say("note: the runs are compared on the test images; --holdout N sets training images apart to choose by")
    if request.dry_run:
        executor = make_slurm_executor(request, folder / "slurm", len(placed), sweep.parallel, folder.name)
        print(write_script(executor, len(placed)))
        return 0
    collect_mistakes(*(partial(check_folder, Path(config.run_dir), config) for config in placed))
    runs = _read_runs(placed)
    left = [config for config, run in zip(placed, runs, strict=True) if not run.is_finished and not run.is_active]
    if sweep.table or not left:
        active = sum(run.is_active for run in runs)
        if not sweep.table:
            say(f"{folder}: nothing to submit, {len(runs) - active} of {len(runs)} runs are finished and {active} queued or running")
        print(make_results(list(axes), placed, runs))
        return 0
    if request.cluster == "local":
        statuses = run_locally(request, left, sweep.parallel or 1, folder.name)
        print(make_results(list(axes), placed, _read_runs(placed)))
        return 0 if not any(statuses.values()) and len(statuses) == len(left) else RunError.exit_code
    submitted = submit_to_slurm(request, left, folder / "slurm", sweep.parallel, folder.name)
    print(f"submitted job {submitted[0][0].partition('_')[0]}: {len(left)} of {len(placed)} runs; logs: {folder / 'slurm'}")
    return 0


def _read_runs(configs: Sequence[Config]) -> list[RunState]:
    jobs = cluster.read_jobs()
    return [read_state(Path(config.run_dir), jobs) for config in configs]


def read_axes(given: dict[str, Any]) -> tuple[str | None, dict[str, Any], dict[str, list[Any]], str]:
    """The file of --config, the options that all runs share, the swept options with their values, and the sweep's name.

    Raises `UserError`.
    """
    words, file, name = given.pop("words"), given.pop("config"), "sweep"
    fixed: dict[str, Any] = {}
    axes: dict[str, list[Any]] = {}
    if words and "=" not in words[0]:
        path = Path(expand_word(words.pop(0)))
        name = path.stem
        values = read_options_file(path)
        unknown = [repr(key) for key in values if key not in ("config", "sweep", "fixed")]
        if unknown:
            raise UserError(f"{path} has {', '.join(unknown)}; allowed: config, sweep, fixed")
        file = file or values.get("config")
        fixed = _read_mapping(values, "fixed", path)
        axes = _spell_out(_read_mapping(values, "sweep", path))
        fixed = _spell_out(fixed)
        wrong = [key for key, value in axes.items() if not isinstance(value, list)]
        if wrong or not isinstance(file, str | None):
            raise UserError(f"{path}: {wrong[0] if wrong else 'config'} needs {'a list of values, such as [0, 1]' if wrong else 'a name'}")
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise UserError(f"{word!r} is not of the form option=value,value")
        if _find_option(key) in axes:
            raise UserError(f"{_find_option(key)} is swept twice: give all of its values at once")
        axes[_find_option(key)] = [None if value == "none" else value for value in text.split(",")]
    if not axes or not all(axes.values()):
        raise UserError("nothing to sweep: expected option=value,value or a YAML file with `sweep:`")
    both = [key for key in axes if key in given or key in fixed]
    if both:
        raise UserError(f"{both[0]} is swept and also given one value: leave one of them out")
    return file, fixed, axes, name


def _spell_out(mapping: dict[str, Any]) -> dict[str, Any]:
    """`mapping` by the whole names of its options. Raises `UserError` where two keys mean one option."""
    spelt: dict[str, Any] = {}
    for key, value in mapping.items():
        if _find_option(key) in spelt:
            raise UserError(f"{_find_option(key)} stands there twice, once as {key!r}: leave one of them out")
        spelt[_find_option(key)] = value
    return spelt


def expand_word(text: str) -> str:
    """The path that a word of the command line means. Raises `UserError`."""
    try:
        return path_argument(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(str(error)) from error


def _read_mapping(values: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    mapping = values.get(key) or {}
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
        raise UserError(f"{path}: {key} must hold lines of the form `option: value`")
    return mapping


def _find_option(name: str) -> str:
    """The training option that `name` means: itself, or its initials where no other option has them. Raises `UserError`."""
    if name in Config.model_fields:
        if name in _FIXED_OPTIONS:
            raise UserError(f"{name} cannot stand among a sweep's options: every run has its own folder, and all have one world and data")
        return name
    meant = find_by_initials(name, Config.model_fields)
    if meant is None:
        make_options(Config, {name: None})  # raises, with what was perhaps meant
    assert meant is not None
    return meant


def combine(axes: dict[str, list[Any]], given: dict[str, Any], file: str | None, name: str) -> list[Config]:
    """A config for each combination, in a folder of its own. Raises `UserError` with the mistakes of all of them."""
    count = math.prod(map(len, axes.values()))
    if count > _RUNS_MAX:
        raise UserError(f"the sweep has {count} combinations; at most {_RUNS_MAX} are allowed")
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    given = {"run_dir": f"runs/{name}"} | given
    recipe = read_recipe(file)
    configs = collect_mistakes(*(partial(resolve_config, given | values, recipe) for values in combinations))
    folder = Path(configs[0].run_dir)
    placed = {}
    for config in configs:
        name = ",".join(f"{axis}={_show(getattr(config, axis))}" for axis in axes)
        if "/" in name:
            raise UserError(f"{name[:80]} is to be the name of a run's folder, which cannot hold a /: sweep another option")
        run_dir = folder / name
        if len(run_dir.name) > 200:
            raise UserError(f"{run_dir.name[:60]}... is too long for a folder's name: sweep fewer options")
        placed[run_dir] = config.model_copy(update={"run_dir": str(run_dir)})  # 0.1 and 0.10 are one run
    return list(placed.values())


def _show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace("null", "none")


def make_results(axes: list[str], configs: Sequence[Config], runs: Sequence[RunState]) -> str:
    """The table of results: a row for each combination without its seeds, the best first, with mean and spread over the seeds."""
    groups: dict[tuple[str, ...], list[tuple[Config, RunState]]] = {}
    shown = [axis for axis in axes if axis != "seed"]
    for config, run in zip(configs, runs, strict=True):
        groups.setdefault(tuple(_show(getattr(config, axis)) for axis in shown), []).append((config, run))
    rows = []
    for values, members in groups.items():
        accuracies = [run.accuracy for _, run in members if run.is_finished and run.accuracy is not None]
        mean = statistics.mean(accuracies) if accuracies else None
        spread = f"{statistics.stdev(accuracies):.2%}" if len(accuracies) > 1 else ""
        by_state: dict[str, list[str]] = {}
        for config, run in members:
            by_state.setdefault(run.state, []).append(f"{config.seed}")
        states = "; ".join(
            state + (f" (seed {', '.join(seeds)})" if len(by_state) > 1 and "seed" in axes else "") for state, seeds in by_state.items()
        )
        cells = (*values, "" if mean is None else f"{mean:.2%}", spread, f"{len(accuracies)}/{len(members)}", states)
        rows.append((-1.0 if mean is None else mean, cells))
    rows.sort(key=lambda row: row[0], reverse=True)
    header = (*shown, f"{configs[0].evaluated_on} accuracy", "spread", "finished", "state")
    return make_table([cells for _, cells in rows], header)


if __name__ == "__main__":
    sys.exit(main())
