"""The process that mirrors a run to Weights & Biases: it reads one JSON message a line, until the training process ends or dies.

`mnist_dist.tracking` starts it. It answers in lines of JSON too: what a person should know. Imports no torch, to be small and quick.

It is started with a bare environment, which the first line completes. The one of the training process comes as the second and is put on
for a try online: whatever is wrong in it, the run offline, which is the last resort, depends on nothing of it.
"""

import contextlib
import fcntl
import io
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb

Message = dict[str, Any]

_KILLED = 255  # the exit code of what someone ended, as W&B itself has it for Ctrl-C
_FLUSH_S = 2.0  # how much of a run a SIGKILL of everything may cost
_SHOWN = 200  # characters of a reason
_REFUSED = ("failed to upload", "failed to log artifact")
# The settings whose variables are named otherwise.
_SETTING_OF_VARIABLE = {
    "WANDB_DIR": "root_dir",
    "WANDB_JOB_TYPE": "run_job_type",
    "WANDB_NAME": "run_name",
    "WANDB_NOTES": "run_notes",
    "WANDB_TAGS": "run_tags",
}


class _HelperDiedError(Exception):
    """W&B's own helper process is not there any more."""


@contextlib.contextmanager
def _noticing_death() -> Iterator[None]:
    """W&B says in three ways that its helper died: when it sends, when it asks, and when it waits for an answer. Here they are one."""
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    try:
        yield
    except (ConnectionError, MailboxClosedError, HandleAbandonedError) as error:
        raise _HelperDiedError("its helper process died") from error


