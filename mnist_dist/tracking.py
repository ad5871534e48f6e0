"""The mirrors of a run, as the training sees them. The run folder is the record: whatever happens here, training goes on.

W&B lives in a process of its own, `mnist_dist.mirror`, which reads rows from a pipe. So the training process imports no wandb, gets
none of its threads, exit hooks and variables, never waits for a server, and can leave a mirror that hangs. Accelerate's `WandBTracker`
is not used for that reason: it calls W&B within the training process, without a deadline and without a way back to offline.

Accelerate's other trackers, such as TensorBoard, are taken as they are, in the training process, and given up at their first failure.
Imports no torch: the process may be started while that is imported.
"""

import configparser
import contextlib
import fcntl
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mnist_dist.errors import UserError
from mnist_dist.figures import render
from mnist_dist.files import is_marked, mark_folder, read_text, write_atomically
from mnist_dist.preemption import holding_back_signals
from mnist_dist.task import Panel
from mnist_dist.world import World, choose_threads

Mode = Literal["auto", "online", "offline", "disabled"]
Best = Mapping[str, Literal["min", "max"]]

_DEFAULT_PROJECT = "mnist-dist"
_INIT_S = 5.0  # how long a server may take to accept the run, before the run is kept offline
_ANSWER_S = 3.0  # how long a server may take to answer what W&B asks before it sends tables and weights
_UPLOAD_S = 4.0  # how long a server may take for the rest, at the end
_FINISH_S = 10.0  # how long the end may take in all; covers all three, one after the other, or nearly so
_PENDING_BYTES_MAX = 8 << 20
_SMALL_FILE_BYTES = 65_536
_NOT_IN_A_PROJECT = "/\\#?%:"  # by W&B's rule, as the next
_NAME_LENGTH_MAX = 128
_SCRATCH_PREFIX = "mirror-tmp-"
_SCRATCH_NAME = re.compile(rf"{_SCRATCH_PREFIX}[a-z0-9_]{{8}}")
_PATHS = ("run_dir", "images", "image", "model")  # of messages
# What of the environment the mirror's process needs to find and read the same files as this one.
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONUTF8")
# The first names the helper of another program; at the others W&B writes the API key into its logs, in the run folder.
_UNFIT_VARIABLES = ("WANDB_SERVICE", "WANDB_DEBUG", "WANDB_CORE_DEBUG")
# The run folder says which run on W&B this is.
_IDENTITY_VARIABLES = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")
_SECRET_NAME = re.compile(r"(^|_)(key|apikey|token|secret|password|passwd|credentials?)(_|$)", re.IGNORECASE)
_ID = re.compile(r"[a-z0-9]{8,64}")
_CREDENTIALS_IN_URL = re.compile(r"//[^/@\s]+@")
_HIDDEN = "(hidden)"

_log = logging.getLogger(__name__)


class NoTracker:
    """Mirrors nothing: for a run without W&B, and for every rank but zero."""

    takes_pictures = False

    @property
    def stop_requested(self) -> bool:
        """Whether someone pressed stop on the page of the run. Takes microseconds, never waits, never raises."""
        return False

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror a row of the record. Takes microseconds, never waits, never raises."""

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Mirror image files under names such as "images/data_sample", as `log` does. They are read within seconds, not at once."""

    def log_panels(self, step: int, panels: Sequence[Panel]) -> None:
        """Mirror figures, tables and confusion matrices of a task, as `log_images` does."""

    def log_model(self, path: Path) -> None:
        """Mirror the file of the trained weights, as `log_images` does."""

    def finish(self, summary: Mapping[str, Any] | None, stopped: bool = False) -> None:
        """End the mirror within 10 s.

        `summary` is the result of a finished run, or None for a run that ends before: `stopped` by a signal and saved, or else failed.
        """


