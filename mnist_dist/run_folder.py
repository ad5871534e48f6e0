"""The run folder: the identity of a run and its record. Of the ranks only rank zero writes here, but for the stacks of one that hangs."""

import contextlib
import dataclasses
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import accelerate
import torch

import mnist_dist
from mnist_dist import checkpoint
from mnist_dist.config import Config
from mnist_dist.distributed import Group
from mnist_dist.errors import NotFiniteError, RunError, UserError, first_line, is_lost_rank
from mnist_dist.files import append_line, describe_error, write_atomically
from mnist_dist.lock import Lock
from mnist_dist.preemption import Stop, Stopped
from mnist_dist.record import (
    CHECKPOINTS,
    CONFIG_FILE,
    ENDS_FILE,
    METRICS_FILE,
    RESULT_FILE,
    STACKS,
    STARTS_FILE,
    WEIGHTS_FILE,
    Record,
    check_folder,
    count_memory_kills,
    has_begun,
    is_count,
    make_timestamp,
    read_ends,
    read_result,
    read_starts,
    remove_temporary_files,
)
from mnist_dist.source import find_changed, hash_package, note_named
from mnist_dist.task import Data, Evaluation, Panel, Row
from mnist_dist.tracking import AccelerateTracker, NoTracker, check_project, open_tracker

if TYPE_CHECKING:
    from mnist_dist.state import TrainingState

# What the rounding of sums depends on, of the facts of a start.
_BIT_NAMES = ("processor", "device", "precision", "threads", "micro_batch", "torch", "mnist_dist")

_log = logging.getLogger(__name__)


