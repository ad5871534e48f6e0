"""The lock of a run folder: one job at a time writes there. Imports no torch."""

import contextlib
import errno
import fcntl
import logging
import os
import platform
import time
from pathlib import Path

from mnist_dist.errors import RunError, UserError
from mnist_dist.files import mark_folder
from mnist_dist.record import LOCK_FILE, Holder, read_holder

_LOCK_WAIT_S = 1.0
_log = logging.getLogger(__name__)


class Lock:
    """Lets one job at a time write in a run folder. Goes with the process that holds it, however that ends.

    Both the folder and a file in it are locked. The folder's lock cannot be removed by hand, but NFS has none on folders; the file's holds
    there too, and on Lustre mounted with -o flock, and says who holds it. On one node both are certain; between nodes a dead node's lock
    goes when the file server gives up on it.
    """

    def __init__(self, run_dir: Path) -> None:
        """Take the lock. Raises `UserError` if the folder is in use, OSError if it is not writable."""
        self.run_dir = run_dir
        self._descriptors = [os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
        try:
            _lock_soon(self._descriptors[0], run_dir)
            self._take_file()
        except BaseException:
            self.release()
            raise

    def _take_file(self) -> None:
        path = self.run_dir / LOCK_FILE
        self._descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))
        if not _lock_soon(self._descriptors[-1], self.run_dir):
            _log.warning("the file system of %s has no locks: make sure that no second job uses this folder", self.run_dir)
        holder = Holder(os.getpid(), platform.node(), os.environ.get("SLURM_JOB_ID", ""))
        with contextlib.suppress(OSError):  # the text only serves the message of another job, and launch.jobs
            os.ftruncate(self._descriptors[-1], 0)
            os.pwrite(self._descriptors[-1], f"{holder}\n{mark_folder(self.run_dir)}\n".encode(errors="surrogateescape"), 0)

    def check(self) -> None:
        """Notice that somebody removed the file of the lock, and take it again.

        Raises `RunError` if another job was quicker, or if another folder is in the place of the one that was locked.
        """
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.stat(self.run_dir), os.fstat(self._descriptors[0])):
                raise RunError(f"somebody has put another folder in the place of {self.run_dir}: this run stops and leaves that alone")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.run_dir / LOCK_FILE), os.fstat(self._descriptors[-1])):
                return
        try:
            self._take_file()
            _log.warning("somebody has removed the lock of %s: it is taken again", self.run_dir)
        except UserError as error:
            raise RunError(f"somebody has removed the lock of {self.run_dir}, and this run stops: {error}") from error
        except OSError:
            pass  # the folder is gone, or its disk: what is to be written there will tell

    def release(self) -> None:
        """Give the folder back."""
        for descriptor in self._descriptors:
            os.close(descriptor)


def _lock_soon(descriptor: int, run_dir: Path) -> bool:
    """Lock a file or folder; False where the file system cannot. Raises `UserError` if it is locked already.

    A program that lists runs may hold it for a moment, to see whether it is locked.
    """
    end = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return False
            if time.monotonic() > end:
                holder = read_holder(run_dir) or "another process"
                raise UserError(f"run_dir {run_dir} is in use by {holder}: wait for it, or use another run_dir") from None
            time.sleep(0.05)
