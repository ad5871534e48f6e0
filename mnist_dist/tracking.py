"""The mirrors of a run, as the training sees them. The run folder is the record: whatever happens here, training goes on.

W&B lives in a process of its own, `mnist_dist.mirror`, which reads rows from a pipe. So the training process imports no wandb, gets
none of its threads, exit hooks and variables, never waits for a server, and can leave a mirror that hangs. Accelerate's `WandBTracker`
is not used for that reason: it calls W&B within the training process, without a deadline and without a way back to offline.

Accelerate's other trackers, such as TensorBoard, are taken as they are, in the training process, and given up at their first failure.
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mnist_dist.errors import UserError
from mnist_dist.files import write_atomically

Mode = Literal["auto", "online", "offline", "disabled"]

_DEFAULT_PROJECT = "mnist-dist"
_INIT_S = 5.0  # how long a server may take to accept the run, before the run is kept offline
_UPLOAD_S = 4.0  # how long a server may take for the rest, at the end
_FINISH_S = 10.0  # how long the end may take in all; covers both, one after the other
_PENDING_BYTES_MAX = 8 << 20
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_SECRET_NAME = re.compile(r"(^|_)(key|apikey|token|secret|password|passwd|credentials?)(_|$)", re.IGNORECASE)
_HIDDEN = "(hidden)"

_log = logging.getLogger(__name__)


class NoTracker:
    """Mirrors nothing: for a run without W&B, and for every rank but zero."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror a row of the record. Takes microseconds, never waits, never raises."""

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Mirror image files under names such as "images/data_sample", as `log` does. They are read within seconds, not at once."""

    def log_model(self, path: Path) -> None:
        """Mirror the file of the trained weights, as `log_images` does."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End the mirror within 10 s: with the result of a finished run, or None for a run that stops before its end."""

    def __enter__(self) -> "NoTracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish(None)


class WandbTracker(NoTracker):
    """Feeds the mirror's process and passes on what it says: how the run is mirrored in one line, and at most one warning."""

    def __init__(self, start: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        """Start the process. Raises OSError."""
        self._command = start["command"]
        # As they look in JSON. Whoever sees a row or a message on W&B must not find a key in it, however it got there.
        self._secrets = [json.dumps(value)[1:-1] for name, value in environ.items() if _SECRET_NAME.search(name) and len(value) >= 8]
        self._pending = bytearray()
        self._heard = b""
        self._warned = False
        self._over = False
        # For what W&B leaves behind where it is killed. A short name: it holds a socket, whose path may have 107 characters.
        self._scratch = tempfile.TemporaryDirectory(prefix="wb", ignore_cleanup_errors=True)
        # A signal to all processes of a job, as scancel sends it, must not end the mirror at the very moment it has to finish: blocked
        # here, it stays blocked there. W&B's own helper process dies of it all the same, but the mirror starts it again.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mnist_dist.mirror"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=dict(environ) | {"TMPDIR": self._scratch.name},
                bufsize=0,
                start_new_session=True,  # Ctrl-C in a terminal is for the training alone
            )
        except OSError:
            self._scratch.cleanup()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._input.fileno(), False)
        os.set_blocking(self._output.fileno(), False)
        self._send(start)

    def log(self, row: Mapping[str, Any]) -> None:  # noqa: D102
        self._send({"row": _flatten(row)})

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:  # noqa: D102
        self._send({"step": step, "images": {name: os.path.abspath(path) for name, path in images.items()}})

    def log_model(self, path: Path) -> None:  # noqa: D102
        self._send({"model": os.path.abspath(path)})

    def finish(self, summary: Mapping[str, Any] | None) -> None:  # noqa: D102
        if self._over:
            return
        deadline = time.monotonic() + _FINISH_S
        self._send({"finish": summary})
        while not self._over and self._process.poll() is None and time.monotonic() < deadline:
            self._exchange()
            if not self._pending:
                self._input.close()
            time.sleep(0.01)
        status = self._process.poll()
        self._hear()
        if status is None:
            self._end(f"W&B did not finish within {_FINISH_S:g} s and is left behind")
        else:
            self._end(f"W&B's process ended with status {status}" if status else None)

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._over:
            return
        try:
            text = json.dumps(message, default=str)
        except (ValueError, TypeError, RecursionError) as error:
            self._warn(f"something that was logged cannot be sent to W&B ({error})")
            return
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        self._pending += text.encode() + b"\n"
        self._exchange()
        if len(self._pending) > _PENDING_BYTES_MAX:
            self._end("W&B's process does not take any more rows")

    def _exchange(self) -> None:
        """Write and read what the pipes take and have at this moment."""
        try:
            while self._pending:
                del self._pending[: os.write(self._input.fileno(), self._pending)]
        except BlockingIOError:
            pass
        except OSError:
            self._hear()  # its own last words come first
            self._end("W&B's process died")
        self._hear()

    def _hear(self) -> None:
        if self._over:
            return
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._output.fileno(), 65_536):
                self._heard += data
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            said = json.loads(line)
            if said["warning"]:
                self._warn(said["text"])
            else:
                _log.info("%s", said["text"])

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("%s; metrics.jsonl has everything; upload what W&B has later with: %s", text, self._command)

    def _end(self, problem: str | None) -> None:
        if self._over:
            return
        self._over = True
        if problem is not None:
            self._warn(problem)
        self._process.kill()
        self._input.close()
        self._output.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a dead file server cannot even be killed
            self._process.wait(1)
        self._scratch.cleanup()


