"""Real processes for the tests: each rank is one, started in milliseconds by a server that has imported torch already."""

import atexit
import contextlib
import gc
import importlib
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from mnist_dist.preemption import Stop, StopSignals
from mnist_dist.task import Task

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "mnist_dist.loop", "torchvision.datasets", "mnist_dist.frozen"])

TINY = ["--dataset", "synthetic", "--train_size", "26", "--test_size", "30", "--batch_size", "6", "--steps", "10"]
TINY += ["--precision", "fp32", "--threads", "1", "--log_every", "1", "--learning_rate", "0.01", "--evaluate_every", "5"]
TINY += ["--optimizer", "sgd", "--momentum", "0.9", "--weight_decay", "0.0005"]
TINY += ["--report", "false", "--wandb", "disabled"]

# An exit status can be read from its pipe once, and each start asks for those of all processes: of two threads that ask at once, the
# second is told 255.
_asking = threading.Lock()

Work = Callable[[], int | None]


@dataclass
class Rank:
    """One process of a run."""

    process: BaseProcess
    log: Path

    def wait(self, timeout_s: float = 400) -> int:
        """Its exit status, negative for a signal, as in `subprocess`."""
        if not connection.wait([self.process.sentinel], timeout_s):
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s; its output:\n{self.text}")
        with _asking:
            assert self.process.exitcode is not None
            return self.process.exitcode

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        with _asking:
            return self.process.is_alive()

    def kill(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 300) -> None:
        """Wait until `condition()` holds while this process lives."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert self.is_alive, f"ended with {self.process.exitcode} before it happened; its output:\n{self.text}"
            assert time.monotonic() < end, f"did not happen in {timeout_s} s; its output:\n{self.text}"
            time.sleep(0.01)


def start_ranks(folder: Path, work: Work, world: int = 1, environ: dict[str, str] | None = None) -> list[Rank]:
    """Start `world` processes that each do `work` (a module-level callable) as one rank, with logs in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    port = str(find_free_port())
    ranks = []
    for rank in range(world):
        variables: dict[str, object] = (
            {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world} if world > 1 else {}
        )
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}
        log = folder / f"rank{rank}-{time.monotonic_ns()}.log"
        process = _context.Process(target=_run, args=(work, {k: str(v) for k, v in variables.items()} | (environ or {}), str(log)))
        with _asking:
            process.start()
        # Of a test that fails, some may never end, and the server's children are waited for.
        atexit.register(process.kill)
        ranks.append(Rank(process, log))
    return ranks


def run_ranks(folder: Path, work: Work, world: int = 1, environ: dict[str, str] | None = None, expect: int | None = 0) -> str:
    """Like `start_ranks`, and wait: every rank must end with `expect` (None: not with 0). What they printed."""
    ranks = start_ranks(folder, work, world, environ)
    codes = [rank.wait() for rank in ranks]
    text = "\n".join(rank.text for rank in ranks)
    assert all(codes) if expect is None else codes == [expect] * world, f"exit statuses {codes}, output:\n{text}"
    return text


def _run(work: Work, variables: dict[str, str], log: str) -> None:
    gc.freeze()  # what the server has imported: to look through it would copy all of it, in a third of a second
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Python's own streams still point to the server's.
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(variables)
    sys.exit(work())


@dataclass(frozen=True)
class Train:
    """The program with some arguments, as work for a rank."""

    arguments: Sequence[str]

    def __call__(self) -> int:
        from mnist_dist.train import main

        return main(self.arguments)


@dataclass(frozen=True)
class Programs:
    """Programs of this package, each its name and its arguments, one after the other in one process, until one fails."""

    lines: Sequence[Sequence[str]]

    def __call__(self) -> int:
        for program, *arguments in self.lines:
            if code := importlib.import_module(f"mnist_dist.{program}").main(arguments):
                return int(code)
        return 0


class TrainTask(Train):
    """The program with some arguments, and with a task of the test's own in the place of the built-in one."""

    def make_task(self) -> type[Task]:
        """That task: a subclass of the built-in one which does something else."""
        raise NotImplementedError

    def make_signals(self) -> StopSignals:
        """What asks the training to stop."""
        return StopSignals().install()

    def __call__(self) -> int:
        from mnist_dist.config import make_config, parse_command_line
        from mnist_dist.loop import train
        from mnist_dist.program import run_program

        signals = self.make_signals()
        values, task = parse_command_line(self.arguments).values(), self.make_task()
        task.name = values["task"]
        return run_program(lambda: train(make_config(values, task=task), signals).stop.exit_code)


class StopAt(StopSignals):
    """A signal that comes in the course of one step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.asked = step, 0

    @property
    def received(self) -> Stop:
        """Asked for once in each step."""
        self.asked += 1
        return Stop.REQUEUE if self.asked >= self.step else Stop.NONE

    @received.setter
    def received(self, _: Stop) -> None:
        pass


def find_free_ports(count: int) -> list[int]:
    """Ports on which nothing listens now, all different; below 32768, where no connection takes one for itself meanwhile."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # taken
                probe.bind(("127.0.0.1", secrets.choice(range(10_000, 32_000))))
                found.append(int(probe.getsockname()[1]))
        return found


def find_free_port() -> int:
    """A port on which nothing listens now."""
    return find_free_ports(1)[0]
