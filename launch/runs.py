"""What is known of runs: from their folders, and of their jobs from Slurm. Reads only; imports no torch."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from launch.cluster import Job, describe_state, is_suspended
from launch.endings import STRONG_STATES, shorten
from launch.request import Request
from mnist_dist.config import Config, make_config
from mnist_dist.errors import UserError
from mnist_dist.files import is_marked
from mnist_dist.lock import LOCK_FILE, find_process, is_locked_elsewhere, read_holder
from mnist_dist.options import make_options
from mnist_dist.preemption import Stop
from mnist_dist.record import (
    CHECKPOINTS,
    CONFIG_FILE,
    ENDS_FILE,
    METRICS_FILE,
    RESULT_FILE,
    STARTS_FILE,
    find_step,
    is_count,
    is_number,
    list_newest_first,
    read_config,
    read_ends,
    read_note,
    read_result,
    read_rows,
    read_starts,
    with_noted_sizes,
)
from mnist_dist.task import Row, format_measure

T = TypeVar("T")

_SILENT_S = 60.0
_SILENT_INTERVALS = 5
_CLAIMS = (LOCK_FILE, "slurm/job.json")  # made before a run begins
_SLOWEST = 1e-9  # samples a second; nothing follows from less, which only a record of somebody else has
_DEPTH = 4
LOCAL_LOG = "_0_log.out"  # ends the name of rank zero's log where a job is a process on this machine; its number is that process's
_TAIL_BYTES = 1 << 16

# What Slurm says of a job that has ended without the run being finished.
_ENDS = {
    "CANCELLED": "cancelled",
    "TIMEOUT": "out of time",
    "DEADLINE": "past its deadline",
    "NODE_FAIL": "node failed",
    "BOOT_FAIL": "node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
}
_STATUSES = {
    Stop.REQUEUE.exit_code: "saved, to be continued",
    Stop.TERMINATE.exit_code: "stopped, saved",
    Stop.INTERRUPT.exit_code: "stopped, saved",
}


@dataclass(frozen=True)
class RunState:
    """One run, as it is now."""

    path: Path
    state: str
    why: str = ""  # it ended without being finished, in a word or two; `launch.explain` says more
    is_active: bool = False  # queued, running, or about to
    is_finished: bool = False
    is_in_queue: bool = False  # of Slurm
    is_waiting: bool = False  # there, and not running
    reason: str = ""  # why it waits, as Slurm calls it
    is_suspended: bool = False  # waiting, with processes that are stopped
    step: int = 0
    total: int | None = None
    loss: float | None = None
    best: float | None = None  # the last value of the measure by which runs of its task are compared
    measure: str = ""  # the name of that measure, such as test/accuracy
    images_per_s: float | None = None
    left_s: float | None = None
    silent_s: float | None = None
    restarts: int = 0
    job: str = ""
    done: str = ""  # of the jobs of its chain, the last that did something
    waiting: tuple[str, ...] = ()  # the other jobs of its chain that are in the queue
    nodes: str = ""
    pid: int | None = None  # of rank zero, where it runs on this machine
    is_ending: bool = False  # finished, while its report is drawn, or its processes end


def describe_best(run: RunState) -> str:
    """The best measure of a run in words, such as `test accuracy 99.60%`; empty where there is none yet."""
    if run.best is None:
        return ""
    split, _, name = run.measure.partition("/")
    return f"{'held-out' if split == 'holdout' else split} {name.replace('_', ' ')} {format_measure(name, run.best)}"


def find_runs(folder: Path, depth: int = _DEPTH, unread: list[str] | None = None) -> Iterator[Path]:
    """The run folders in `folder`, itself included. Those that this user may not read are added to `unread`."""
    if is_run(folder):
        yield folder
        if any(os.path.lexists(folder / name) for name in (METRICS_FILE, *_CLAIMS)):
            return  # else the config.yaml may be another program's
    try:
        os.stat(os.path.join(folder, "."))  # else one that can be listed and not entered would seem to be empty
        # A link to a run counts; one to anything else may lead out of here, or round in a circle.
        found = [entry for entry in os.scandir(folder) if not entry.is_symlink() or is_run(Path(entry.path))]
        inner = sorted(entry.path for entry in found if entry.is_dir())
    except OSError as error:
        if unread is not None and isinstance(error, PermissionError):
            unread.append(str(folder))
        return
    for path in inner if depth else []:
        yield from find_runs(Path(path), depth - 1, unread)


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run's, begun or only queued."""
    return any(os.path.lexists(folder / name) for name in (CONFIG_FILE, *_CLAIMS))


