"""What the programs have in common: one-line errors, exit statuses, tables. Imports no torch."""

import atexit
import contextlib
import gc
import importlib
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from mnist_dist.errors import RunError, UserError, describe_shortage, first_line, is_device_failure, is_lost_worker
from mnist_dist.files import describe_error
from mnist_dist.preemption import end_at_once
from mnist_dist.world import find_world


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import torch, and what needs it, without Python's garbage collector.

    It would look through all that is imported again and again, and find nothing: a tenth of the time. Nor does it look there later. Where
    torch is there already, as in a notebook, the collector is left alone. Raises `UserError` where the current folder was removed.

    Ctrl-C ends a program at once meanwhile: numpy, whose import has failed once, would end in a RecursionError.
    """
    if "torch" in sys.modules:
        yield
        return
    try:
        os.getcwd()
    except FileNotFoundError as error:  # in which torch would not find its own libraries
        raise UserError("the current folder has been removed: go to another (cd)") from error
    gc.disable()
    ends_alone = _ends_alone.is_set()
    if ends_alone:
        signal.signal(signal.SIGINT, end_at_once)
    try:
        yield
    finally:
        if ends_alone:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.freeze()
        gc.enable()


_ENDING_S = 0.1
_dropping = threading.Lock()
_ends_at_once = threading.Event()
_ends_alone = threading.Event()  # on Ctrl-C: nobody else handles it
_in_torch: list[threading.Thread] = []


@contextlib.contextmanager
def surviving_stderr() -> Iterator[None]:
    """Print to standard error if it takes what is printed; else that is lost, and the next message is tried again.

    Ctrl-C in `train | tee log` ends tee first, a log's disk may be full, and a terminal may be busy: none of it may end the training or
    lose its last checkpoint. Nothing stays in a buffer either, which would turn the exit status into 120.
    """
    try:
        yield
        sys.stderr.flush()
    except OSError:
        with _dropping, contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
            kept = os.dup(2)
            try:
                os.dup2(nothing.fileno(), 2)
                sys.stderr.flush()
            finally:
                os.dup2(kept, 2)
                os.close(kept)


def run_program(work: Callable[[], int]) -> int:
    """Call `work`; its exit status, or in one line without a traceback: 2 for a user's mistake, 130 for Ctrl-C, 1 for what went wrong.

    An exception of none of these kinds is a fault of this package, and is raised on.
    """
    # When a rank is lost, torch's C++ side would print pages of stack frames before our one line. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    ends_alone = signal.getsignal(signal.SIGINT) is end_at_once
    if ends_alone:
        _ends_alone.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = _name_mistakes(work)
    except KeyboardInterrupt:
        say("interrupted")
        status = 130
    finally:
        if ends_alone:
            _ends_alone.clear()
            signal.signal(signal.SIGINT, end_at_once)  # for what Python itself does until the process has ended
    if _ends_at_once.is_set() or _is_in_torch():
        atexit.register(_end_at_once, status)  # the caller may have something to note first
    return status


def run_module(name: str) -> int:
    """Import a module that imports torch at once, and run its program; the exit status."""

    def run() -> int:
        with importing():
            module = importlib.import_module(name)
        return int(module.main())

    return run_program(run)


def end_at_once_at_exit() -> None:
    """Let the process end at once when it exits, with the status that `run_program` returns.

    A thread of torch's own may wait for a rank that is out of reach, and what ends the process in order would wait for that thread.
    """
    _ends_at_once.set()


def start_thread(work: Callable[[], object], name: str | None = None) -> threading.Thread:
    """Start a daemon thread that may wait in torch's C++. Raises RuntimeError where this host starts no more threads.

    Python ends such a thread when it comes back while Python itself ends. It does so in the midst of C++, which then aborts the process:
    status 134 after a run in which all went well. So the process ends at once (`run_program`) where one is still there.
    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    _in_torch[:] = [*(before for before in _in_torch if before.is_alive()), thread]
    return thread


def _is_in_torch() -> bool:
    for thread in _in_torch:
        thread.join(_ENDING_S)  # most are about to end
    return any(thread.is_alive() for thread in _in_torch)


