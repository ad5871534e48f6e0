"""The two kinds of failure that end a run with one message instead of a traceback, and those that come from outside. Imports no torch."""

import re
import traceback

# How a collective fails when another rank is gone: gloo raises a bare RuntimeError with one of these in it.
_LOST = re.compile(r"gloo|closed by peer|reset by peer|[Tt]imed? ?out|NCCL", re.DOTALL)
# The third is how oneDNN says it; of an operation that it does not know it says "a primitive descriptor".
_NO_MEMORY = r"DefaultCPUAllocator: |Cannot allocate memory|could not create a primitive$|failed to map segment(?!.*not permitted)"
_STARTING = ("_execute_child", "_launch")  # of subprocess and multiprocessing, where they start a process


class UserError(ValueError):
    """A mistake that its user can correct: an option, a file, a world. The message names the thing, its value and what is allowed."""

    exit_code = 2


class RunError(RuntimeError):
    """A failure while running that is nobody's typing mistake: a NaN, a full disk, a lost rank."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """What `error` says, in one line: the name of its kind where it says nothing."""
    text = str(error).strip()
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:  # of a DataLoader: its own words are below
        words = [line for line in text.rpartition("Traceback (most recent call last):\n")[2].splitlines() if not line.startswith(" ")]
        text = re.sub(rf"^(\w+\.)*{type(error).__name__}: ", "", "\n".join(words)) or text
    return (text or type(error).__name__).splitlines()[0]


class NotFiniteError(RunError):
    """A number of the training is not finite. It would be so again after a start from the same checkpoint."""


def is_lost_rank(error: BaseException) -> bool:
    """Whether `error` is how a collective fails when another rank is gone, or never came."""
    is_torchs_own = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    return is_torchs_own or (type(error) is RuntimeError and _LOST.search(str(error)) is not None and not is_lost_worker(error))


def is_lost_worker(error: BaseException) -> bool:
    """Whether `error` is what torch raises, wherever this process happens to be, when a worker of a DataLoader dies or is silent."""
    return type(error) is RuntimeError and str(error).startswith("DataLoader ")


def describe_shortage(error: BaseException) -> str:
    """What this host, or a limit of it, has too little of, in words: memory, threads or processes. Empty: `error` is of nothing such."""
    text = str(error)
    if isinstance(error, MemoryError) or re.search(_NO_MEMORY, text):
        return "there is too little memory (see free, ulimit -v and the limit of the job)"
    # A lock that is taken has the same words.
    starts = traceback.extract_tb(error.__traceback__)[-1:]
    is_of_start = type(error) is RuntimeError or any(frame.name in _STARTING for frame in starts)
    if "can't start new thread" in text or ("Resource temporarily unavailable" in text and is_of_start):
        return "no more threads or processes can be started (see ulimit -u, and pids.max of the cgroup)"
    return ""


def is_device_failure(error: BaseException) -> bool:
    """Whether `error` is what torch raises when a GPU has no room, or fails."""
    return any(kind.__name__ in ("OutOfMemoryError", "AcceleratorError") for kind in type(error).__mro__)