class AccelerateTracker(NoTracker):
    """One of Accelerate's trackers, within the training process. Its first failure is a warning and its end."""

    def __init__(self, name: str, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin or continue at `step`."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        self._name = name
        self._tracker: Any = None
        arguments: dict[str, Any] = {"run_name": config["wandb_project"] or _DEFAULT_PROJECT}
        if kind.requires_logging_directory:
            arguments = {"run_name": run_dir.name, "logging_dir": str(run_dir.absolute() / name)}
        if name == "tensorboard":
            arguments["purge_step"] = step + 1  # what an earlier start logged beyond the checkpoint that this one goes on from
        with self._giving_up():
            tracker = kind(**arguments)
            tracker.start()
            self._tracker = tracker
            if step == 0:
                tracker.store_init_configuration(_hide_secrets(config))
            _log.info("%s follows this run, too", name)

    @staticmethod
    def check(name: str) -> None:
        """Raise `UserError` where the tracker's package is not installed."""
        from accelerate.tracking import get_available_trackers

        if name not in map(str, get_available_trackers()):
            raise UserError(
                f"log_with is {name}, whose package is not installed: pip install it (comet_ml, others by the same name), or leave it out"
            )

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            _log.warning("%s failed and is left out from here on (%s: %s)", self._name, type(error).__name__, error)

    def log(self, row: Mapping[str, Any]) -> None:  # noqa: D102
        if self._tracker is not None:
            with self._giving_up():
                self._tracker.log(_flatten(row), step=row["step"])

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:  # noqa: D102
        if not hasattr(self._tracker, "log_images"):
            return
        import numpy
        from PIL import Image

        with self._giving_up():
            for name, path in images.items():
                image = Image.open(path).convert("RGB")
                if self._name == "tensorboard":
                    self._tracker.log_images({name: numpy.asarray(image)[None]}, step=step, dataformats="NHWC")
                else:
                    self._tracker.log_images({name: [image]}, step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:  # noqa: D102
        if self._tracker is not None:
            with self._giving_up():
                self._tracker.finish()
            self._tracker = None


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """What trackers draw of a row: numbers, and a list such as the accuracy of each class as one number for each entry."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name}/{index}": entry for index, entry in enumerate(value)} if isinstance(value, list) else {name: value}
    return flat


def _hide_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the values whose names look like a secret's."""
    return {name: _HIDDEN if _SECRET_NAME.search(name) else value for name, value in config.items()}


def open_tracker(mode: Mode, run_dir: Path, config: Mapping[str, Any], *, is_main: bool = True, project: str | None = None) -> NoTracker:
    """Begin or continue the mirror of the run in `run_dir`. Returns at once and never raises; what happens is logged.

    `auto` is online with a key and a server that answers, else offline; WANDB_MODE may turn it to offline or disabled. Entity, group,
    tags and notes of the run are W&B's own variables (WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES), and so is the project
    (WANDB_PROJECT) where `project` is None.
    """
    if mode == "auto" and os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        mode = "offline" if os.environ["WANDB_MODE"] == "offline" else "disabled"
    if mode == "disabled" or not is_main:
        return NoTracker()
    run_dir = run_dir.absolute()
    folder = run_dir / "wandb"
    environ = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # that names the helper of another program
    environ |= {"WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_DATA_DIR": str(folder / "data"), "WANDB_ERROR_REPORTING": "false"}
    # The interpreter starts with -P: the folder in which the user happens to stand must not hide a module.
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    try:
        if importlib.util.find_spec("wandb") is None:
            raise OSError("wandb is not installed")
        start = {
            "mode": mode,
            "id": _read_or_make_id(folder / "run_id"),
            "run_dir": str(run_dir),
            "project": project or os.environ.get("WANDB_PROJECT") or _DEFAULT_PROJECT,
            "name": os.environ.get("WANDB_NAME") or run_dir.name,
            "config": _hide_secrets(config),
            "command": f"wandb sync --include-online {shlex.quote(str(folder))}",
            "limits_s": {"init": _INIT_S, "upload": _UPLOAD_S, "finish": _FINISH_S},
        }
        return WandbTracker(start, environ)
    except OSError as error:
        _log.warning("this run is not mirrored to W&B: %s", error.strerror or error)
        return NoTracker()


def _read_or_make_id(path: Path) -> str:
    """The id that the run has on W&B from its first start to its last."""
    with contextlib.suppress(FileNotFoundError):
        found = path.read_text(errors="replace").strip()
        if re.fullmatch(r"[a-z0-9]{8,64}", found):
            return found
    path.parent.mkdir(parents=True, exist_ok=True)
    made = secrets.token_hex(6)
    write_atomically(path, f"{made}\n".encode())
    return made
