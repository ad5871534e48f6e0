"""The run folder: the identity of a run and its record. Only rank zero touches it."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_dist import checkpoint
from mnist_dist.checkpoint import write_atomically
from mnist_dist.config import Config
from mnist_dist.distributed import Group, is_loss
from mnist_dist.errors import RunError, UserError
from mnist_dist.record import (
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RESULT_FILE,
    STARTS_FILE,
    Holder,
    Record,
    Row,
    check_recipe,
    read_holder,
    read_result,
)
from mnist_dist.tracking import AccelerateTracker, NoTracker, open_tracker
from mnist_dist.weights import WEIGHTS_FILE

if TYPE_CHECKING:
    from mnist_dist.state import TrainingState

_LOCK_WAIT_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a run finds in its folder: the result of a finished run, or the checkpoint to go on from, or nothing."""

    result: dict[str, Any] | None = None
    checkpoint: bytes | None = None


class RunFolder:
    """The folder of one run.

    All ranks call its methods alike; rank zero alone touches the disk, and what it cannot do fails on every rank.
    """

    def __init__(self, config: Config, group: Group) -> None:
        self.config = config
        self.group = group
        self.path = Path(config.run_dir)
        self.checkpoints = self.path / "checkpoints"
        self._lock: int | None = None
        self._record: Record | None = None
        self._writer: checkpoint.Writer | None = None
        self._trackers: list[NoTracker] = []
        self._saved_s = time.monotonic()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()  # before the lock goes: another job may take the folder then
        for tracker in self._trackers:
            tracker.finish(None)
        if self._record is not None:
            self._record.close()
        if self._lock is not None:
            os.close(self._lock)

    def open(self) -> Found:
        """Make or take over the folder. Raises `UserError` if it is another run's, in use or not writable; nothing is changed then."""
        return self.group.on_main(self._open)

    def _open(self) -> Found:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            check_recipe(self.path, self.config)
            checkpoint.remove_temporary_files(self.path, self.checkpoints)
            result = read_result(self.path)
            if result is not None:
                return Found(result=result)
            newest = checkpoint.read_newest(self.checkpoints)
            self._record = Record(self.path / METRICS_FILE)
        except OSError as error:
            raise UserError(
                f"run_dir {self.path} cannot be used: {error.strerror or error}; a folder that can be written is wanted"
            ) from error
        return Found(checkpoint=newest)

    def start(self, step: int, facts: Row) -> None:
        """Begin or continue at `step`: later rows of the record go, and the start is noted in starts.jsonl."""
        self.group.on_main(lambda: self._start(step, facts))

    def _start(self, step: int, facts: Row) -> None:
        assert self._record is not None
        if self.config.log_with is not None:
            self._trackers.append(AccelerateTracker(self.config.log_with, self.path, self.config.model_dump(), step))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            # Only now that data and checkpoint have been found to be this config's.
            write_atomically(self.path / CONFIG_FILE, self.config.to_yaml().encode())
            self._record.truncate(step)
            with (self.path / STARTS_FILE).open("ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # a row that was torn goes
                file.write(json.dumps({"time": now, "step": step, "host": platform.node(), **facts}).encode() + b"\n")
        except OSError as error:
            raise UserError(f"run_dir {self.path} cannot be written: {error.strerror or error}") from error
        self._writer = checkpoint.Writer(self.checkpoints, self.config.keep_checkpoints, self._record.sync)
        self._trackers.append(open_tracker(self.config.wandb, self.path, self.config.model_dump(), project=self.config.wandb_project))

    def append(self, row: Row) -> None:
        """Add a row to the record and its mirror."""
        if self._record is not None:
            self._record.append(row)
            for tracker in self._trackers:
                tracker.log(row)

    def save_if_due(self, state: "TrainingState") -> None:
        """Begin to write a checkpoint if its step or its time has come. Needs no other rank: all have the same state."""
        if self._writer is None:
            return
        by_step = self.config.checkpoint_every and state.step % self.config.checkpoint_every == 0
        by_time = self.config.checkpoint_every_s and time.monotonic() - self._saved_s >= self.config.checkpoint_every_s
        if by_step or by_time:
            self._saved_s = time.monotonic()  # also where nothing comes of it: a slow disk is not asked again at each step
            # Weights that are not finite are left to the next row of the record, which will tell.
            if self._writer.is_free(state.step) and state.is_finite():
                self._writer.submit(state.step, state.encode())

    def save_last(self, state: "TrainingState") -> Path:
        """Write the checkpoint with which this start ends. Raises `RunError` where that fails."""

        def save() -> Path:
            assert self._writer is not None
            if not state.is_finite():
                raise RunError(f"the weights are not finite after step {state.step}; the run stops here and keeps its last checkpoint")
            return self._writer.finish(state.step, state.encode())

        return self.group.on_main(save)

    def finish(self, result: Row, weights: bytes) -> None:
        """Write model.safetensors, then result.json, whose presence means that the run is finished. Raises `RunError`."""

        def write() -> None:
            try:
                write_atomically(self.path / WEIGHTS_FILE, weights)
                write_atomically(self.path / RESULT_FILE, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
            except OSError as error:
                reason = error.strerror or error
                raise RunError(f"the result cannot be written to {self.path}: {reason}; the same command goes on from here") from error

        self.group.on_main(write)

    def publish(self, result: Row) -> None:
        """Draw the finished run's pictures, write its report, complete its mirror. What fails is a warning: the run has ended well."""

        def publish() -> None:
            pictures: list[Path] = []
            try:
                if self.config.report:
                    from mnist_dist.report import write_report  # matplotlib is imported only now

                    _log.info("report: %s", write_report(self.path, self.group.device))
                    pictures = sorted((self.path / "plots").glob("*.png"))
            except Exception as error:
                _log.warning("no report, but the run is whole: %s (python -m mnist_dist.report %s tries again)", error, self.path)
            for tracker in self._trackers:
                tracker.log_images(result["step"], {f"images/{path.stem}": path for path in pictures})
                if self.config.wandb_model:
                    tracker.log_model(self.path / WEIGHTS_FILE)
                tracker.finish(result)

        try:
            self.group.on_main(publish)
        except Exception as error:
            if not is_loss(error):
                raise
            _log.warning("the other ranks did not wait for the report and the mirror of the run, which is finished; see --timeout_s")

    def _take_lock(self) -> None:
        # A lock of the kernel, not a file's presence: it goes with the process that holds it, however that ends. On one node it is certain.
        # Over NFS and Lustre (mounted with -o flock) it holds between nodes, and a dead node's lock goes when the server gives up on it.
        descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock_soon(descriptor)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                _log.warning("the file system of %s has no locks: make sure that no second job uses this folder", self.path)
            else:
                os.close(descriptor)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                holder = read_holder(self.path) or "another process"
                raise UserError(f"run_dir {self.path} is in use by {holder}: wait for it, or use another run_dir") from None
        else:
            own = Holder(os.getpid(), platform.node(), os.environ.get("SLURM_JOB_ID", ""))
            os.ftruncate(descriptor, 0)
            with contextlib.suppress(OSError):  # the text only serves the message above, and launch.jobs
                os.pwrite(descriptor, str(own).encode(), 0)
        self._lock = descriptor


def _lock_soon(descriptor: int) -> None:
    """Lock a file, or raise OSError. A program that lists runs may hold it for a moment, to see whether it is locked."""
    end = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES) or time.monotonic() > end:
                raise
            time.sleep(0.05)
