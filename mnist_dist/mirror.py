"""The process that mirrors a run to Weights & Biases: it reads one JSON message a line, until the training process ends or dies.

`mnist_dist.tracking` starts it. It answers in lines of JSON too: what a person should know. Imports no torch, to be small and quick.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb

Message = dict[str, Any]

_FLUSH_S = 2.0  # how much of a run a SIGKILL of everything may cost


class Mirror:
    """The run as W&B has it. Keeps all messages of this start, to send them again where W&B's own helper process died."""

    _run: Any = None

    def __init__(self, start: Message, tell: Callable[[str, bool], None]) -> None:
        """Open the run that `start` describes. `tell(text, is_warning)` reaches the person who trains."""
        self._start = start
        self._tell = tell
        self._folder = Path(start["run_dir"], "wandb")
        self._earlier = set(self._folder.glob("*run-*"))
        self._console = sys.stderr = io.StringIO()  # W&B says only here that the server refuses what comes
        self._messages: list[Message] = []
        self._online = start["mode"] != "offline"
        self._known_step = 0
        self._begin()
        if self._online:
            self._tell(f"W&B mirrors this run: {self._run.url}", False)
        elif start["mode"] == "offline":
            self._tell(f"W&B keeps this run offline; upload it later with: {start['command']}", False)

    def take(self, message: Message) -> None:
        """Mirror a message of the training process."""
        self._messages.append(message)
        try:
            self._send(message)
        except ConnectionError:
            self._begin()

    def close(self, exit_code: int) -> None:
        """End the run, as far as the server takes it in time; the rest stays in the run folder."""
        try:
            try:
                self._run.finish(exit_code=exit_code)
            except ConnectionError:
                self._begin()
                self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self._tell("W&B did not take everything in time", True)
        if "Fatal error" in self._console.getvalue():
            self._tell("W&B refused a part of this run", True)
        if not self._is_written():
            self._tell("W&B could not write all of this run to the run folder (is the disk full?)", True)
        wandb.teardown()

    def _begin(self) -> None:
        """Open the run, online where that is wanted and possible, and send all that was logged so far."""
        if self._run is not None:
            self._tell("W&B's helper process died and is started again", False)
            _tear_down()
        reason, keyless = "", False
        if self._online:
            try:
                self._open("online")
            except Exception as error:
                self._online = False
                _tear_down()
                keyless = "No API key" in str(error)
                reason = "there is no API key" if keyless else _shorten(error)
        if not self._online:
            self._open("offline")
        for message in self._messages:
            self._send(message)
        if keyless and self._start["mode"] == "auto":
            self._tell(f"W&B keeps this run offline, because {reason}; upload it later with: {self._start['command']}", False)
        elif reason:
            self._tell(f"W&B keeps this run offline, because {reason}", True)

    def _open(self, mode: Any) -> None:
        start, limits_s = self._start, self._start["limits_s"]
        settings = wandb.Settings(
            init_timeout=limits_s["init"],
            finish_timeout=limits_s["upload"],
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=_FLUSH_S,
            silent=True,
            symlink=False,
            stop_fn=lambda: None,  # the default sends SIGINT to this process when someone presses stop on the web page
            # Nothing goes to W&B but what is logged: no arguments, code, packages, host, console or measurements of the machine.
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="",
            label_disable=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_viewer=True,
            x_save_requirements=False,
        )
        pieces = set(self._folder.glob("*run-*")) - self._earlier
        self._run = wandb.init(
            mode=mode,
            id=start["id"],
            resume="allow",  # a requeued job continues the same run
            dir=start["run_dir"],
            project=start["project"],
            name=start["name"],
            config=start["config"],
            settings=settings,
        )
        # Rows are placed by our own step: W&B drops rows whose own step goes back, as after a SIGKILL.
        self._run.define_metric("*", step_metric="step")
        for name, best in (("train/loss", "min"), ("test/loss", "min"), ("test/accuracy", "max")):
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
            if "row" in message:
                self._run.log(message["row"])
            elif "images" in message:
                self._run.log({"step": step} | {name: wandb.Image(path) for name, path in message["images"].items()})
            elif "model" in message:
                # The name carries the run's id: runs of one project do not mix their models.
                artifact = wandb.Artifact(f"model-{self._start['id']}", type="model")
                artifact.add_file(message["model"])
                self._run.log_artifact(artifact)
            elif message["finish"] is not None:
                self._run.summary.update({f"result/{name}": value for name, value in message["finish"].items()})
        except ConnectionError:  # the helper process died
            raise
        except Exception as error:  # this message cannot be sent, but the next one can
            self._tell(f"W&B did not take something that was logged ({_shorten(error)})", True)

    def _is_written(self) -> bool:
        # On a full disk the helper drops rows and goes on; only its own log, if there is room for that, has a word on it.
        probe = self._folder / "probe"
        try:
            probe.write_bytes(bytes(65_536))
            probe.unlink()
            return "failed to save record" not in Path(self._run.settings.log_internal).read_text(errors="replace")
        except OSError:
            probe.unlink(missing_ok=True)
            return False


def _tear_down() -> None:
    # Without it the id counts as in use. It raises where the helper is gone, and even SystemExit where that failed.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def main() -> None:
    """Mirror what comes on standard input."""
    # The pipes move to descriptors that W&B's helper does not inherit: it must not keep them open when this process has ended.
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    def tell(text: str, is_warning: bool) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            print(json.dumps({"text": text, "warning": is_warning}), file=sink)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    start = json.loads(source.readline())
    finish_s = round(start["limits_s"]["finish"])
    try:
        mirror = Mirror(start, tell)
        finished = False
        for line in source:
            message = json.loads(line)
            mirror.take(message)
            finished = message.get("finish") is not None
        signal.alarm(finish_s)  # whatever hangs from here on, W&B's own exit hooks included, is ended by the system
        mirror.close(0 if finished else 1)
    except Exception as error:
        signal.alarm(finish_s)
        tell(f"W&B failed ({_shorten(error)})", True)


if __name__ == "__main__":
    main()