class Mirror:
    """The run as W&B has it. Keeps all messages of this start, to send them again where W&B's own helper process died."""

    _run: Any = None
    _has_warned = False

    def __init__(self, start: Message, environ: dict[str, str], tell: Callable[..., None]) -> None:
        """Open the run that `start` describes, online with `environ`. `tell(text, ...)` reaches the person who trains."""
        self._start = start
        self._tell = tell
        self._folder = Path(start["run_dir"], "wandb")
        self._earlier = self._find_pieces()
        self._console = sys.stderr = io.StringIO()  # W&B says only here that the server refuses what comes
        self._messages: list[Message] = []
        self._online = start["mode"] != "offline"
        self._known_step = 0
        self._is_server_silent = False
        self._is_stopped_from_the_page = False
        self._settings = self._make_settings()
        own = {name for name in environ if _find_setting(name) in self._settings.model_fields_set}  # ours wins, so theirs may be rubbish
        bare = dict(os.environ)
        self._environs = {
            "online": {name: value for name, value in environ.items() if name not in own} | {"TMPDIR": bare["TMPDIR"]},
            "offline": bare,
        }
        # W&B reads settings in the current folder. Offline it must find none.
        self._places = {"online": _find_current_folder(), "offline": bare["HOME"]}
        self._begin()
        if self._online:
            self._tell(f"W&B mirrors this run: {self._run.url}")
        elif start["mode"] == "offline":
            self._tell("W&B keeps this run offline", upload=True)

    def take(self, message: Message) -> None:
        """Mirror a message of the training process."""
        self._messages.append(message)
        try:
            self._send(message)
        except _HelperDiedError:
            self._begin()

    def close(self) -> None:
        """End the run, as far as the server takes it in time; the rest stays in the run folder."""
        try:
            try:
                self._finish()
            except _HelperDiedError:
                self._begin()
                self._finish()
        except TimeoutError:
            self._warn("W&B did not take everything in time")
        log = self._read_log()
        if "Fatal error" in self._console.getvalue() or any(words in log for words in _REFUSED):
            self._warn("W&B refused a part of this run")
        # On a full disk the helper drops rows and goes on; only its own log, if there is room for that, has a word on it.
        if "failed to save record" in log or not self._is_there_room():
            self._warn("W&B could not write all of this run to the run folder (is the disk full?)")
        wandb.teardown()
        if self._online and not self._has_warned:
            for folder in self._find_pieces() - self._earlier:
                (folder / f"run-{self._start['run']['run_id']}.wandb.synced").touch()  # `wandb sync` would send them again

    @_noticing_death()
    def _finish(self) -> None:
        last = self._messages[-1] if self._messages else {}
        if last.get("finish") is not None:
            self._run.finish(exit_code=0)
        elif self._is_stopped_from_the_page:
            self._run.finish(exit_code=_KILLED)
        else:
            if last.get("stopped"):
                self._run.mark_preempting()  # with another exit code than 0 the run is then not failed, but preempted
            self._run.finish(exit_code=1)

    def _stop(self) -> None:
        # Called in a thread of W&B's when someone presses stop on the page of the run.
        self._is_stopped_from_the_page = True
        self._tell("W&B: stop was pressed on the page of this run", stop=True)

    def _begin(self) -> None:
        """Open the run, online where that is asked for and possible, and send all that was logged so far."""
        if self._run is not None:
            self._tell("W&B's helper process died and is started again")
            _tear_down()
        reason, keyless = "", False
        # W&B's own limit is for the server alone: its helper, a file server, a pipe in the place of a file may hang as well.
        limit_s = self._start["limits_s"]["init"] + 2
        if self._online:
            try:
                with _limit(limit_s):
                    self._open("online")
            except (Exception, _TookTooLongError) as error:
                self._online = False
                _tear_down()
                keyless = "No API key" in str(error)
                reason = "there is no API key" if keyless else _shorten(error)
        if not self._online:
            try:
                with _limit(limit_s):  # W&B waits for itself for ever where its helper dies before it can be reached
                    self._open("offline")
            except (Exception, _TookTooLongError):  # nothing is behind this last resort: whatever it was, it is tried again
                _tear_down()
                with _limit(limit_s):
                    self._open("offline")
        for message in self._messages:
            self._send(message)
        if keyless and self._start["mode"] == "auto":
            self._tell(f"W&B keeps this run offline, because {reason}", upload=True)
        elif reason:
            self._warn(f"W&B keeps this run offline, because {reason}")

    def _make_settings(self) -> "wandb.Settings":
        start, limits_s = self._start, self._start["limits_s"]
        return wandb.Settings(
            **start["run"],
            mode="online",
            resume="allow",  # a requeued job continues the same run
            root_dir=start["run_dir"],
            use_dot_wandb=False,
            init_timeout=limits_s["init"],
            finish_timeout=limits_s["upload"],
            finish_timeout_raises=True,
            x_skip_transaction_log=False,
            x_transaction_log_flush_interval=_FLUSH_S,
            silent=False,  # what it says is read by `close`
            show_warnings=True,
            symlink=False,
            stop_fn=self._stop,
            stop_on_fatal_error=False,  # W&B would take what it cannot upload for the same request
            sagemaker_disable=True,  # there W&B takes an id of its own
            launch=False,
            # Nothing goes to W&B but what is logged: no arguments, code, packages, host or console; the machine is measured if asked for.
            program="mnist_dist.mirror",
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="",
            label_disable=True,
            save_code=False,
            x_disable_machine_info=not start["system_metrics"],
            x_disable_meta=True,
            x_disable_stats=not start["system_metrics"],
            x_stats_pid=os.getppid(),
            x_disable_viewer=True,
            x_save_requirements=False,
        )

    def _find_pieces(self) -> set[Path]:
        """The folders of this run that W&B has written, each of one start, and no others of such a name."""
        name = re.compile(rf"(offline-)?run-\d{{8}}_\d{{6}}-{re.escape(self._start['run']['run_id'])}")
        return {path for path in self._folder.glob("*run-*") if name.fullmatch(path.name)}

    def _open(self, mode: Any) -> None:
        os.environ.clear()
        os.environ.update(self._environs[mode])
        os.chdir(self._places[mode])
        pieces = self._find_pieces() - self._earlier
        # Not given to `init`: in a sweep that forgets our id.
        wandb.setup(self._settings.model_copy(update={"mode": mode}))
        self._run = wandb.init(mode=mode, config=self._start["config"])
        # Rows are placed by our own step: W&B drops rows whose own step goes back, as after a SIGKILL.
        self._run.define_metric("*", step_metric="step")
        for name in ("step", "epoch"):  # what others are drawn over: no panels
            self._run.define_metric(name, hidden=True)
        for name, best in self._start["best"].items():
            self._run.define_metric(name, step_metric="step", summary=f"{best},last")
        # A server knows how far it got before a SIGKILL of this job or of the helper: what it has is not sent again.
        self._known_step = int(self._run.summary.get("step") or 0) if mode == "online" else 0
        if mode == "offline":  # this piece gets everything; those that it replaces would be uploaded as well
            for piece in pieces:
                shutil.rmtree(piece, ignore_errors=True)

    def _send(self, message: Message) -> None:
        step = message["row"]["step"] if "row" in message else message.get("step")
        if step is not None and step < self._known_step:  # not <=: the server's summary may be one row ahead of its history
            return
        try:
            self._log(message, step)
        except _HelperDiedError:
            raise
        except Exception as error:  # this message cannot be sent, but the next one can
            self._warn(f"W&B did not take something that was logged ({_shorten(error)})")

    @_noticing_death()
    def _log(self, message: Message, step: int | None) -> None:
        if "row" in message:
            self._run.log(message["row"])
        elif "images" in message:
            self._run.log({"step": step} | {name: wandb.Image(path) for name, path in message["images"].items()})
        elif "tables" in message:
            try:
                with self._waiting_for_the_server():
                    self._run.log({"step": step} | _draw_tables(message))
            except Exception:
                drawn = _draw_tables(message)
                for name, table in _find_tables(drawn):  # bound before, they are files of the run and no artifacts
                    table.bind_to_run(self._run, name, self._run.step)
                self._run.log({"step": step} | drawn)
                raise
        elif "model" in message:
            # The name carries the run's id: runs of one project do not mix their models.
            artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
            artifact.add_file(message["model"])
            with self._waiting_for_the_server():
                self._run.log_artifact(artifact)
        elif message["finish"] is not None:
            self._run.summary.update({f"result/{name}": value for name, value in message["finish"].items()})

    @contextlib.contextmanager
    def _waiting_for_the_server(self) -> Iterator[None]:
        """For artifacts, of which a table is one: W&B first asks the server about them, and waits. One that hangs is asked only once."""
        if self._is_server_silent:
            raise TimeoutError("the server does not answer")
        try:
            with _limit(self._start["limits_s"]["answer"]):
                yield
        except _TookTooLongError as error:
            self._is_server_silent = True
            raise TimeoutError("the server does not answer") from error

    def _warn(self, text: str) -> None:
        self._has_warned = True
        self._tell(text, warning=True)

    def _read_log(self) -> str:
        """What W&B's helper has written into its own log: the one place where it says what it could not send or save."""
        try:
            return Path(self._run.settings.log_internal).read_text(errors="replace")
        except OSError:
            return ""

    def _is_there_room(self) -> bool:
        probe = Path(os.environ["TMPDIR"], "probe")
        try:
            probe.write_bytes(bytes(65_536))
            return True
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)


