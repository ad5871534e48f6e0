"""Signals that ask a run to stop. They only set a flag; the loop acts on it after a step, or after a batch of an evaluation.

Imports next to nothing: the programs import this first, and Ctrl-C before it has taken over ends in a traceback.
"""

import atexit
import contextlib
import enum
import os
import signal
import threading
from collections.abc import Callable, Iterator


class Stop(enum.IntEnum):
    """What a signal asks for. Where ranks received different ones, the highest wins."""

    NONE = 0
    REQUEUE = 1  # SIGUSR1, SIGUSR2: time is nearly up; save, and run on in a new job
    TERMINATE = 2  # SIGTERM: Slurm requeues by itself where it means to; SIGHUP: the terminal or the connection is closed
    INTERRUPT = 3  # Ctrl-C

    @property
    def exit_code(self) -> int:
        """The exit status that tells the launcher why the run stopped."""
        return {Stop.NONE: 0, Stop.REQUEUE: 85, Stop.TERMINATE: 143, Stop.INTERRUPT: 130}[self]

    @property
    def cause(self) -> str:
        """What asked for it, in words."""
        return {
            Stop.NONE: "nothing",
            Stop.REQUEUE: "a signal to requeue",
            Stop.TERMINATE: "a signal to end, or Stop on W&B",
            Stop.INTERRUPT: "Ctrl-C",
        }[self]


STOPPED_EARLY = "stopped by a signal before the training began"


class Stopped(Exception):  # noqa: N818 - a stop is no error
    """Ends the training, and an evaluation in it, by a `stop` that all ranks have agreed on."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(f"stopped by {stop.cause}")
        self.stop = stop


_STOP_OF_SIGNAL: dict[int, Stop] = {
    signal.SIGINT: Stop.INTERRUPT,
    signal.SIGUSR1: Stop.REQUEUE,
    signal.SIGUSR2: Stop.REQUEUE,
    signal.SIGTERM: Stop.TERMINATE,
    signal.SIGHUP: Stop.TERMINATE,
}
STOP_SIGNALS = tuple(_STOP_OF_SIGNAL)


_STOPPING = b"\nSaving and stopping as soon as the step, or batch of an evaluation, is done; Ctrl-C again stops at once.\n"
_FINISHED = b"\nThe run is finished and saved; Ctrl-C again leaves out what is left of its report and of its copy on W&B.\n"


class StopSignals:
    """The strongest stop that this process was asked for so far."""

    def __init__(self) -> None:
        self.received = Stop.NONE
        self._deferred = False
        self._announced = True
        self.is_finished = False  # nothing is left that a stop could cost
        self.hand_on: Callable[[int], None] | None = None  # where other processes do the work: they are sent the signals

    def install(self) -> "StopSignals":
        """Take over the stop signals of this process (main thread only)."""
        _take_standard_descriptors()
        # A Python handler waits for the main thread, which may sit in a collective for minutes because another rank is gone. So the
        # handlers do nothing: each signal's number is also written to this pipe at once, and a thread reads it.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        _keep_from_children()
        for number in _STOP_OF_SIGNAL:
            # Under nohup a closed terminal is no reason to stop. The other signals are always meant: batch scripts let them be ignored
            # until this program can heed them.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        # Python puts handlers of its own back before torch is torn down. A signal then would end this process with another status.
        atexit.register(ignore_stop_signals)
        threading.Thread(target=self._watch, args=(reading,), name="stop signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # whoever started this may have held them back until here
        return self

    def defer(self, announced: bool) -> None:
        """From here on a stop waits until the training heeds it; a Ctrl-C is `announced` on the screen.

        Before this call there is nothing to save and nobody to agree with: a stop ends the process.
        """
        self._deferred, self._announced = True, announced

    def _watch(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if self.hand_on is not None:
                    self.hand_on(number)
                    continue
                stop = _STOP_OF_SIGNAL.get(number, Stop.NONE)
                again = stop == self.received == Stop.INTERRUPT
                self.received = max(self.received, stop)
                if stop and (again or not self._deferred):
                    if not self._deferred:
                        _say(f"{STOPPED_EARLY}\n".encode())
                    os._exit(stop.exit_code)
                if stop == Stop.INTERRUPT and self._announced:
                    _say(_FINISHED if self.is_finished else _STOPPING)


def ignore_stop_signals() -> None:
    """Let none of them do anything in this process any more."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _take_standard_descriptors() -> None:
    """Let nothing that is opened get the number of a standard descriptor that whoever started this has closed.

    What is printed would be written into it: into the pipe of the signals, or a checkpoint.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _keep_from_children() -> None:
    """Let no process that is forked from this one write to its pipe: Ctrl-C goes to all of a terminal's job, and would count twice."""
    mask = threading.local()

    def hold_back() -> None:
        mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def let_go() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask.before)

    def cut_off() -> None:
        signal.set_wakeup_fd(-1)
        let_go()

    os.register_at_fork(before=hold_back, after_in_parent=let_go, after_in_child=cut_off)


def _say(text: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading any more
        os.write(2, text)


@contextlib.contextmanager
def holding_back_signals() -> Iterator[set[int]]:
    """Let signals that ask to stop wait, here and in a process that is started meanwhile; yields those that have been held back before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield {*map(int, before)}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_on_interrupt() -> None:
    """Let Ctrl-C end this process in one line until `run_program` takes over.

    A program calls this before its other imports: they take a second, in which Ctrl-C would end in a traceback.
    """
    signal.signal(signal.SIGINT, end_at_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # whoever started this may have held them back until here


def end_at_once(*_: object) -> None:
    """The handler of Ctrl-C where there is nothing to save."""
    _say(b"interrupted\n")
    os._exit(130)


@contextlib.contextmanager
def ending_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, and a closed terminal, end what is done here as Ctrl-C does, by KeyboardInterrupt (main thread only)."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = [(number, signal.signal(number, signal.default_int_handler)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
    """Let the signals that end a program wait until what is done here is done (main thread only).

    A mask would not do: torch's threads would take the signals, and processes that are started here would inherit it.
    """
    came: list[int] = []
    # What is ignored stays so, for those processes, too: of nohup.
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = [(number, signal.signal(number, lambda number, _: came.append(number))) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        for one in came:
            signal.raise_signal(one)