def read_state(path: Path, jobs: list[Job]) -> RunState:
    """The run in folder `path`, whose job may be one of `jobs`. A damaged file counts as missing, and the state names it."""
    damaged: list[str] = []

    def read(name: str, reader: Callable[[], T]) -> T | None:
        try:
            return reader() if os.path.lexists(path / name) else None
        except UserError:
            damaged.append(name)
            return None

    config = read(CONFIG_FILE, lambda: read_config(path))
    starts = read(STARTS_FILE, lambda: read_starts(path)) or []
    ends = read(ENDS_FILE, lambda: read_ends(path)) or []
    sized = read(STARTS_FILE, lambda: with_noted_sizes(config, starts) if config else None)
    config = sized or config
    result = read(RESULT_FILE, lambda: read_result(path, config)) or {}
    rows = read(METRICS_FILE, lambda: read_rows(path, config or make_config({}), _TAIL_BYTES)) or []
    noted, ended = (read_own_note(path, name) for name in ("job", "end"))
    holder = read_holder(path)
    number = holder.job if holder else ""
    noted_jobs = list_noted_jobs(noted)
    if (known := {*noted_jobs, number}) != {""} and str(ended.get("job")) not in known:
        ended = {}  # of an earlier job
    # An array's job in the lock has Slurm's own number; a job that was submitted later than the one of the lock is the one that counts.
    # Of a chain the one that runs counts, else the first that waits.
    matching = [job for job in jobs if _is_of_note(job, noted) or (number and job.number == number)]
    job = max(matching, key=lambda job: (job.is_active, job.is_running, int(job.number) * (-1 if job.is_active else 1)), default=None)
    measured: dict[str, Any] = {}
    for row in rows:
        measured |= row
    best = str(starts[-1].get("best") or "accuracy") if starts else "accuracy"  # older versions knew no other
    measures = [f"{split}/{best}" for split in ("holdout", "test")]
    found = {name: value for name in measures if is_number(value := {**measured, **result}.get(name))}
    measure = next(iter(found), "")
    # A job of a chain that had nothing to do, or waits though the run is finished, tells less of it than the one that did something.
    done, named = _find_last_done(noted, ended, *starts[-1:]), job.name if job else ""
    is_shown = job is not None and (job.is_running or (job.is_active and not result))
    values: dict[str, Any] = {
        "path": path,
        "step": result.get("step") or max(measured.get("step") or 0, find_saved_step(path) or 0),
        "total": config.total_steps if config and config.has_sizes else None,
        "loss": measured.get("train/loss"),
        "best": found.get(measure),
        "measure": measure,
        "images_per_s": result.get("images_per_s", measured.get("train/images_per_s")),
        "restarts": max(len(starts) - 1, 0),
        "job": (named if is_shown else done or named) or str(noted.get("job") or number),
        "done": done,
        "waiting": tuple(other.name for other in matching if other.is_active and other is not job),
        "nodes": job.nodes if job and job.nodes else str(starts[-1].get("host", "")) if starts else "",
    }
    damage = f"damaged {', '.join(damaged)}" if damaged else ""
    pid = find_process(path, holder)
    if result:
        lives = pid or is_locked_elsewhere(path, holder) or _find_controller(path, noted) or (job is not None and job.is_running)
        return RunState(state=_join("finished", damage), is_finished=True, is_ending=bool(lives), **values)
    if job is not None and job.is_active:
        waits = not job.is_running
        reason = job.reason if waits else ""
        state = describe_state(job.state, reason)
        if job.state == "RUNNING":
            values |= _describe_progress(path, values, config)
        values |= {"is_waiting": waits, "reason": reason, "is_suspended": is_suspended(job.state)}
        return RunState(state=_join(state, damage), is_active=True, is_in_queue=True, pid=pid, **values)
    if pid is not None or is_locked_elsewhere(path, holder):
        values |= _describe_progress(path, values, config)
        return RunState(state=_join("running", damage), is_active=True, pid=pid, **values)
    if not ended and (pid := _find_controller(path, noted)) is not None:
        return RunState(state=_join("starting", damage), is_active=True, pid=pid, **values)
    why, status = _find_why(noted, ended, starts, ends)
    return RunState(state=damage or _describe_end(job, status, bool(ended), bool(starts)), why=why, **values)


def _find_controller(path: Path, noted: Row) -> int | None:
    """The process of this machine that a run without Slurm was started by, as long as it lives: its ranks may hold no lock yet."""
    job = str(noted.get("job"))
    if not (re.fullmatch(r"\d{1,18}", job) and str(noted.get("log")).endswith(LOCAL_LOG)):
        return None
    with contextlib.suppress(OSError, OverflowError, psutil.Error):  # no such process, or somebody else's
        controller = psutil.Process(int(job))
        words = controller.cmdline()
        # And no other of the same number.
        if "submitit.local._local" in words and os.path.samefile(Path(controller.cwd(), words[-1]), path / "slurm"):
            return int(job)
    return None


def _join(state: str, damage: str) -> str:
    return f"{state}, {damage}" if damage else state


