"""The program `python -m launch.submit`: one training as a job, on a Slurm cluster or on this machine.

Everything that can be known to be wrong is said before a job is queued. Imports no torch, so that it answers in about a second.
"""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import cluster
from launch.request import Request, place_config
from launch.runs import describe_best, read_state
from launch.submission import check_free, make_slurm_executor, run_locally, submit_to_slurm, write_script
from mnist_dist.config import add_config_options, find_given_task, resolve_config, take_options
from mnist_dist.errors import RunError, UserError
from mnist_dist.options import ADVICE, Options, Parser, make_options, option, path_argument, read_options_file
from mnist_dist.preemption import Stop
from mnist_dist.program import print_answer, say


class Chain(Options):
    """How often one run is queued."""

    chain: int = option(
        "The chain",
        1,
        "jobs that follow each other, where a cluster does not requeue; one that finds nothing to do ends at once",
        ge=1,
        le=100,
    )


ADVICE |= {name: f"it is --{name} of launch.submit" for name in Chain.model_fields}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 submitted, or finished already, 2 a mistake, 1 anything else; locally the training's."""
    return print_answer(lambda: _submit(arguments))


def _submit(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        "launch.submit", "Submit a training as a job, by submitit.", usage="[--config FILE] [--option of the job or the training value ...]"
    )
    task, recipe = find_given_task(arguments, "launch.submit")
    add_job_options(parser)
    parser.add_options(Chain)
    add_config_options(parser, task)
    given = parser.parse(arguments)
    wanted = make_options(Chain, {name: given.pop(name) for name in Chain.model_fields if name in given})
    request, config = collect_mistakes(
        lambda: read_request(given),
        lambda: resolve_config({name: value for name, value in take_options(given).items() if name not in JOB_OPTIONS}, recipe),
    )
    config, _ = collect_mistakes(lambda: place_config(config, request), lambda: compare_with_cluster(request))
    folder = Path(config.run_dir) / "slurm"
    if request.dry_run:
        print(write_script(make_slurm_executor(request, folder, task=type(config.task))))
        if wanted.chain > 1:
            say(f"note: {wanted.chain - 1} more jobs would follow, each with --dependency=afterany on those before it")
        return 0
    run = read_state(Path(config.run_dir), list_jobs(is_needed=request.cluster == "slurm"))
    if not check_free(run, config):
        print(f"{run.path} is finished, {describe_best(run)}; nothing to do")
        return 0
    if request.cluster == "local":
        if wanted.chain > 1:
            raise UserError("chain has no effect with cluster local, which has no Slurm: leave it out")
        status = run_locally(request, [config]).get(config.run_dir, Stop.INTERRUPT.exit_code)  # stopped before it began
        run = read_state(Path(config.run_dir), [])
        best = f", {describe_best(run)}" if run.is_finished else ""
        print(f"{run.path}: {run.state} after step {run.step}{best}")
        return status
    [[job, *more]] = submit_to_slurm(request, [config], folder, chain=wanted.chain)
    print(f"submitted job {job}: {request.describe_size()}; log: {folder / f'{job}.log'}")
    if more:
        print(f"its chain goes on with {', '.join(more)}; each ends at once if nothing is left to do")
    show_start(job)
    print(f"to watch it: {shlex.join(['python', '-m', 'launch.jobs', 'follow', str(run.path)])}")
    return 0


JOB_OPTIONS = {"job", *Request.model_fields}


def add_job_options(parser: Parser, own: Mapping[str, Any] | None = None, hidden: Collection[str] = ()) -> None:
    """Add --job and every option of a `Request`; `own` and `hidden` as for `Parser.add_options`."""
    parser.add_argument("--job", metavar="FILE", type=path_argument, help="YAML file of options of the job, such as those of your site")
    parser.add_options(Request, own, hidden)


def read_request(given: dict[str, Any], own: Mapping[str, Any] | None = None, idle: Collection[str] = ()) -> Request:
    """The job options among those given, under them those in the file of --job, and under these a program's `own`. Raises `UserError`.

    Those that are `idle` in this program are not heeded in the file, which other programs may share.
    """
    values = dict(own or {})
    if file := given.get("job"):
        found = read_options_file(Path(file))
        make_options(Request, found, str(file))  # so that a mistake in the file is told as one
        values |= {name: value for name, value in found.items() if name not in idle}
    return make_options(Request, values | {name: value for name, value in given.items() if name in Request.model_fields})


def show_start(job: str) -> None:
    """Print when Slurm expects `job` to start, where it soon says."""
    start = cluster.estimate_start(job)
    if start:
        print(f"Slurm expects it to start at {start}")


def collect_mistakes(*works: Callable[[], Any]) -> list[Any]:
    """What each of `works` returns. Raises one `UserError` with the mistakes of all of them, each once, with the lines set in below it."""
    answers, mistakes = [], []
    for work in works:
        try:
            answers.append(work())
        except UserError as error:
            mistakes += re.split(r"\n(?! )", str(error))
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    return answers


def compare_with_cluster(request: Request) -> None:
    """Raise `UserError` for a request that this cluster can never grant; what may only take long is a note."""
    if request.cluster == "local":
        return
    if not cluster.is_slurm_here():
        if not request.dry_run:
            raise UserError("cluster is 'slurm', but sinfo and sbatch are not found here: use a login node, or --cluster local")
        say("note: there is no Slurm here, so the request is not compared with a cluster")
        return
    try:
        nodes = cluster.read_nodes()
    except RunError as error:
        if not request.dry_run:
            raise
        say(f"note: {error}; the request is not compared with the cluster")
        return
    for note in cluster.check_request(request, nodes):
        say(f"note: {note}")


def list_jobs(*, is_needed: bool) -> list[cluster.Job]:
    """The user's jobs. Where Slurm does not answer, raises `RunError` if they are needed; else that is a note."""
    if is_needed:
        return cluster.read_jobs()
    jobs, unanswered = cluster.find_jobs()
    if unanswered:
        say(f"note: {unanswered}")
    return jobs


if __name__ == "__main__":
    sys.exit(main())