class WandbTracker(NoTracker):
    """Feeds the mirror's process and passes on what it says: how the run is mirrored in one line, and at most one warning."""

    takes_pictures = True

    def __init__(self, start: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        """Start the process, which goes online with `environ`. Raises OSError."""
        self._folder = Path(start["run_dir"], "wandb")
        # Whoever sees a row or a message on W&B must not find a key in it, however it got there; nor in a message here, where W&B may
        # quote one that is damaged.
        values = [value for name, value in environ.items() if _SECRET_NAME.search(name)]
        values += [piece for value in values for piece in value.split() if len(piece) >= 20]
        self._secrets = sorted({value for value in values if len(value) >= 8}, key=len, reverse=True)
        self._heard = b""
        self._warned = False
        self._over = False
        self._stop_requested = False
        # For what W&B leaves behind where it is killed. In the run folder, where the next start finds it, on whatever machine that is.
        self._scratch = tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=self._folder)
        if os.path.expanduser("~") == "~":  # a user whom this machine does not know: W&B would not even start
            environ = {**environ, "HOME": self._scratch}
        bare = {"HOME": self._scratch, **_find_places(self._folder)}
        self._pending = bytearray(b"".join(json.dumps(variables).encode() + b"\n" for variables in (bare, dict(environ))))
        try:
            self._process = _ahead.pop() if _ahead else _start_process()
        except OSError:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._input.fileno(), False)
        os.set_blocking(self._output.fileno(), False)
        self._send(start)

    @property
    def stop_requested(self) -> bool:  # noqa: D102
        self._hear()
        return self._stop_requested

    def log(self, row: Mapping[str, Any]) -> None:  # noqa: D102
        self._send({"row": _flatten(row)})

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:  # noqa: D102
        if images:
            self._send({"step": step, "images": {name: os.path.abspath(path) for name, path in images.items()}})

    def log_panels(self, step: int, panels: Sequence[Panel]) -> None:  # noqa: D102
        self.log_images(step, {panel.name: self._keep_picture(render(panel.figure)) for panel in panels if panel.figure is not None})
        tables = {panel.name: panel.table for panel in panels if panel.table is not None}
        matrices = {panel.name: panel.matrix for panel in panels if panel.matrix is not None}
        if tables or matrices:
            found = {
                name: {"columns": list(header), "rows": [[self._show_cell(cell) for cell in row] for row in rows]}
                for name, (header, rows) in tables.items()
            }
            counted = {name: {"classes": list(classes), "counts": counts} for name, (classes, counts) in matrices.items()}
            self._send({"step": step, "tables": found, "matrices": counted})

    def _show_cell(self, cell: Any) -> Any:
        if isinstance(cell, bytes):
            return {"image": os.path.abspath(self._keep_picture(cell))}
        return cell if isinstance(cell, int | float | str | None) else str(cell)

    def _keep_picture(self, png: bytes) -> Path:
        """The file of a picture: W&B reads it within seconds, not at once. The same one may be shown many times."""
        path = self._folder / "pictures" / f"{hashlib.sha256(png).hexdigest()[:16]}.png"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, png, durable=False)
        return path

    def log_model(self, path: Path) -> None:  # noqa: D102
        self._send({"model": os.path.abspath(path)})

    def finish(self, summary: Mapping[str, Any] | None, stopped: bool = False) -> None:  # noqa: D102
        if self._over:
            return
        deadline = time.monotonic() + _FINISH_S
        self._send({"finish": summary, "stopped": stopped})
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
            text = json.dumps(self._hide(json.loads(json.dumps(message, default=str))))
        except (ValueError, TypeError, RecursionError) as error:
            self._warn(f"something that was logged cannot be sent to W&B ({error})")
            return
        self._pending += text.encode() + b"\n"
        self._exchange()
        if len(self._pending) > _PENDING_BYTES_MAX:
            self._end("W&B's process does not take any more rows")

    def _hide(self, value: Any) -> Any:
        """`value` without the secrets of the environment; the paths of files stay, which the mirror must find."""
        if isinstance(value, dict):
            return {self._hide(name): entry if name in _PATHS else self._hide(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [self._hide(entry) for entry in value]
        for secret in self._secrets if isinstance(value, str) else ():
            value = value.replace(secret, _HIDDEN)
        return value

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
            text = _CREDENTIALS_IN_URL.sub("//", said["text"])
            for secret in self._secrets:
                text = text.replace(secret, _HIDDEN)
            if said.get("warning"):
                self._warn(text)
            else:
                _log.info("%s%s", text, self._advise("upload it") if said.get("upload") else "")
            self._stop_requested = self._stop_requested or "stop" in said

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("%s; metrics.jsonl has everything%s", text, self._advise("upload what W&B has"))

    def _advise(self, what: str) -> str:
        if not any(self._folder.glob("*run-*/*.wandb")):
            return ""
        return f"; {what} later with: wandb sync --include-online {shlex.quote(str(self._folder))}"

    def _end(self, problem: str | None) -> None:
        if self._over:
            return
        self._over = True
        if problem is not None:
            self._warn(problem)
        _end_process(self._process)
        shutil.rmtree(self._scratch, ignore_errors=True)


class AccelerateTracker(NoTracker):
    """One of Accelerate's trackers, within the training process. Its first failure is a warning and its end."""

    takes_pictures = True

    def __init__(self, name: str, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin or continue at `step`."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._name = name
        self._tracker: Any = None
        with self._giving_up():
            # What an earlier start logged beyond the checkpoint that this one resumes from is purged.
            folder = str(run_dir.absolute() / name)
            tracker = LOGGER_TYPE_TO_CLASS[name](run_name=run_dir.name, logging_dir=folder, purge_step=step + 1)
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
            raise UserError(f"log_with is {name}, whose package is not installed: pip install {name}, or leave it out")

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
        self._show(step, images.items())

    def log_panels(self, step: int, panels: Sequence[Panel]) -> None:  # noqa: D102
        self._show(step, ((panel.name, io.BytesIO(render(panel.figure))) for panel in panels if panel.figure is not None))

    def _show(self, step: int, pictures: Iterable[tuple[str, Path | io.BytesIO]]) -> None:
        if not hasattr(self._tracker, "log_images"):
            return
        import numpy
        from PIL import Image

        with self._giving_up():
            for name, file in pictures:
                image = Image.open(file).convert("RGB")
                self._tracker.log_images({name: numpy.asarray(image)[None]}, step=step, dataformats="NHWC")

    def finish(self, summary: Mapping[str, Any] | None, stopped: bool = False) -> None:  # noqa: D102
        if self._tracker is not None:
            with self._giving_up():
                self._tracker.finish()
            self._tracker = None


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """What trackers draw of a row: numbers, and a list such as test/class_accuracy as one number for each entry.

    The latter become class_accuracy/0 and so on: what stands before the first "/" is the section in which trackers draw a number.
    """
    flat: dict[str, Any] = {}
    for name, value in row.items():
        section = name.rpartition("/")[2]
        flat |= {f"{section}/{index}": entry for index, entry in enumerate(value)} if isinstance(value, list) else {name: value}
    return flat


def _hide_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the values whose names look like a secret's."""
    return {name: _HIDDEN if _SECRET_NAME.search(name) else value for name, value in config.items()}


def check_project(name: str) -> None:
    """Raise `UserError` where W&B would refuse the project `name`."""
    if not _is_project(name):
        raise UserError(
            f"wandb_project is {name!r}: expected at most {_NAME_LENGTH_MAX} printable characters, none of {' '.join(_NOT_IN_A_PROJECT)}"
        )


def _is_project(name: str) -> bool:
    return len(name) <= _NAME_LENGTH_MAX and name.isprintable() and not set(name) & set(_NOT_IN_A_PROJECT)


_ahead: list[subprocess.Popen[bytes]] = []  # the process that was started ahead, until it is taken


@contextlib.contextmanager
def starting_ahead(mode: Mode, world: World) -> Iterator[None]:
    """Start W&B's process at once, for the first `open_tracker` within the block: it takes a second to import what it needs.

    Without this, `open_tracker` starts one, and so it does on one core: there it would only hold up the import of torch. Never raises for
    its own sake.
    """
    is_off = mode == "disabled" or (mode == "auto" and _find_switch() == "disabled")
    if world.rank == 0 and choose_threads(world) > 1 and not is_off and _is_installed():
        with contextlib.suppress(OSError):  # `open_tracker` tries again, and tells it
            _ahead.append(_start_process())
    try:
        yield
    finally:
        while _ahead:
            _end_process(_ahead.pop())


def _is_installed() -> bool:
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None  # a mere folder of that name has none


def _start_process() -> subprocess.Popen[bytes]:
    """Start the mirror's process, which imports wandb, and then waits to be told what it mirrors. Raises OSError."""
    bare = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ} | {
        "HOME": os.devnull,  # until it is told another: there is nothing to be found, and none to be made
        "PYTHONUSERBASE": site.getuserbase(),  # which depends on HOME
        # An empty entry would be the folder in which the user happens to stand: it must not hide a module.
        "PYTHONPATH": os.pathsep.join(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))),
        "WANDB_ERROR_REPORTING": "false",
    }
    # A signal to all processes of a job, as scancel sends it, must not end the mirror at the very moment it has to finish: blocked
    # here, it stays blocked there. W&B's own helper process dies of it all the same, but the mirror starts it again.
    with holding_back_signals():
        return subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("mirror.py")), f"{_FINISH_S:g}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=bare,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in a terminal is for the training alone
        )


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in filter(None, (process.stdin, process.stdout)):
        pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a dead file server cannot even be killed
        process.wait(1)