def _describe_end(job: Job | None, status: int | None, is_noted: bool, started: bool) -> str:
    if job is not None and job.state in STRONG_STATES:
        return _ENDS.get(job.state, "failed")
    if status is not None:
        if job is not None and job.state == "CANCELLED" and status in _STATUSES:
            return "cancelled, saved"
        if is_noted or job is None or job.state not in _ENDS:
            return _STATUSES.get(status, f"failed (exit status {status})")
    if is_noted:
        return "failed"
    if job is not None:
        return _ENDS.get(job.state, "failed")
    return "stopped" if started else "not started"  # its job is gone and has not said how


def _find_why(noted: Row, ended: Row, starts: list[Row], ends: list[Row]) -> tuple[str, int | None]:
    """Why a run that does not run is not finished, in a word or two, and its exit status; empty and None where neither is recorded."""
    status = ended.get("status") if is_count(ended.get("status")) else None
    if not starts or not is_of_last_job(starts[-1], noted):  # that never came to train
        return "mistake" if status == UserError.exit_code else "", status
    end = next((end for end in reversed(ends) if end["start"] == len(starts)), None)
    if end is None:  # older versions recorded none either
        return "killed" if "memory_kills" in starts[-1] and status is None else "", status
    if status is None and is_count(end.get("status")):
        status = end["status"] or None  # 0 and no result: somebody has removed that
    return shorten(end["why"], status), status


def _describe_progress(path: Path, values: dict[str, Any], config: Config | None) -> dict[str, Any]:
    speed, total = values["images_per_s"], values["total"]
    if not config or total is None or (speed or 0) < _SLOWEST:
        return {}
    progress: dict[str, Any] = {"left_s": max(total - values["step"], 0) * config.batch_size / speed}
    changed = [file.stat().st_mtime for name in (METRICS_FILE, STARTS_FILE) if (file := path / name).exists()]
    quiet_s = time.time() - max(changed, default=time.time())
    if quiet_s > max(_SILENT_S, _SILENT_INTERVALS * config.log_every * config.batch_size / speed):
        progress["silent_s"] = quiet_s
    return progress


def find_saved_step(path: Path) -> int | None:
    """The step of the newest checkpoint, as far as this user may see it."""
    with contextlib.suppress(OSError):
        return next(map(find_step, list_newest_first(path / CHECKPOINTS)), None)
    return None


def list_noted_jobs(noted: Row) -> list[str]:
    """The jobs in the note of a run's last submission: one, or those of a chain; an empty name where none is noted."""
    return str(noted.get("chain") or noted.get("job") or "").split(":")


def _find_last_done(noted: Row, *rows: Row) -> str:
    """Of the jobs in a note, the last that has done something, as some `rows` tell: those of a chain after it had nothing to do."""
    jobs = list_noted_jobs(noted)
    return max((name for row in rows if (name := str(row.get("job"))) in jobs), key=jobs.index, default="")


def _is_of_note(job: Job, noted: Row) -> bool:
    """Whether a queued job is one that a note names. A job of another cluster, or a process of this machine, may have the same number."""
    log = str(noted.get("log") or "")
    if job.name not in list_noted_jobs(noted) or log.endswith(LOCAL_LOG):
        return False
    return share_folder(job.script, log)


def share_folder(*paths: str) -> bool:
    """Whether files lie in one folder, as the script and the log of a job do; also where one of them is not known."""
    return not all(paths) or len({os.path.realpath(os.path.dirname(path)) for path in paths}) == 1


def is_of_last_job(start: Row, noted: Row) -> bool:
    """Whether a start of a run is of the job that was noted last, or later: by its number, else by the clocks of two hosts."""
    return (start.get("job") or None) in list_noted_jobs(noted) or str(noted.get("time", "")) <= str(start.get("time", ""))


def find_noted_log(noted: Row, job: str) -> str:
    """The log of one of the jobs in a note; empty where the note is not of that job."""
    log = str(noted.get("log") or "")
    if not log or not job or job not in list_noted_jobs(noted):
        return ""
    return log if job == noted.get("job") else os.path.join(os.path.dirname(log), f"{job}.log")


def read_own_note(run_dir: Path, name: str) -> dict[str, Any]:
    """RUN_DIR/slurm/NAME.json; empty where there is none, where it is damaged, or where the folder is a copy of the one that it is of."""
    note = read_note(run_dir / f"slurm/{name}.json")
    return note if is_marked(run_dir, str(note.get("folder", ""))) else {}


def read_noted_request(run_dir: Path) -> Request | None:
    """The request of a run's last job, as its note has it; None where that is not this user's: it may hold options that run programs."""
    try:
        if (run_dir / "slurm/job.json").stat().st_uid != os.getuid():
            return None
        noted = read_own_note(run_dir, "job").get("request")
        return make_options(Request, noted) if isinstance(noted, dict) and all(isinstance(name, str) for name in noted) else None
    except (OSError, UserError):
        return None
