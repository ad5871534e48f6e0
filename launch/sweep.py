"""The program `python -m launch.sweep`: one run for each combination of options, as one job array, and the table of what came of them.

    python -m launch.sweep configs/sweep.yaml --parallel 4
    python -m launch.sweep --config smoke lr=0.05,0.1 seed=0,1,2

The same command again submits only what is neither finished nor queued. Imports no torch.
"""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import argparse
import contextlib
import itertools
import math
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launch.request import place_config
from launch.runs import RunState, read_state
from launch.submission import make_slurm_executor, run_locally, submit_to_slurm, write_script
from launch.submit import add_job_options, collect_mistakes, compare_with_cluster, list_jobs, read_request, show_start
from mnist_dist.config import Config, add_config_options, find_config_file, read_recipe, resolve_config, take_options
from mnist_dist.errors import RunError, UserError
from mnist_dist.options import (
    ADVICE,
    Options,
    Parser,
    explain_unknown,
    find_by_initials,
    make_options,
    option,
    path_argument,
    read_options_file,
    spell,
)
from mnist_dist.program import make_table, print_answer, say
from mnist_dist.record import check_folder
from mnist_dist.source import BUILT_IN, find_task
from mnist_dist.task import Task, format_measure

_WORDS = "option=value"  # what argparse calls them: no option of a task can have this name
_RUNS_MAX = 1000  # Slurm's own limit for an array is 1001, unless its site raised it
_FIXED_OPTIONS = ("config", "task", "run_dir", "data_dir", "world_size")  # each run has its own, or all have one


class Sweep(Options):
    """How the runs of a sweep are queued."""

    parallel: int | None = option("The sweep", None, "runs at a time; none: as many as there is room for, locally one", ge=1, le=_RUNS_MAX)
    table: bool = option("The sweep", False, "print the table of results and queue nothing")


ADVICE |= {name: f"it is --{name} of launch.sweep" for name in Sweep.model_fields}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 submitted, or nothing left to do, 2 a mistake, 1 anything else."""
    return print_answer(lambda: _sweep(arguments))


def _sweep(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        "launch.sweep",
        "Train once for each combination of some options. --run_dir is the folder of them all (default: runs/sweep, or runs/FILE).",
        usage="FILE.yaml | option=value,value ... [--config FILE] [--option of the sweep, the job or the training value ...]",
    )
    parser.add_argument(_WORDS, nargs="*", metavar="option=value,value", help="values of one option; or a YAML file: config, sweep, fixed")
    task, recipe = _find_task(arguments)
    parser.add_options(Sweep)
    add_job_options(parser)
    add_config_options(parser, task)
    given = parser.parse(arguments)
    options = [*Config.model_fields, *task.model_fields]
    fixed, axes, name = read_axes(given, options)
    sweep, request, configs = collect_mistakes(
        lambda: make_options(Sweep, {name: value for name, value in given.items() if name in Sweep.model_fields}),
        lambda: read_request(given),
        lambda: combine(axes, fixed | {key: value for key, value in take_options(given).items() if key in options}, recipe, name),
    )
    placed, _ = collect_mistakes(
        lambda: collect_mistakes(*(partial(place_config, config, request) for config in configs)),
        lambda: None if sweep.table else compare_with_cluster(request),
    )
    folder = Path(placed[0].run_dir).parent
    if set(axes) != {"seed"} and not placed[0].holdout and not sweep.table:
        say(f"note: the runs are compared on the test {task.samples}; --holdout N sets training {task.samples} apart to choose by")
    if request.dry_run:
        executor = make_slurm_executor(request, folder / "slurm", len(placed), sweep.parallel, folder.name, task)
        print(write_script(executor, len(placed)))
        return 0
    collect_mistakes(*(partial(check_folder, Path(config.run_dir), config) for config in placed))
    runs = _read_runs(placed, is_needed=not sweep.table and request.cluster == "slurm")
    left = [config for config, run in zip(placed, runs, strict=True) if not run.is_finished and not run.is_active]
    if sweep.table or not left:
        active = sum(run.is_active for run in runs)
        if not sweep.table:
            say(f"{folder}: nothing to submit, {len(runs) - active} of {len(runs)} runs are finished and {active} queued or running")
        print(make_results(list(axes), placed, runs))
        return 0
    if request.cluster == "local":
        run_locally(request, left, sweep.parallel or 1, folder.name)
        runs = _read_runs(placed, is_needed=False)
        print(make_results(list(axes), placed, runs))
        finished = {str(run.path) for run in runs if run.is_finished}
        return 0 if finished.issuperset(config.run_dir for config in left) else RunError.exit_code
    submitted = submit_to_slurm(request, left, folder / "slurm", sweep.parallel, folder.name)
    job = submitted[0][0]
    print(f"submitted job {job.partition('_')[0]}: {len(left)} of {len(placed)} runs; logs: {folder / 'slurm'}")
    show_start(job)
    return 0


def _read_runs(configs: Sequence[Config], *, is_needed: bool) -> list[RunState]:
    jobs = list_jobs(is_needed=is_needed)
    return [read_state(Path(config.run_dir), jobs) for config in configs]


def _find_task(arguments: Sequence[str] | None) -> tuple[type[Task], dict[str, Any]]:
    """The task of a sweep, and the options in its recipe. Looked for first, since the task's own options are part of the command line."""
    parser = Parser("launch.sweep", "", add_help=False)
    parser.add_argument(_WORDS, nargs="*")
    parser.add_options(Sweep)
    add_job_options(parser)
    add_config_options(parser, Task)
    known, unknown = parser.parse_known_args(arguments)
    given, values = list(sys.argv[1:] if arguments is None else arguments), {}
    # The value of an option that is not known yet, a task's own, stands among the words. Behind a word that asks nothing it is the sweep's.
    behind = {word for option, word in itertools.pairwise(given) if option in unknown}
    words = sorted((word for word in getattr(known, _WORDS) if "=" not in word), key=lambda word: word in behind)
    files = [file for file in map(find_file, words) if file and file.suffix != ".py"]  # `read_axes` says what is wrong with code
    if files:
        values = read_options_file(files[0])
    fixed, file = values.get("fixed"), known.config or values.get("config")
    named = known.task or (fixed.get("task") if isinstance(fixed, dict) else None)
    recipe = read_recipe(file if isinstance(file, str) else None, named)
    return find_task(named or recipe.get("task", BUILT_IN)), recipe