def open_tracker(
    mode: Mode,
    run_dir: Path,
    config: Mapping[str, Any],
    *,
    project: str | None = None,
    facts: Mapping[str, Any] | None = None,
    job_type: str | None = None,
    tags: Sequence[str] = (),
    notes: str | None = None,
    system_metrics: bool = False,
    best: Best | None = None,
) -> NoTracker:
    """Begin or continue the mirror of the run in `run_dir`. Returns at once and never raises; what happens is logged.

    `auto` is online with a key and a server that answers, else offline; WANDB_MODE, `wandb offline` and `wandb disabled` may turn it to
    offline or disabled. `facts` join the config there, and win: they say what came of "auto". Before job type, tags and notes W&B's
    own variables have precedence (WANDB_JOB_TYPE, WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES); the entity comes from WANDB_ENTITY alone, and
    the project from WANDB_PROJECT where `project` is None. `system_metrics` are W&B's own measurements of this process and its machine.
    `best` says of metrics whether their lowest or their highest value is the best, which W&B then shows beside the last one.

    One folder is one run on W&B, over all its starts. Under `wandb agent`, a new folder is the run that the agent made for it.
    """
    if mode == "auto":
        mode = _find_mode()
    if mode == "disabled":
        return NoTracker()
    run_dir = run_dir.absolute()
    folder = run_dir / "wandb"
    environ = {name: value for name, value in os.environ.items() if name not in (*_UNFIT_VARIABLES, *_IDENTITY_VARIABLES)}
    environ |= _find_places(folder)
    try:
        if not _is_installed():
            raise OSError("wandb is not installed")
        folder.mkdir(parents=True, exist_ok=True)
        _remove_what_was_left(folder)
        agents_id, sweep = os.environ.get("WANDB_RUN_ID", ""), os.environ.get("WANDB_SWEEP_ID", "")
        run_id = _claim_id(folder / "run_id", run_dir, agents_id if sweep else "")
        in_sweep = sweep.isalnum() and agents_id in ("", run_id)
        if in_sweep:
            project = os.environ.get("WANDB_PROJECT") or project
            environ |= {name: os.environ[name] for name in ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH") if name in os.environ}
        elif ignored := [name for name in _IDENTITY_VARIABLES if os.environ.get(name)]:
            _log.info("this run folder is the run %s on W&B; not heeded: %s", run_id, ", ".join(ignored))
        defaults = {"NAME": run_dir.name, "JOB_TYPE": job_type, "RUN_GROUP": None, "TAGS": ",".join(tags), "NOTES": notes, "ENTITY": None}
        start = {
            "mode": mode,
            "run_dir": str(run_dir),
            "run": _describe_run(run_id, project, defaults) | ({"sweep_id": sweep} if in_sweep else {}),
            "config": _hide_secrets({**config, **(facts or {})}),
            "system_metrics": system_metrics,
            "best": dict(best or {}),
            "limits_s": {"init": _INIT_S, "answer": _ANSWER_S, "upload": _UPLOAD_S},
        }
        return WandbTracker(start, environ)
    except OSError as error:
        _log.warning("this run is not mirrored to W&B: %s", error.strerror or error)
        return NoTracker()


def _find_mode() -> Mode:
    """What `auto` stands for, by W&B's own switches."""
    switch = _find_switch()
    if switch in ("", "online", "run", "shared"):
        return "auto"
    if switch not in ("offline", "dryrun", "disabled"):
        _log.warning("W&B's mode is %r, expected online, offline or disabled; taken as offline", switch)
    return "disabled" if switch == "disabled" else "offline"


def _find_switch() -> str:
    """The first switch that is set: a plain no; then, in W&B's own order, its variable, the settings of this folder, those of the user."""
    home = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    # The variable of Hugging Face's Trainer: who has said no there sends nothing.
    is_off = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    switches = ["disabled" * is_off, os.environ.get("WANDB_MODE", "")]
    for path in (Path(".wandb" if os.path.isdir(".wandb") else "wandb", "settings"), Path(os.path.expanduser(home), "settings")):
        parser = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(configparser.Error):
            parser.read_string(read_text(path, _SMALL_FILE_BYTES))
        switches.append(parser.get("default", "mode", fallback=""))
    return next(filter(None, switches), "")


def _describe_run(run_id: str, project: str | None, defaults: Mapping[str, str | None]) -> dict[str, Any]:
    """What W&B shall know of the run, as settings whose values it takes, whatever is in its variables."""
    project = project or os.environ.get("WANDB_PROJECT") or _DEFAULT_PROJECT
    if not _is_project(project):
        _log.warning("W&B would refuse the project %r of the environment; the run goes to %s", project, _DEFAULT_PROJECT)
    # The names of files may hold what is no character to W&B.
    told = {
        name: (os.environ.get(f"WANDB_{name}") or default or "").encode(errors="replace").decode() for name, default in defaults.items()
    }
    run = {
        "run_id": run_id,
        "project": project if _is_project(project) else _DEFAULT_PROJECT,
        "entity": told["ENTITY"] if re.fullmatch(r"[\w.-]{1,128}", told["ENTITY"]) else None,
        "run_name": told["NAME"][:_NAME_LENGTH_MAX],
        "run_group": told["RUN_GROUP"][:_NAME_LENGTH_MAX],
        "run_job_type": told["JOB_TYPE"][:_NAME_LENGTH_MAX],
        "run_notes": told["NOTES"],
        "run_tags": [tag for tag in map(str.strip, told["TAGS"].split(",")) if 1 <= len(tag) <= 64 and tag.isprintable()],
    }
    return {name: value for name, value in run.items() if value}


def _find_places(folder: Path) -> dict[str, str]:
    return {"WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_DATA_DIR": str(folder / "data"), "WANDB_ERROR_REPORTING": "false"}


def _remove_what_was_left(folder: Path) -> None:
    """Remove the temporary files of earlier starts that were killed together with their mirror."""
    for path in folder.glob(f"{_SCRATCH_PREFIX}*"):
        if not _SCRATCH_NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid() and not _is_locked(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # the mirror of a start that was killed just now still uses it
        return True
    except OSError:  # a file system without locks
        pass
    return False


def _claim_id(path: Path, run_dir: Path, wanted: str) -> str:
    """The id that the run has on W&B from its first start to its last; a new one, `wanted` if it can be, for a new run or a copy."""
    found, mark, *_ = [*read_text(path, _SMALL_FILE_BYTES).splitlines(), "", ""]
    if not _ID.fullmatch(found.strip()) or not is_marked(run_dir, mark):
        found = wanted if _ID.fullmatch(wanted) else secrets.token_hex(6)
    content = f"{found.strip()}\n{mark_folder(run_dir)}\n"
    if content != read_text(path, _SMALL_FILE_BYTES):
        write_atomically(path, content.encode())
    return found.strip()
