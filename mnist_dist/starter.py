"""Starts the processes that `accelerate launch` was asked for where it started one, as it does without GPUs. Imports no torch.

The process that finds itself alone starts its own command line once for each rank, hands signals on, and waits, as srun would.
"""

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

from mnist_dist.asked import count_asked
from mnist_dist.errors import RunError
from mnist_dist.preemption import Stop, StopSignals, holding_back_signals
from mnist_dist.program import say
from mnist_dist.world import World, find_world, read_world

_GRACE_S = 30.0  # for the other ranks to notice that one is lost, and to leave
_EXPECTED = {stop.exit_code for stop in Stop}  # Stop.NONE among them
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def find_size(environ: Mapping[str, str], is_program: bool = True) -> tuple[int, bool]:
    """How many processes the run has, and whether this one must start them. Raises `UserError` as `find_world` does.

    Only where this process's command line is the program's own (`is_program`) may that be started again.
    """
    if not is_program:
        return find_world(environ).size, False
    asked = count_asked(environ)
    alone = read_world(environ)
    if alone.size == 1 and asked.processes > 1 and asked.machines == 1 and alone.launcher != "mpirun" and not environ.get("RANK"):
        return asked.processes, True
    return find_world(environ).size, False


def start_ranks(size: int, signals: StopSignals | None = None) -> int:
    """Start this process's command line `size` times and wait; the highest exit status, where a signal n counts as 128 + n.

    Raises `RunError` where they cannot be started.
    """
    signals = signals or StopSignals().install()
    command = [sys.executable, *sys.orig_argv[1:]]
    port, ranks, starting = find_free_port(), list[subprocess.Popen[bytes]](), threading.Lock()

    def hand_on(number: int) -> None:
        with starting:  # one that is not there yet must hear it, too
            for rank in ranks:
                rank.send_signal(number)

    die_with_parent = make_die_with_parent()

    with starting:
        signals.hand_on = hand_on
        say(f"accelerate launch has started one process of the {size} asked for; it starts all {size} itself")
        try:
            with holding_back_signals():  # until a rank has its handlers
                for rank in range(size):
                    world = World(rank, size, rank, size, port=port)
                    # A session of its own: Ctrl-C on the terminal comes once, from here.
                    ranks.append(
                        subprocess.Popen(command, env=os.environ | world.variables(), start_new_session=True, preexec_fn=die_with_parent)
                    )
        except (OSError, subprocess.SubprocessError) as error:
            for started in ranks:
                started.kill()
            raise RunError(f"rank {len(ranks)} of {size} cannot be started: {error}") from error
    return _wait(ranks)


def make_die_with_parent() -> Callable[[], None]:
    """What a child of this process calls, before it becomes another program (`preexec_fn`) or works, so that it ends with this one."""
    parent = os.getpid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # of Linux alone

    def die_with_parent() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)

    return die_with_parent


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    lost_at = None
    while None in [rank.poll() for rank in ranks]:
        if lost_at is None and any(rank.returncode not in (None, *_EXPECTED) for rank in ranks):
            lost_at = time.monotonic()
        if lost_at is not None and time.monotonic() > lost_at + _GRACE_S:
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return max(128 - rank.returncode if rank.returncode < 0 else rank.returncode for rank in ranks)


def find_free_port() -> int:
    """A port on which nothing listens; below 32768, where the ports of outgoing connections begin."""
    for _ in range(100):
        port = 10_000 + secrets.randbelow(22_000)
        with socket.socket() as probe, contextlib.suppress(OSError):  # taken
            probe.bind(("", port))
            return port
    raise RunError("no free port was found at which the processes could meet")
