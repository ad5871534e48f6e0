"""The lock of a run folder: one job at a time writes there, and others may ask which. Imports no torch."""

import contextlib
import errno
import fcntl
import logging
import os
import platform
import re
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.errors import RunError, UserError
from mnist_dist.files import is_marked, mark_folder, read_file, read_text

LOCK_FILE = "lock"

_LOCK_WAIT_S = 1.0
_IN_USE = (errno.EAGAIN, errno.EACCES)
_PASSING = (errno.ENOLCK, errno.EIO)  # as from a file server whose table of locks is full, or that has just begun
_BYTES_MAX = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that took a run folder's lock, as the lock file names it, and its Slurm job, empty without one."""

    pid: int
    host: str
    job: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


class Lock:
    """Lets one job at a time write in a run folder. Goes with the process that holds it, however that ends.

    Both the folder and a file in it are locked. The folder's lock cannot be removed by hand, but NFS has none on folders; the file's holds
    there too, and on Lustre mounted with -o flock, and says who holds it. On one node both are certain; between nodes a dead node's lock
    goes when the file server gives up on it.
    """

    def __init__(self, run_dir: Path, patience_s: float = 0.0, is_asked_to_stop: Callable[[], bool] = lambda: False) -> None:
        """Take the lock. Raises `UserError` if the folder is in use, OSError if it is not writable.

        With `patience_s`, a Slurm job waits so many seconds for a holder on another host, which may be the lost node of the start before
        this one. Raises `RunError` if the folder is still in use then, or the job is asked to stop: the next of a chain may find it free.
        """
        self.run_dir = run_dir
        self._end_s = time.monotonic() + patience_s
        self._patience_s, self._is_asked_to_stop = patience_s, is_asked_to_stop
        self._lost, self._gone, self._checking = "", "", threading.Lock()  # rows come from the loop, checkpoints from a thread
        self._text = b""  # what this holder has written into the file, and no other ever did
        self._descriptors = [os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
        _held.add(self)
        try:
            self._lock_soon(self._descriptors[0])
            self._take_file()
            self._patience_s = 0.0  # whoever takes it from now on is no lost node
        except BaseException:
            self.release()
            raise

    def _take_file(self) -> None:
        path = self.run_dir / LOCK_FILE
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            if not self._lock_soon(descriptor):
                _log.warning("the file system of %s has no locks: make sure that no second job uses this folder", self.run_dir)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptors.append(descriptor)
        holder = Holder(os.getpid(), platform.node(), os.environ.get("SLURM_JOB_ID", ""))
        self._text = b""
        with contextlib.suppress(OSError):  # such as of a full disk
            os.ftruncate(descriptor, 0)
            # Two holders may have the same number, as the first processes of two containers do, so each has a token.
            text = f"{holder}\n{mark_folder(self.run_dir)}\n{secrets.token_hex(8)}\n".encode(errors="surrogateescape")
            os.pwrite(descriptor, text, 0)
            os.fsync(descriptor)  # NFS would show it to another host only half a minute later
            self._text = text[-_BYTES_MAX:]

    def _lock_soon(self, descriptor: int) -> bool:
        """Lock a file or folder; False where the file system cannot. Raises `UserError` or `RunError` if it stays locked.

        A program that lists runs may hold it for a moment, to see whether it is locked.
        """
        start_s = answered_s = time.monotonic()
        is_waiting = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                number = error.errno
            now_s = time.monotonic()
            if number in _IN_USE:
                answered_s = now_s
            elif number not in _PASSING or now_s - answered_s > _LOCK_WAIT_S:
                return False
            if number in _IN_USE and now_s - start_s > _LOCK_WAIT_S:
                holder = read_holder(self.run_dir)
                words = f"run_dir {self.run_dir} is in use by {holder or 'another process'}"
                may_be_lost = holder is not None and holder.host != platform.node() and "SLURM_JOB_ID" in os.environ
                if not (self._patience_s and may_be_lost):
                    raise UserError(f"{words}: wait for it, or use another run_dir")
                if now_s > self._end_s or self._is_asked_to_stop():
                    raise RunError(f"{words}, {'still' if now_s > self._end_s else 'and a signal came'} after {now_s - start_s:.0f} s")
                if not is_waiting:
                    _log.warning("%s, which may be a lost node's: waiting for %g s at most", words, self._patience_s)
                    is_waiting = True
            time.sleep(0.05)

    def check(self, *, at_end: bool = False) -> None:
        """Notice that somebody removed the file of the lock, and take it again; warn once where the folder itself is gone.

        Raises `RunError` if another job has the lock, or if another folder is in the place of the one that was locked; and then each time.
        With `at_end`, when nothing can be written later, also if the folder is gone.
        """
        # Where the disk is gone, or the file server does not answer, what is to be written there will tell.
        with self._checking, contextlib.suppress(OSError):
            if not self._lost:
                self._look()
        if self._lost:
            raise RunError(self._lost)
        if self._gone and at_end:
            raise RunError(self._gone)

    def _look(self) -> None:
        """Note in words how this run has lost the folder for good, or for now, if it has; of the latter, warn once. Raises OSError."""
        if self._is_removed():
            self._lost = f"run_dir {self.run_dir} is gone: somebody removed it, and the run stops"
            return
        if self._is_in_place():
            self._gone = ""
            self._lost = self._keep_file()
            return
        before, self._gone = self._gone, ""
        path = self._find_path()
        where = f": somebody moved it to {path}" if path else ""
        if os.path.lexists(self.run_dir):
            self._lost = f"another folder is in the place of this run's, {self.run_dir}{where}; the run stops and leaves it alone"
        else:
            self._gone = f"run_dir {self.run_dir} is gone{where}; nothing of this run can be saved until it is back"
            if not before:
                _log.warning("%s", self._gone)

    def find_folder(self) -> Path:
        """The folder that was locked, wherever it is today. Raises `RunError` if another job has it, or nobody can tell; and OSError."""
        if not self._descriptors or self._is_in_place():
            self.check()
            return self.run_dir
        path = self._find_path()
        if path is None:
            raise RunError(f"run_dir {self.run_dir} is gone")
        return path

    def _is_in_place(self) -> bool:
        """Whether the folder that was locked has its name still. Raises OSError where the file server does not answer."""
        try:
            return os.path.samestat(os.stat(self.run_dir), os.fstat(self._descriptors[0]))
        except (FileNotFoundError, NotADirectoryError):  # FUSE raises the first for an open folder that was moved or removed
            return False

    def _is_removed(self) -> bool:
        """Whether the folder that was locked is no more. Raises OSError."""
        try:
            return not os.fstat(self._descriptors[0]).st_nlink
        except FileNotFoundError:
            return False  # it may be back
        except OSError as error:
            if error.errno == errno.ESTALE:  # of NFS, on which one that was only moved answers as before
                return True
            raise

    def _find_path(self) -> Path | None:
        """What the folder that was locked is called today; None where it was removed, or the system does not tell, as Linux does."""
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{self._descriptors[0]}")
            if os.path.samestat(os.stat(path), os.fstat(self._descriptors[0])):
                return Path(path)
        return None

    def _keep_file(self) -> str:
        """Take the file of the lock again if somebody removed it; in words, that another job has the lock. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.run_dir / LOCK_FILE), os.fstat(self._descriptors[-1])):
                # Of a node that was cut off, NFS forgets the lock, and what is held here looks as before. So does the text: NFS reads it
                # anew while the file is open for writing here only if it is told to forget it.
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._descriptors[-1], 0, 0, os.POSIX_FADV_DONTNEED)
                text = read_file(self.run_dir / LOCK_FILE, _BYTES_MAX, tail=True)
                if self._text and text and text != self._text:
                    other = read_holder(self.run_dir) or "another writer"
                    return f"run_dir {self.run_dir}: its lock was lost to {other}; this run stops and leaves the folder alone"
                return ""
        try:
            self._take_file()
        except UserError as error:
            return f"somebody has removed the lock of {self.run_dir}, and this run stops: {error}"
        _log.warning("somebody has removed the lock of %s: it is taken again", self.run_dir)
        return ""

    def release(self) -> None:
        """Give the folder back."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def forget(self) -> None:
        """Close the files of the lock in a process that was forked from its holder's, whose lock stays."""
        self._lost = f"run_dir {self.run_dir} belongs to the process that this one was forked from"
        self.release()


_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in _held:
        lock.forget()


# A process that a task has forked may outlive the run, and with open files it would keep the folder locked.
os.register_at_fork(after_in_child=_forget_in_child)


def read_holder(run_dir: Path) -> Holder | None:
    """Who took the lock of a run folder last, be it alive or not; None where the lock does not tell, or is the copy of another folder's."""
    text, mark, *_ = [*read_text(run_dir / LOCK_FILE, _BYTES_MAX).split("\n"), ""]
    match = re.fullmatch(r"process (\d{1,18}) on (.{1,255}?)(?: \(Slurm job (\d{1,18})\))?", text.strip())
    return Holder(int(match[1]), match[2], match[3] or "") if match and is_marked(run_dir, mark) else None


def find_process(run_dir: Path, holder: Holder | None) -> int | None:
    """The process of this machine that holds the lock. To try the lock could make a run that starts just now believe that it is taken."""
    if holder is None or holder.host != platform.node():
        return None
    with contextlib.suppress(OSError):  # no such process, or somebody else's
        lock = os.stat(run_dir / LOCK_FILE)
        with os.scandir(f"/proc/{holder.pid}/fd") as descriptors:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):  # closed meanwhile
                    if os.path.samestat(descriptor.stat(), lock):
                        return holder.pid
    return None


def is_locked_elsewhere(run_dir: Path, holder: Holder | None) -> bool:
    """Whether another machine holds the lock, as far as the file system tells."""
    if holder is None or holder.host == platform.node():
        return False
    try:
        with (run_dir / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