def _end_at_once(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _name_mistakes(work: Callable[[], int]) -> int:
    try:
        return work()
    except (UserError, RunError) as error:
        with surviving_stderr():
            print("\n".join(f"{_find_prefix()}error: {make_printable(line)}" for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    except Exception as error:
        # What comes from outside of this program: a traceback would say no more.
        status = RunError.exit_code
        if is_lost_worker(error):
            text = f"a worker that reads data is lost: {first_line(error)}"
        elif is_device_failure(error):
            text = f"the GPU failed: {first_line(error)}"
        elif words := describe_shortage(error):
            text = f"{words}: {first_line(error)}"
        elif isinstance(error, ValueError) and _is_of_import(error) and (variables := list_variables("TORCH_", "ACCELERATE_")):
            text = f"torch and Accelerate cannot be imported ({first_line(error)}); of their variables the environment has {variables}"
            text, status = f"{text}: correct or unset them", UserError.exit_code
        else:
            raise
        say(f"{_find_prefix()}error: {text}")
        return status


def list_variables(*prefixes: str) -> str:
    """The variables of the environment whose names begin with one of these, each with its value, cut short; without that set above."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes) and name != "TORCH_CPP_LOG_LEVEL"}
    return ", ".join(f"{name}={value[:40]!r}" for name, value in found.items())


def _is_of_import(error: Exception) -> bool:
    """Whether a module of torch or of Accelerate failed while it was imported, as they do where a variable has a value they do not know."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    return any(str(frame.f_globals.get("__name__")).partition(".")[0] in ("torch", "accelerate") for frame in frames)


def print_answer(work: Callable[[], int]) -> int:
    """Call `work`, which prints the program's answer, as `run_program` does; a reader that goes away is no reason for a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may hold what the terminal's encoding lacks

    def answer() -> int:
        stream = _Printable(sys.stdout)
        try:
            with contextlib.redirect_stdout(stream):
                status = work()
            stream.flush()
            return status
        except _UnheardError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                # Whoever read the output has gone, as `head` does; without this Python would complain as it exits.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return RunError.exit_code
            raise RunError(f"the answer cannot be given: {error.__cause__}") from error
        except OSError as error:
            raise RunError(describe_error(error)) from error

    return run_program(answer)


@contextlib.contextmanager
def answering(is_alone: bool) -> Iterator[TextIO]:
    """Where the answer is printed. If it stands alone there, as JSON must, what a task's code prints meanwhile goes to standard error."""
    stream = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if is_alone else stream):
        yield stream


class _UnheardError(Exception):
    """The answer cannot be written; its cause says why."""


@contextlib.contextmanager
def _marking_unheard() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _UnheardError from error


def _find_prefix() -> str:
    with contextlib.suppress(UserError):
        world = find_world(os.environ)
        return f"[rank {world.rank}] " if world.size > 1 else ""
    return ""


class _Printable(io.TextIOBase):
    """A stream that lets only printable text through: names and logs of runs may come from somebody else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _marking_unheard():
            return self._stream.write(make_printable(text, kept="\n\t"))

    def flush(self) -> None:
        with _marking_unheard():
            self._stream.flush()


def say(text: str) -> None:
    """A line beside the answer."""
    with surviving_stderr():
        print(make_printable(text), file=sys.stderr)


def make_printable(text: str, kept: str = "") -> str:
    """`text` without what could move a terminal's cursor or colour it: such characters, but for `kept` ones, become escapes."""
    if text.translate(dict.fromkeys(map(ord, kept))).isprintable():  # most is: letter by letter, a long log would take minutes
        return text
    return "".join(letter if letter.isprintable() or letter in kept else ascii(letter)[1:-1] for letter in text)


def make_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as text in columns: words to the left, columns of numbers to the right. A column in which nothing stands is left out.

    Raises ValueError for a row that has not as many cells as the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of the table has {len(row)} cells, and its header {len(header)}")
    texts = [[f"{cell:,}" if type(cell) is int else "" if cell is None else make_printable(str(cell)) for cell in row] for row in rows]
    columns = []
    for name, *cells in zip(header, *texts, strict=True):
        if any(cells):
            width = max(map(len, (name, *cells)))
            is_number = all(re.fullmatch(r"[-+]?[\d.,]+%?|-|\.|", cell) for cell in cells)
            columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in (name, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
