"""What is known of runs: from their folders, and of their jobs from Slurm. Reads only; imports no torch."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import Job
from mnist_dist.config import Config
from mnist_dist.errors import UserError
from mnist_dist.preemption import Stop
from mnist_dist.record import (
    CHECKPOINT_NAME,
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RESULT_FILE,
    STARTS_FILE,
    Holder,
    parse_object,
    read_config,
    read_holder,
    read_result,
)

_SILENT_S = 60.0
_SILENT_INTERVALS = 5
_DEPTH = 4
_TAIL_BYTES = 1 << 16

# What Slurm says of a job that has ended without the run being finished.
_ENDS = {"CANCELLED": "cancelled", "TIMEOUT": "out of time", "NODE_FAIL": "node failed", "OUT_OF_MEMORY": "out of memory"}
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
    is_active: bool = False  # queued, running, or about to
    is_finished: bool = False
    is_in_queue: bool = False  # of Slurm
    is_waiting: bool = False  # there, and not running
    step: int = 0
    total: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    images_per_s: float | None = None
    left_s: float | None = None
    silent_s: float | None = None
    restarts: int = 0
    job: str = ""
    nodes: str = ""
    pid: int | None = None  # of rank zero, where it runs on this machine


def find_runs(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The run folders in `folder`, itself included."""
    if is_run(folder):
        yield folder
        return
    try:
        inner = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for path in inner if depth else []:
        yield from find_runs(Path(path), depth - 1)


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run's, begun or only queued."""
    return any((folder / name).exists() for name in (CONFIG_FILE, LOCK_FILE, "slurm/job.json"))


def read_state(path: Path, jobs: list[Job]) -> RunState:
    """The run in folder `path`, whose job may be one of `jobs`. What is missing or damaged there counts as not known."""
    noted, ended = (read_object(path / "slurm" / name) for name in ("job.json", "end.json"))
    result, damage = _read_result(path)
    config = _read_config(path)
    starts, rows = _read_rows(path / STARTS_FILE), _read_rows(path / METRICS_FILE)
    holder = read_holder(path)
    number = holder.job if holder else ""
    # An array's job in the lock has Slurm's own number; a job that was submitted later than the one of the lock is the one that counts.
    matching = [job for job in jobs if job.name == noted.get("job") or (number and job.number == number)]
    job = max(matching, key=lambda job: (job.is_active, int(job.number)), default=None)
    measured: dict[str, Any] = {}
    for row in rows:
        measured |= row
    step = result.get("step") or max(measured.get("step") or 0, find_saved_step(path) or 0)
    values: dict[str, Any] = {
        "path": path,
        "step": step,
        "total": config.total_steps if config else None,
        "loss": measured.get("train/loss"),
        "accuracy": result.get("test/accuracy", measured.get("test/accuracy")),
        "images_per_s": result.get("images_per_s", measured.get("train/images_per_s")),
        "restarts": max(len(starts) - 1, 0),
        "job": job.name if job else str(noted.get("job") or number),
        "nodes": job.nodes if job and job.nodes else str(starts[-1].get("host", "")) if starts else "",
    }
    if result:
        return RunState(state="finished", is_finished=True, **values)
    pid = _find_process(path / LOCK_FILE, holder)
    if job is not None and job.is_active:
        waits = job.state not in ("RUNNING", "COMPLETING")
        state = job.state.lower().replace("_", " ")
        if waits and job.reason and job.reason != "None":
            state += f" ({job.reason})"
        if job.state == "RUNNING":
            values |= _describe_progress(path, values, config)
        return RunState(state=state, is_active=True, is_in_queue=True, is_waiting=waits, pid=pid, **values)
    if pid is not None or _is_locked_elsewhere(path / LOCK_FILE, holder):
        values |= _describe_progress(path, values, config)
        return RunState(state="running", is_active=True, pid=pid, **values)
    if damage:
        return RunState(state=damage, **values)
    return RunState(state=_describe_end(job, noted, ended, bool(starts)), **values)


def _describe_end(job: Job | None, noted: dict[str, Any], ended: dict[str, Any], started: bool) -> str:
    if ended and (not noted or ended.get("job") == noted.get("job")):
        status = ended.get("status")
        if job is not None and job.state == "CANCELLED" and status in _STATUSES:
            return "cancelled, saved"
        return _STATUSES.get(status, f"failed (exit status {status})") if isinstance(status, int) else "failed"
    if job is not None:
        return _ENDS.get(job.state, "failed")
    return "stopped" if started else "not started"  # its job is gone and has not said how


def _describe_progress(path: Path, values: dict[str, Any], config: Config | None) -> dict[str, Any]:
    speed, total = values["images_per_s"], values["total"]
    if not speed or not config or total is None:
        return {}
    progress: dict[str, Any] = {"left_s": max(total - values["step"], 0) * config.batch_size / speed}
    changed = [file.stat().st_mtime for name in (METRICS_FILE, STARTS_FILE) if (file := path / name).exists()]
    quiet_s = time.time() - max(changed, default=time.time())
    if quiet_s > max(_SILENT_S, _SILENT_INTERVALS * config.log_every * config.batch_size / speed):
        progress["silent_s"] = quiet_s
    return progress


def find_saved_step(path: Path) -> int | None:
    """The step of the newest checkpoint."""
    matches = (CHECKPOINT_NAME.fullmatch(file.name) for file in (path / "checkpoints").glob("step_*"))
    return max((int(match[1]) for match in matches if match), default=None)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none."""
    try:
        return parse_object(path.read_bytes())
    except OSError:
        return {}


def _read_result(path: Path) -> tuple[dict[str, Any], str]:
    try:
        return read_result(path) or {}, ""
    except UserError:
        return {}, f"damaged {RESULT_FILE}"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of a file of JSON objects."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except OSError:
        return []
    return [row for row in map(parse_object, lines) if row]


def _read_config(path: Path) -> Config | None:
    try:
        return read_config(path)
    except UserError:
        return None


def _find_process(lock: Path, holder: Holder | None) -> int | None:
    """The process of this machine that holds the lock. To try the lock could make a run that starts just now believe that it is taken."""
    if holder is None or holder.host != platform.node():
        return None
    try:
        for descriptor in os.scandir(f"/proc/{holder.pid}/fd"):
            if os.path.samefile(descriptor.path, lock):
                return holder.pid
    except OSError:
        return None
    return None


def _is_locked_elsewhere(lock: Path, holder: Holder | None) -> bool:
    """Whether another machine holds the lock, as far as the file system tells."""
    if holder is None or holder.host == platform.node():
        return False
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