def read_axes(given: dict[str, Any], options: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[Any]], str]:
    """The options that all runs share, the swept options with their values, and the sweep's name. Raises `UserError`."""
    words, name = given.pop(_WORDS), "sweep"
    fixed: dict[str, Any] = {}
    axes: dict[str, list[Any]] = {}
    if code := next((word for word in words if word.endswith(".py") and "=" not in word), None):
        raise UserError(f"{code[:80]!r} is not a sweep: write --task {code[:80]}")
    if words and "=" not in words[0]:
        word = words.pop(0)
        path = find_file(word)
        if path is None:
            raise UserError(f"{expand_word(word)!r} is not a file, and not of the form option=value,value")
        name = path.stem
        values = read_options_file(path)
        unknown = [repr(key) for key in values if key not in ("config", "sweep", "fixed")]
        if unknown:
            raise UserError(f"{path} has {', '.join(unknown)}; allowed: config, sweep, fixed")
        axes = _spell_out(_read_mapping(values, "sweep", path), options)
        fixed = _spell_out(_read_mapping(values, "fixed", path), options, ("task",))
        wrong = [key for key, value in axes.items() if not isinstance(value, list)]
        if wrong or not isinstance(values.get("config"), str | None):
            raise UserError(f"{path}: {wrong[0] if wrong else 'config'} needs {'a list of values, such as [0, 1]' if wrong else 'a name'}")
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise UserError(f"{word!r} is not of the form option=value,value")
        option_name = _find_option(key, options)
        if option_name in axes:
            raise UserError(f"{option_name} is swept twice: give all of its values at once")
        axes[option_name] = text.split(",")
    if not axes or not all(axes.values()):
        raise UserError("nothing to sweep: expected option=value,value (without dashes), or a YAML file with `sweep:`")
    both = [key for key in axes if given.get(key) is not None or key in fixed]
    if both:
        raise UserError(f"{both[0]} is swept and also given one value: leave one of them out")
    return fixed, axes, name


