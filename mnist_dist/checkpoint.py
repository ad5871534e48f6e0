"""Checkpoints: one file for the whole run, for any number of processes; complete or absent, never torn.

A file's name carries its step and the SHA-256 of its bytes (`step_00001200-9f86d081884c7d65.pt`), so one rename publishes both, and
damage to any byte shows. It is an ordinary `torch.save` file, always loaded with `weights_only=True`.
"""

import contextlib
import hashlib
import io
import logging
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mnist_dist.errors import NotFiniteError, RunError, UserError, first_line
from mnist_dist.files import describe_error, read_file, write_atomically
from mnist_dist.model import is_finite
from mnist_dist.record import find_step, list_newest_first

FORMAT = 2

# What a checkpoint has beside its tensors: a recipe, the steps of a million rows, and the zip file's own lists.
_ROOM_BYTES = 64 << 20
_log = logging.getLogger(__name__)


class Saved(NamedTuple):
    """A checkpoint as it was found: its file, and the file's bytes."""

    path: Path
    content: bytes


def encode(state: dict[str, Any]) -> memoryview:
    """`state` as the bytes of a checkpoint."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    return buffer.getbuffer()


def decode(content: bytes) -> dict[str, Any]:
    """The state in a checkpoint's bytes, on the CPU.

    Raises `RunError` for anything that is not safe and of this program, `UserError` for another format of it.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(content):  # this program compresses nothing
                raise ValueError("it would unpack to more than its size")
        with warnings.catch_warnings(action="ignore"):  # of kinds of tensors that are refused below
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        version = state.pop("format")
    except Exception as error:  # zipfile, pickle and torch raise nearly every kind
        raise RunError(f"it is not a checkpoint of this program: {first_line(error)[:200]}") from error
    if type(version) is not int or version != FORMAT:
        raise UserError(f"it has format {str(version)[:40]}, this version of mnist_dist reads {FORMAT}: use the version that wrote it")
    return state


def write(folder: Path, step: int, content: bytes | memoryview, keep: int) -> Path:
    """Write a checkpoint atomically, then delete all but the newest `keep`. Raises OSError; the older ones are then still there."""
    folder.mkdir(exist_ok=True)  # somebody may have removed it
    path = folder / f"step_{step:08d}-{_checksum(content)}.pt"
    write_atomically(path, content)
    # Files of a higher step failed their checksum: they do not count until the run has come as far.
    others = [old for old in list_newest_first(folder) if old != path and find_step(old) <= step]
    older = [old for old in others if find_step(old) < step]
    for old in {*others} - {*older[: keep - 1]}:  # one of the same step, as of a stop amid its evaluation, is out of date
        with contextlib.suppress(OSError):  # somebody's folder of such a name; the checkpoint itself is written
            old.unlink(missing_ok=True)
    return path


def read_newest(folder: Path, model_bytes: int) -> Saved | None:
    """The newest valid checkpoint in `folder` of a model of so many bytes; None where there is no checkpoint at all.

    Names on the log what it skips. Raises `RunError` if there are checkpoints but none is valid: that must not become a fresh start; and
    if one cannot be read: it may be valid, and the rows of the record up to its step would be lost.
    """
    paths = list_newest_first(folder)
    for path in paths:
        try:
            content = read_file(path, _ROOM_BYTES + 4 * model_bytes)  # an optimizer keeps at most three numbers for each of the model's
        except OSError as error:
            raise RunError(
                f"checkpoint {path} cannot be read ({error.strerror or error}): the same command tries again; "
                "remove it to resume from an older one"
            ) from error
        if path.stem.endswith(f"-{_checksum(content)}"):
            return Saved(path, content)
        _log.warning("skipped checkpoint %s: it is damaged (%d bytes, whose checksum is not the one in its name)", path, len(content))
    if paths:
        raise RunError(
            f"none of the {len(paths)} checkpoints in {folder} is valid: restore one of them, or use another run_dir to start afresh"
        )
    return None


def _checksum(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class Writer:
    """Writes checkpoints in the background, so that a slow disk does not hold up the training; one at a time."""

    def __init__(self, folder: Path, keep: int, sync_record: Callable[[], None]) -> None:
        self.folder = folder
        self.keep = keep
        self._sync_record = sync_record
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._thread.submit(int).result()  # started now: a host that later starts no more threads costs no checkpoint
        self._running: Future[None] | None = None
        self._took_s: float | None = None

    def is_free(self, step: int) -> bool:
        """Whether the last one is written; if not, a warning says that there will be none at `step`."""
        if self._running is None or self._running.done():
            return True
        _log.warning("no checkpoint at step %d: the disk of %s is still busy with the last one", step, self.folder)
        return False

    def submit(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write a copy of the state, once the last one is written (`is_free`).

        What the disk refuses, and a state that is not finite, is a warning: training goes on. Raises `RunError` where the last one found
        that the folder is no longer this run's.
        """
        self._raise_failure()
        self._running = self._thread.submit(self._write_if_finite, step, state)

    def finish(self, step: int, state: dict[str, Any]) -> Path:
        """Write the last checkpoint and wait until it is on the disk. Raises `RunError` where that fails."""
        self._raise_failure()

        def write() -> Path:
            if names := _list_infinite(state):
                raise NotFiniteError(
                    f"the weights, or the optimizer's state, are not finite after step {step} ({names[0]}); the run stops here and keeps "
                    "its last checkpoint"
                )
            return self._write(step, state)

        try:
            # In the thread, too: a rank with a GPU that is to leave counts as hung where its main thread does much else than wait.
            return self._thread.submit(write).result()
        except OSError as error:
            raise RunError(f"the checkpoint of step {step} could not be written: {describe_error(error)}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Wait for the checkpoint that is being written, if any. Raises as `submit` does."""
        self._thread.shutdown(wait=True)
        self._raise_failure()

    def describe(self) -> dict[str, float]:
        """How long the last checkpoint took to write, under the name that a row has for it; nothing before the first."""
        return {} if self._took_s is None else {"health/checkpoint_s": round(self._took_s, 3)}

    def _write_if_finite(self, step: int, state: dict[str, Any]) -> None:
        if names := _list_infinite(state):
            _log.warning("no checkpoint at step %d: its weights, or the optimizer's state, are not finite (%s)", step, names[0])
            return
        try:
            self._write(step, state)
        except OSError as error:
            _log.warning("a checkpoint could not be written, training goes on without it: %s (step %d)", describe_error(error), step)

    def _write(self, step: int, state: dict[str, Any]) -> Path:
        begun_s = time.monotonic()
        content = encode(state)
        self._sync_record()  # the rows up to this step must be on the disk before a checkpoint says that they are done
        path = write(self.folder, step, content, self.keep)
        self._took_s = time.monotonic() - begun_s
        return path

    def _raise_failure(self) -> None:
        if self._running is not None:
            error, self._running = self._running.exception(), None
            if error is not None:
                raise error


def _list_infinite(state: dict[str, Any]) -> list[str]:
    """The names of the tensors in a state that are not finite, the weights first."""
    tensors = dict(state["model"])
    for index, slots in state.get("optimizer", {}).get("state", {}).items():
        tensors |= {f"{name} of parameter {index}": value for name, value in slots.items()}
    return [name for name, value in tensors.items() if isinstance(value, torch.Tensor) and not is_finite(value)]
