"""The program `python -m launch.jobs`: what runs do, the log of one, the end of one. From run folders, and Slurm where there is one."""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import argparse
import codecs
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import cluster
from launch.runs import RunState, find_noted_log, find_runs, find_saved_step, is_run, read_own_note, read_state
from mnist_dist.console import format_duration
from mnist_dist.errors import RunError, UserError
from mnist_dist.files import as_argument, check_readable
from mnist_dist.options import Parser, path_argument
from mnist_dist.program import make_table, print_answer, say
from mnist_dist.task import format_measure

_RUNS = Path("runs")
_POLL_S = 1.0
_PIECE_BYTES = 1 << 20  # of a log, which may be one line
_SETTLE_S = 5.0  # while it is requeued, Slurm calls a job failed for a moment
_ENDING_S = 300.0  # for which a run that is finished may still draw its report, and copy to W&B
_UNANSWERED_S = 60.0  # for which Slurm may be busy, or be started again
_CANCEL_TIMEOUT_S = 300.0

_EPILOG = """follow RUN: show the log of a run until it ends, requeues included; exit status 0 if it is finished
cancel RUN: let a run save, and end its job"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    return print_answer(lambda: _answer(arguments))


def _answer(arguments: Sequence[str] | None) -> int:
    parser = Parser("launch.jobs", "Show the runs of a folder and what they do.", usage="[RUNS_DIR] [--json] | follow RUN | cancel RUN")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("words", nargs="*", metavar="RUNS_DIR", type=path_argument, help="folder that the runs are in (default: runs)")
    parser.add_argument("--json", action="store_true", help="as JSON, one object a run")
    given = parser.parse(arguments)
    words = given["words"]
    if words[:1] in (["follow"], ["cancel"]):
        if len(words) != 2 or given["json"]:
            raise UserError(f"{words[0]} takes one run folder: python -m launch.jobs {words[0]} RUN")
        run_dir = Path(words[1])
        check_readable(run_dir)
        if not is_run(run_dir):
            raise UserError(f"{run_dir} is no run folder; python -m launch.jobs RUNS_DIR lists those in RUNS_DIR")
        return follow(run_dir) if words[0] == "follow" else cancel(run_dir)
    if len(words) > 1:
        raise UserError(f"expected one folder of runs, follow RUN or cancel RUN, not {' '.join(words)!r}")
    return _list(Path(words[0]) if words else _RUNS, given["json"])


def _list(folder: Path, as_json: bool) -> int:
    check_readable(folder)
    if not folder.is_dir() and folder == _RUNS:
        print("[]" if as_json else f"no runs yet in {folder}; python -m mnist_dist.train, or python -m launch.submit, starts one")
        return 0
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected the folder that the runs are in")
    jobs, unanswered = cluster.find_jobs()
    if unanswered:
        say(f"note: {unanswered}")
    unread: list[str] = []
    runs = [read_state(path, jobs) for path in find_runs(folder, unread=unread)]
    if unread:
        more = f" and {len(unread) - 1} more folder{'s' * (len(unread) > 2)}" if len(unread) > 1 else ""
        say(f"note: {unread[0]}{more} cannot be read: runs that may be there are not listed")
    if as_json:
        print(json.dumps([{**dataclasses.asdict(run), "path": str(run.path)} for run in runs], indent=2))
    elif runs:
        names = {run.measure.partition("/")[2] for run in runs if run.measure}
        best = names.pop().replace("_", " ") if len(names) == 1 else "best"
        best = "its loss" if best == "loss" else best  # beside that of the training
        print(make_table([best if name == "best" else name for name in _HEADER], [describe_run(run, folder) for run in runs]))
    else:
        print(f"no runs in {folder}")
    return 0


_HEADER = ("run", "state", "why", "step", "loss", "best", "images/s", "left", "restarts", "job", "nodes")


def describe_run(run: RunState, folder: Path) -> tuple[str, ...]:
    """The cells of a run in the table."""
    more = f", {len(run.waiting)} more in its chain" if run.waiting and not run.is_finished else ""
    silent = f", silent for {format_duration(run.silent_s)}" if run.silent_s is not None else ""
    return (
        str(run.path.relative_to(folder)) if run.path != folder else str(run.path),
        run.state + silent + more,
        run.why,
        f"{run.step}/{run.total}" if run.total else "",
        f"{run.loss:.4f}" if run.loss is not None else "",
        "" if run.best is None else format_measure(run.measure, run.best),
        f"{run.images_per_s:,.0f}" if run.images_per_s else "",
        format_duration(run.left_s) if run.left_s is not None else "",
        str(run.restarts or ""),
        run.job,
        run.nodes,
    )


def follow(path: Path) -> int:
    """Print the log of the run in `path` until its processes end. 0 if it is finished, 1 if not."""
    log, position, ended_s = "", 0, 0.0
    patience, state = cluster.Patience(), ""
    jobs, unanswered = list[cluster.Job](), ""
    while True:  # the log is read each second
        if patience.is_due():
            jobs, unanswered = cluster.find_jobs()
        run = read_state(path, jobs)
        if not (run.is_active or run.is_ending) or run.state != state:
            state = run.state
            patience.hasten()
        newest = locate_log(run) or log  # Slurm may be silent for a while
        if newest != log:
            _copy(log, position)
            log, position = newest, 0
        position = _copy(log, position)
        ended_s = 0.0 if run.is_active else ended_s + _POLL_S
        if run.is_finished:
            if not run.is_ending or ended_s > _ENDING_S:
                break
        elif ended_s > (_UNANSWERED_S if unanswered else _SETTLE_S):
            break
        time.sleep(_POLL_S)
    _copy(log, position)
    print(f"{path}: {run.state}, step {run.step}" + (f" of {run.total}" if run.total else ""))
    if not run.is_finished:
        print(f"why: {shlex.join(['python', '-m', 'launch.explain', as_argument(path)])}")
    return 0 if run.is_finished else RunError.exit_code


def locate_log(run: RunState) -> str:
    """The log of a run's last job; empty where there is none."""
    noted = read_own_note(run.path, "job")
    logs = [log for job in (run.job, run.done) if (log := find_noted_log(noted, job))]
    if logs:
        return next(filter(os.path.isfile, logs), logs[0])  # a job that waits has none yet
    return cluster.find_log(run.job) if run.job else str(noted.get("log", ""))