class RunFolder:
    """The folder of one run.

    All ranks call its methods alike; rank zero alone touches the disk, and what it cannot do fails on every rank.
    """

    def __init__(self, config: Config, group: Group, folder: Path | None = None) -> None:
        self.config = config
        self.group = group
        self.path = folder or Path(config.run_dir)
        self._lock: Lock | None = None
        self._record: Record | None = None  # this, the lock and the writer: on rank zero alone
        self._writer: checkpoint.Writer | None = None
        self._trackers: list[NoTracker] = []
        self._saved_s = time.monotonic()
        self._starts = 0  # with this one
        self._memory_kills: int | None = None  # of this host, before this start
        self._begun = 0  # the step that this start resumes from
        self._step = 0  # of the last row or checkpoint
        self._saved: int | None = None  # the step of the last checkpoint of this start
        self._stop = Stop.NONE
        self._is_finished = False

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and is_lost_rank(error) and self.group.size > 1:
            error = RunError(self.group.explain(error))  # before anything that takes its time: the others wait for this rank's answer
        with contextlib.ExitStack() as last:  # the last line comes first, and each comes whatever the others do
            if self._lock is not None:
                last.callback(self._lock.release)  # nothing is written after it: another job may take the folder then
            if self._record is not None:
                last.callback(self._record.close)
            for tracker in reversed(self._trackers):
                last.callback(tracker.finish, None, stopped=self._stop != Stop.NONE)
            if self._writer is not None:
                if not self._is_finished:
                    last.callback(self._note_end, error)
                last.callback(self._writer.close)

    def check(self) -> Row | None:
        """The result, if the run is finished. Raises `UserError` for what makes this start impossible; nothing is made or changed."""

        def check() -> Row | None:
            check_folder(self.path, self.config)
            result = read_result(self.path, self.config)
            if result is not None:
                return result
            if self.config.wandb != "disabled" and self.config.wandb_project is not None:
                check_project(self.config.wandb_project)
            if self.config.log_with is not None:
                AccelerateTracker.check(self.config.log_with)
            for folder in (self.path, self.path / CHECKPOINTS):
                if os.path.exists(folder) and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                    raise UserError(f"run_dir {self.path} cannot be used: {folder} is not readable and writable")
            return None

        return self.group.on_main(check)

    def open(self, model_bytes: int, is_asked_to_stop: Callable[[], bool] = lambda: False) -> checkpoint.Saved | None:
        """Make or take over the folder; the newest checkpoint in it, of a model of so many bytes.

        Raises `UserError` if it is in use or not writable, `RunError` if it has checkpoints of which none can be used, or if another host
        keeps it from a job.
        """
        return self.group.on_main(lambda: self._open(model_bytes, is_asked_to_stop))

    def _open(self, model_bytes: int, is_asked_to_stop: Callable[[], bool]) -> checkpoint.Saved | None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # The other ranks wait for this one, for timeout_s at most.
            self._lock = Lock(self.path, self.config.timeout_s / 2, is_asked_to_stop)
            check_folder(self.path, self.config)  # again: another run may have come first
            if read_result(self.path, self.config) is not None:
                raise UserError(f"run_dir {self.path} has been finished by another process meanwhile; nothing is left to do")
            if has_begun(self.path):  # in any other folder, such files are somebody else's
                remove_temporary_files(self.path)
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            newest = checkpoint.read_newest(self.path / CHECKPOINTS, model_bytes)
            if newest is None and (step := self._find_saved_step()):
                raise UserError(
                    f"run_dir {self.path} has no checkpoint any more, and its record says that step {step} was saved: a start from the "
                    "beginning would remove the rows of its record. Restore the checkpoints, or use another run_dir"
                )
            self._record = Record(self.path / METRICS_FILE)
        except OSError as error:
            is_loose = self.path.is_symlink() and not self.path.exists()
            reason = "it is a link to what is not there" if is_loose else describe_error(error)
            raise UserError(f"run_dir {self.path} cannot be used: {reason}; expected a writable folder") from error
        return newest

    def _find_saved_step(self) -> int:
        """The step that an earlier start began from, or that was saved when one was stopped; 0 where none is noted."""
        steps = [row.get("step") for row in read_starts(self.path)]
        for end in read_ends(self.path):
            steps.append(end.get("saved"))
            if str(end.get("why")).startswith(("stopped", "finished")):  # older versions noted no more
                steps.append(end.get("step"))
        return max(filter(is_count, steps), default=0)

    def start(self, step: int, facts: Row, promised_rows: Sequence[int], rows_end: int) -> None:
        """Begin or continue at `step`: rows later than `rows_end` go, and the start is noted in starts.jsonl.

        `promised_rows`: the steps whose rows the record must have, as the checkpoint says.
        """
        self.group.on_main(lambda: self._start(step, facts, promised_rows, rows_end))
        self.group.keep_stacks_in(Path(self.group.broadcast(str(self.path / STACKS))))  # of verify, each rank has a folder of its own

    def _start(self, step: int, facts: Row, promised_rows: Sequence[int], rows_end: int) -> None:
        assert self._record is not None
        self._begun = self._step = step
        self._memory_kills = count_memory_kills()
        start = {
            "time": make_timestamp(),
            "step": step,
            "host": platform.node(),
            **facts,
            **_describe_origin(),
            "source": self.config.task.source,
            "mnist_dist": hash_package(),
        }
        start["memory_kills"] = self._memory_kills  # a start that is killed can note nothing more
        writer = checkpoint.Writer(self.path / CHECKPOINTS, self.config.keep_checkpoints, self._sync)
        try:
            # Only now that data and checkpoint have been found to be this config's.
            write_atomically(self.path / CONFIG_FILE, self.config.to_yaml().encode())
            self._record.cut_back(rows_end, promised_rows)
            self._compare(start)
            self._starts = append_line(self.path / STARTS_FILE, json.dumps(start).encode())
        except OSError as error:
            raise UserError(f"run_dir {self.path} cannot be written: {describe_error(error)}") from error
        note_named(self.config.task.name)  # by this user, who has started it
        self._writer = writer
        if self.config.log_with is not None:
            self._trackers.append(AccelerateTracker(self.config.log_with, self.path, self.config.values(), rows_end))
        split, task = self.config.evaluated_split, self.config.task
        mirror = open_tracker(
            self.config.wandb,
            self.path,
            self.config.values(),
            project=self.config.wandb_project,
            facts={**start, "versions": describe_versions()},
            job_type="train",
            tags=[str(self.config.values().get("dataset", task.short_name)), self.config.optimizer],
            notes=f"{self.path.absolute()} on {platform.node()}",
            system_metrics=self.config.system_metrics,
            best={"train/loss": "min", f"{split}/loss": "min", self.config.best: "max" if task.higher_is_better else "min"},
        )
        self._trackers.append(mirror)

    def _compare(self, start: Row) -> None:
        """Warn where this start computes with other things than the one before."""
        before = next(reversed(read_starts(self.path)), {})
        changed = find_changed(str(before.get("source", start["source"])), start["source"])
        if changed:
            _log.warning(
                "the code of task %s has changed since the last start (%s); the run goes on with the new code",
                self.config.task.name,
                ", ".join(changed),
            )
        if before:  # older versions noted none
            before = {"mnist_dist": "of an older version"} | before
        differing = [f"{name} {before[name]}, now {start[name]}" for name in _BIT_NAMES if before.get(name, start[name]) != start[name]]
        what = "shards give" if self.config.shards else "a run that is resumed has"
        # On another number of processes a run without shards is the same up to rounding anyway.
        if differing and (self.config.shards or before.get("world_size") == start["world_size"]):
            _log.warning("%s the same bits only where these are the same; the last start had %s", what, "; ".join(differing))

    def _sync(self) -> None:
        assert self._lock is not None
        assert self._record is not None
        self._lock.check()
        self._record.sync()

    def _note_end(self, error: BaseException | None) -> None:
        status = 0
        if self._is_finished:
            why = "finished"
        elif self._stop:
            why, status = f"stopped by {self._stop.cause}, saved", self._stop.exit_code
        else:
            status = getattr(error, "exit_code", RunError.exit_code)
            why = f"failed: {first_line(error or RunError())[:300]}"
        assert self._lock is not None
        with contextlib.suppress(OSError, RunError):  # the log has it as well
            folder = self._lock.find_folder()
            end: Row = {"time": make_timestamp(), "step": self._step, "start": self._starts, "why": why, "status": status}
            end["lasting"] = isinstance(error, NotFiniteError)
            if self._saved is not None:
                end["saved"] = self._saved
            kills = count_memory_kills()
            if kills is not None and self._memory_kills is not None and kills > self._memory_kills:
                end["memory_kills"] = kills - self._memory_kills
            append_line(folder / ENDS_FILE, json.dumps(end).encode())

    @property
    def stop_requested(self) -> Stop:
        """What the mirror of the run asks for: to end, where somebody pressed Stop on its page."""
        return Stop.TERMINATE if any(tracker.stop_requested for tracker in self._trackers) else Stop.NONE

    def append(self, row: Row) -> None:
        """Add a row to the record and its mirror."""
        if self._record is not None:
            assert self._lock is not None
            assert self._writer is not None
            self._lock.check()
            self._step = row["step"]
            row = row | {"health/restarts": self._starts - 1} | self._writer.describe()
            self._record.append(row)
            for tracker in self._trackers:
                tracker.log(row)

    def show_samples(self, step: int, data: Data, drawn: object) -> None:
        """Send the trackers what is trained on; `drawn` is what the step after `step` draws for it."""
        self._show(step, lambda: self.config.task.draw_samples(data, drawn))

    def show_evaluation(self, step: int, data: Data, evaluation: Evaluation, most: int = 20) -> None:
        """Send the trackers what the evaluation after `step` found, with at most `most` examples."""
        chosen = dataclasses.replace(evaluation, examples=evaluation.examples[:most])
        self._show(step, lambda: self.config.task.draw_evaluation(data, chosen))

    def _show(self, step: int, draw: Callable[[], list[Panel]]) -> None:
        """Draw panels for the trackers that take pictures. What fails on the way to them is a warning."""
        trackers = [tracker for tracker in self._trackers if tracker.takes_pictures]
        try:
            panels = draw() if trackers else []
            for tracker in trackers:
                tracker.log_panels(step, panels)
        except Exception as error:
            _log.warning("pictures for the trackers are left out: %s", error)

    def save_if_due(self, state: "TrainingState") -> None:
        """Begin to write a checkpoint if its step or its time has come. Needs no other rank: all have the same state."""
        if self._writer is None:
            return
        by_step = self.config.checkpoint_every and state.step % self.config.checkpoint_every == 0
        by_time = self.config.checkpoint_every_s and time.monotonic() - self._saved_s >= self.config.checkpoint_every_s
        if by_step or by_time:
            self._saved_s = time.monotonic()  # also where nothing comes of it: a slow disk is not asked again at each step
            if self._writer.is_free(state.step):
                assert self._record is not None
                self._writer.submit(state.step, state.copy(self._record.copy_steps()))

    def save_last(self, state: "TrainingState", stop: Stop = Stop.NONE) -> Path:
        """Write the checkpoint with which this start ends, because of `stop` or at the end. Raises `RunError` where that fails."""
        saved: list[Path] = []

        def save() -> Path:
            saved.append(self._save_last(state, stop))
            return saved[0]

        try:
            return self.group.on_main(save)
        except Exception as error:
            if not (stop and saved and is_lost_rank(error)):
                raise
            _log.warning("the checkpoint is written, but not all ranks lived to hear of it: %s", self.group.explain(error))
            return saved[0]

    def _save_last(self, state: "TrainingState", stop: Stop = Stop.NONE) -> Path:
        assert self._writer is not None
        assert self._record is not None
        assert self._lock is not None
        self._lock.check(at_end=True)
        path = self._writer.finish(state.step, state.copy(self._record.copy_steps()))
        self._stop, self._step, self._saved = stop, state.step, state.step
        return path

    @contextlib.contextmanager
    def saving_what_is_done(self, state: "TrainingState") -> Iterator[None]:
        """Where what comes fails, save the steps of this start, if the state is whole and checkpoints are asked for.

        Needs no other rank.
        """
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            is_cut_off = is_lost_rank(error) and self.group.size > 1
            if is_cut_off:
                self.group.explain(error)  # the others wait for this rank's answer
            can_save = state.is_whole and not (is_cut_off and self.group.device.type != "cpu")  # a GPU may wait for the lost rank for ever
            is_asked_for = self._writer is not None and (self.config.checkpoint_every or self.config.checkpoint_every_s)
            if is_asked_for and can_save and state.step > self._begun:
                self._save_before_failure(state)
            raise

    def _save_before_failure(self, state: "TrainingState") -> None:
        try:
            _log.info("saved %s: the steps before the failure", self._save_last(state))
        except NotFiniteError:  # of which the failure is one
            pass
        except Exception as error:  # such as of a device that has failed
            _log.warning("the steps since the last checkpoint cannot be saved: %s", error)

    def finish(self, result: Row, weights: bytes) -> None:
        """Write model.safetensors, then result.json, whose presence means that the run is finished. Raises `RunError`."""

        def write() -> None:
            assert self._lock is not None
            self._lock.check(at_end=True)
            try:
                write_atomically(self.path / WEIGHTS_FILE, weights)
                write_atomically(self.path / RESULT_FILE, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
            except OSError as error:
                raise RunError(
                    f"the result cannot be written to {self.path}: {describe_error(error)}; the same command resumes from here"
                ) from error

            self._is_finished = True
            self._note_end(None)  # now, as the report shows it

        try:
            self.group.on_main(write)
        except Exception as error:
            if not (self._is_finished and is_lost_rank(error)):  # publish says it: it finds the other ranks gone, too
                raise

    def publish(self, result: Row, data: Data, evaluation: Evaluation) -> None:
        """Draw the finished run's pictures, write its report, complete its mirror. What fails is a warning: the run has ended well."""

        def publish() -> None:
            pictures: list[Path] = []
            try:
                if self.config.report:
                    from mnist_dist.report import write_report  # matplotlib is imported only now

                    # The task in hand draws, with the data in hand.
                    page, *pictures = write_report(self.path, self.group.device, self.config, data)
                    _log.info("report: %s", page)
            except Exception as error:
                _log.warning("no report, but the run is finished: %s (python -m mnist_dist.report %s tries again)", error, self.path)
            self.show_evaluation(result["step"], data, evaluation, most=100)
            for tracker in self._trackers:
                tracker.log_images(result["step"], {f"images/{path.stem}": path for path in pictures})
                if self.config.wandb_model:
                    tracker.log_model(self.path / WEIGHTS_FILE)
                tracker.finish(result)

        try:
            self.group.on_main(publish)
        except Exception as error:
            if not is_lost_rank(error):
                raise
            _log.warning("the other ranks did not wait for the report and the mirror of the run, which is finished; see --timeout_s")


def describe_versions() -> dict[str, str]:
    """The versions of what a run is computed with."""
    return {
        "mnist_dist": mnist_dist.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
    }


def _describe_origin() -> Row:
    """The job and the commit that this start is of, where there are such."""
    origin: Row = {}
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    if job:
        origin["job"] = job
    checkout = Path(mnist_dist.__file__).resolve().parents[1]
    if (checkout / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*"]
            # Not the repository of a hook that may have started this; and no lock in a checkout that many jobs share.
            environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
            answer = subprocess.run(command, env=environ, text=True, capture_output=True, check=True, timeout=5)
            origin["git_commit"] = answer.stdout.strip()
    return origin