def _draw_tables(message: Message) -> dict[str, Any]:
    """W&B's own tables, and its plots of confusion matrices, by their names."""
    drawn: dict[str, Any] = {}
    for name, content in message["tables"].items():
        drawn[name] = wandb.Table(columns=content["columns"])
        for row in content["rows"]:
            drawn[name].add_data(*(wandb.Image(cell["image"]) if isinstance(cell, dict) else cell for cell in row))
    for name, content in message["matrices"].items():
        pairs = [(label, other) for label, row in enumerate(content["counts"]) for other, count in enumerate(row) for _ in range(count)]
        labels, predictions = zip(*pairs, strict=True) if pairs else ((), ())
        drawn[name] = wandb.plot.confusion_matrix(
            y_true=labels, preds=predictions, class_names=content["classes"], title=name.rpartition("/")[2].replace("_", " ").capitalize()
        )
    return drawn


def _find_tables(drawn: dict[str, Any]) -> list[tuple[str, Any]]:
    """The tables of what `_draw_tables` returns, by the names under which W&B logs them."""
    return [(name, plot) if isinstance(plot, wandb.Table) else (f"{name}_table", plot.table) for name, plot in drawn.items()]


def _find_setting(variable: str) -> str | None:
    """The setting that W&B takes from an environment variable, by its own rule."""
    if not variable.startswith("WANDB_"):
        return None
    name = variable.removeprefix("WANDB_").lower()
    return _SETTING_OF_VARIABLE.get(variable, f"x{name}" if name.startswith("_") else name)