def _spell_out(mapping: dict[str, Any], options: Sequence[str], kept: Sequence[str] = ()) -> dict[str, Any]:
    """`mapping` by the whole names of its options. Raises `UserError` where two keys mean one option."""
    spelt: dict[str, Any] = {}
    for key, value in mapping.items():
        name = key if key in kept else _find_option(key, options)
        if name in spelt:
            raise UserError(f"{name} stands there twice, once as {key!r}: leave one of them out")
        spelt[name] = value
    return spelt


def find_file(word: str) -> Path | None:
    """The file that a word of the command line means, found as that of --config is; None where it means none. Raises `UserError`."""
    path = Path(expand_word(word))
    if os.path.isfile(path):
        return path
    if path.suffix == ".yaml":  # a bare name may be the value of a task's own option
        with contextlib.suppress(UserError):
            return find_config_file(str(path))
    return None


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


def _find_option(name: str, options: Sequence[str]) -> str:
    """The training option that `name` means: itself, or its initials where no other option has them. Raises `UserError`."""
    if name in _FIXED_OPTIONS:
        raise UserError(f"{name} is one for all runs of a sweep: give it once, as --{name}")
    meant = name if name in options else find_by_initials(name, options)
    if meant is None:
        raise UserError(explain_unknown(name, name, options))
    return meant


def combine(axes: dict[str, list[Any]], given: dict[str, Any], recipe: dict[str, Any], name: str) -> list[Config]:
    """A config for each combination, in a folder of its own. Raises `UserError` with the mistakes of all of them."""
    count = math.prod(map(len, axes.values()))
    if count > _RUNS_MAX:
        raise UserError(f"the sweep has {count} combinations; at most {_RUNS_MAX} are allowed")
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    given = {"run_dir": f"runs/{name}"} | given
    configs = collect_mistakes(*(partial(resolve_config, given | values, recipe) for values in combinations))
    folder = Path(configs[0].run_dir)
    placed = {}
    for config in configs:
        name = ",".join(f"{axis}={spell(config.values()[axis])}" for axis in axes)
        if "/" in name:
            raise UserError(f"{name[:80]} is to be the name of a run's folder, which cannot hold a /: sweep another option")
        run_dir = folder / name
        if len(run_dir.name) > 200:
            raise UserError(f"{run_dir.name[:60]}... is too long for a folder's name: sweep fewer options")
        placed[run_dir] = config.replace_run_dir(run_dir)  # 0.1 and 0.10 are one run
    return list(placed.values())


def make_results(axes: list[str], configs: Sequence[Config], runs: Sequence[RunState]) -> str:
    """The table of results: a row for each combination without its seeds, the best first, with mean and spread over the seeds."""
    groups: dict[tuple[str, ...], list[tuple[Config, RunState]]] = {}
    shown = [axis for axis in axes if axis != "seed"]
    for config, run in zip(configs, runs, strict=True):
        groups.setdefault(tuple(spell(config.values()[axis]) for axis in shown), []).append((config, run))
    task, rows = configs[0].task, []
    for values, members in groups.items():
        found = [run.best for _, run in members if run.is_finished and run.best is not None]
        mean = statistics.mean(found) if found else None
        spread = format_measure(task.best, statistics.stdev(found)) if len(found) > 1 else ""
        by_state: dict[str, list[str]] = {}
        for config, run in members:
            by_state.setdefault(run.state, []).append(f"{config.seed}")
        states = "; ".join(
            state + (f" (seed {', '.join(seeds)})" if len(by_state) > 1 and "seed" in axes else "") for state, seeds in by_state.items()
        )
        cells = (*values, "" if mean is None else format_measure(task.best, mean), spread, f"{len(found)}/{len(members)}", states)
        rows.append((mean, cells))
    rows.sort(key=lambda row: math.inf if row[0] is None else -row[0] if task.higher_is_better else row[0])
    header = (*shown, f"{configs[0].evaluated_on} {task.best.replace('_', ' ')}", "spread", "finished", "state")
    return make_table(header, [cells for _, cells in rows])


if __name__ == "__main__":
    sys.exit(main())