def _copy(log: str, position: int) -> int:
    try:
        if not os.path.isfile(log):  # not begun; or not a file, which would never end
            return position
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with open(log, "rb") as file:
            file.seek(position if position <= os.fstat(file.fileno()).st_size else 0)  # somebody may have emptied it
            while content := file.read(_PIECE_BYTES):
                sys.stdout.write(decoder.decode(content))
            sys.stdout.flush()
            return file.tell() - len(decoder.getstate()[0])  # a letter may be written by half
    except OSError as error:
        raise RunError(f"the log {log} cannot be read: {error.strerror or error}") from error


def cancel(path: Path) -> int:
    """Let the run in `path` save and end. Raises `UserError` where there is nothing to cancel, `RunError` where that is not known."""
    jobs, unanswered = cluster.find_jobs()
    run = read_state(path, jobs)
    if unanswered and (run.pid is None or "chain" in read_own_note(path, "job")):  # those that wait in the queue would start it again
        raise RunError(f"{path} is left as it is: {unanswered}")
    if not run.is_active:
        raise UserError(f"{path} does not run: it is {run.state}")
    if run.is_suspended:
        raise UserError(
            f"{path} is suspended, and cannot save: scontrol resume {run.job} lets it go on, and then cancel lets it save; "
            f"scancel {run.job} ends it without saving"
        )
    waited = run.is_waiting
    if run.is_in_queue:
        # Those that wait first, so that none begins. TERM to every task; KILL comes KillWait seconds later.
        cluster.run_slurm("scancel", *run.waiting, run.job)
    elif run.pid is not None:
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            os.kill(run.pid, signal.SIGTERM)  # one rank's signal stops all at the same step
    else:
        raise UserError(f"{path} is {run.state} on another machine, and not in this cluster's queue: stop it there")
    end = time.monotonic() + _CANCEL_TIMEOUT_S
    queued = run.is_in_queue
    while run.is_active or (queued and unanswered):
        if time.monotonic() > end:
            raise RunError(f"{path} was told to stop, and is still {run.state} after {_CANCEL_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)
        jobs, unanswered = cluster.find_jobs()
        run = read_state(path, jobs)
    saved = find_saved_step(path)
    if run.is_finished:
        print(f"{path} had just finished")
    elif waited:
        print(f"{path}: its job waited in the queue and is cancelled")
    elif saved is None:
        print(f"{path} is stopped before it had anything to save")
    else:
        print(f"{path} is stopped; saved at step {saved}. The same command resumes from there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