def _find_current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return os.environ["HOME"]


class _TookTooLongError(BaseException):
    """Not an `Exception`: W&B catches those here and there, and goes on."""


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise _TookTooLongError(f"it took more than {seconds:g} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _tear_down() -> None:
    # Without it the id counts as in use. It raises where the helper is gone, and even SystemExit where that failed.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _shorten(error: BaseException) -> str:
    text = str(error)
    if hasattr(error, "errors"):  # pydantic's, whose text shows the values, which may be secret
        text = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    text = " ".join(text.partition("Consider increasing the init_timeout")[0].split())  # it is ours, and nobody can
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"  # the cause often comes last
    return text or type(error).__name__


_scratch: str | None = None  # the folder of temporary files, once it is known


class _Unplaced:
    """A temporary folder that is asked for while nobody knows yet where it is to be."""

    name = ""

    def cleanup(self) -> None:
        """As the real one has it; it goes with the folder of all temporary files."""


@contextlib.contextmanager
def _placing_later() -> Iterator[list[_Unplaced]]:
    """Let W&B, which asks for temporary folders as it is imported, make none: they would stay, and a full disk would end the import."""
    unplaced: list[_Unplaced] = []

    def note(*_: Any, **__: Any) -> _Unplaced:
        unplaced.append(_Unplaced())
        return unplaced[-1]

    asked, tempfile.TemporaryDirectory = tempfile.TemporaryDirectory, note  # type: ignore[assignment, misc]
    try:
        yield unplaced
    finally:
        tempfile.TemporaryDirectory = asked  # type: ignore[misc]


def _end_with_the_training(source: int, finish_s: float) -> None:
    """Wait until nobody writes to `source` any more, leave this process `finish_s` to finish, and end it: W&B may hang anywhere."""
    poll = select.poll()
    poll.register(source, 0)  # that it was closed is reported always, whatever waits there to be read
    poll.poll()
    time.sleep(finish_s)
    _leave(1)


def _leave(status: int) -> None:
    if _scratch is not None:
        shutil.rmtree(_scratch, ignore_errors=True)
    os._exit(status)  # exit hooks, W&B's and Python's, could wait for ever


def main(finish_s: float) -> None:
    """Mirror what comes on standard input; when that has ended, take at most `finish_s` to finish."""
    global wandb, _scratch
    status = 1
    # The pipes move to descriptors that W&B's helper does not inherit: it must not keep them open when this process has ended.
    source, sink = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    def tell(text: str, **more: bool) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(sink, json.dumps({"text": text, **more}).encode() + b"\n")  # a line at once, as several threads tell something

    try:
        threading.Thread(target=_end_with_the_training, args=(source.fileno(), finish_s), daemon=True).start()
        with _placing_later() as unplaced:
            import wandb  # only now that this process will end, come what may

        bare = source.readline()
        if not bare:  # there is nothing to mirror
            status = 0
            return
        os.environ.update(json.loads(bare))
        _scratch = os.environ["HOME"]
        descriptor = os.open(_scratch, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a later start sees by it that the folder is in use
        # The helper's socket lies here, whose path may have 107 characters.
        short = f"/proc/{os.getpid()}/fd/{descriptor}"
        os.environ["TMPDIR"] = tempfile.tempdir = short if os.path.isdir(short) else _scratch
        for folder in unplaced:
            folder.name = tempfile.mkdtemp()
        environ, start = json.loads(source.readline()), json.loads(source.readline())
        mirror = Mirror(start, environ, tell)
        for line in source:
            mirror.take(json.loads(line))
        mirror.close()
        status = 0
    except (Exception, _TookTooLongError) as error:
        tell(f"W&B failed ({_shorten(error)})", warning=True)
        status = 0
    finally:
        _leave(status)


if __name__ == "__main__":
    main(float(sys.argv[1]))
