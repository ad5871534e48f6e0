"""Files as this program reads and writes them, and folders as people write them. Imports no torch.

What lies in a run folder may come from somebody else, or be damaged: nothing is read that is no regular file, or of no sensible size.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
from pathlib import Path

from mnist_dist.errors import UserError

_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{8}\.tmp")
_LINES_BYTES_MAX = 16 << 20
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG)


def read_file(path: str | Path, bytes_max: int, *, tail: bool = False) -> bytes:
    """The bytes of a regular file of at most `bytes_max`; with `tail`, the last `bytes_max` of a larger one.

    Never waits, as opening a FIFO would. Raises OSError, also for what is no regular file, or too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, "that cannot be the name of a file", str(path)) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}", str(path))
    with open(descriptor, "rb") as file:
        size = status.st_size
        if size > bytes_max and not tail:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {bytes_max:,} that are read", str(path))
        file.seek(max(0, size - bytes_max))
        return file.read(min(size, bytes_max))


def read_text(path: str | Path, bytes_max: int, *, tail: bool = False) -> str:
    """The text of a file, or of its end, as of `read_file`; empty where it cannot be read."""
    try:
        return read_file(path, bytes_max, tail=tail).decode(errors="replace")
    except OSError:
        return ""


def read_kernel_count(path: str, name: str) -> int | None:
    """The whole number after `name`, at the start of a line of one of the kernel's files; None where it does not tell."""
    try:
        match = re.search(rf"^{name} (\d{{1,15}})$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) if match else None


def check_readable(folder: str | Path) -> None:
    """Raise `UserError` for a folder that is there, as far as this user can tell, and may not be read: what it holds is not known."""
    try:
        os.scandir(folder).close()
        os.stat(os.path.join(folder, "."))  # one that can be listed and not entered
    except OSError as error:
        if error.errno not in _NO_FOLDER:  # of which others say what it is instead
            raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    except ValueError:  # no name at all
        return


def check_free_name(name: str, path: Path) -> None:
    """Raise `UserError` unless the new file of the option `name` can be called `path`: a new name, in a folder that may be written to."""
    if os.path.lexists(path) or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{name} is {path}, which exists, or whose folder cannot be written to; expected a new name in an existing folder")


def write_atomically(path: Path, content: bytes | memoryview, *, durable: bool = True) -> None:
    """Replace `path` by `content`: after a crash at any moment the old file or the new one is there, complete. Raises OSError.

    Of several processes that do so at once, the last one counts. Nothing waits for the disk unless it is to be `durable`: then that is
    true of a crash of the host as well, not of this process alone.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def find_final_name(name: str) -> str:
    """What the temporary file `name` of `write_atomically` would have become; empty for the name of any other file."""
    match = _TEMPORARY.fullmatch(name)
    return match[1] if match else ""


def append_line(path: Path, line: bytes) -> int:
    """Add a line to a small file of lines, and count its lines; a last one that was torn goes. Raises OSError.

    Two processes may add lines to a whole file at once.
    """
    content = read_file(path, _LINES_BYTES_MAX) if os.path.lexists(path) else b""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "ab") as file:
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        file.write(line + b"\n")
    return content.count(b"\n") + 1


def as_argument(path: Path) -> str:
    """A path as a command line takes it: one that begins with a hyphen would be an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def describe_error(error: OSError) -> str:
    """What the system says, and of which file."""
    reason = "it is a link, which is not followed" if error.errno == errno.ELOOP else error.strerror or str(error)
    return f"{reason} ({error.filename})" if error.filename else reason


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the file system can."""
    with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def expand_path(text: str) -> str:
    """`text` with a leading `~` and every `$NAME` or `${NAME}` replaced, as a shell would have done.

    A YAML file and `--run_dir=~/x` reach the program as they are written. Raises ValueError where there is nothing to put in their place:
    otherwise folders called `~` and `$SCRATCH` would be made.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"there is no user {expanded.split('/')[0]!r}; write ./{text} for a folder of that name")

    def find(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is not set; set it, or write out the folder")
        return os.environ[name]

    expanded = re.sub(r"\$(?:(\w+)|\{(\w+)\})", find, expanded)
    if "$" in expanded:
        raise ValueError("a $ must begin the name of an environment variable, such as $SCRATCH or ${SCRATCH}")
    return expanded


def mark_folder(folder: Path) -> str:
    """A line that tells `folder` from a copy of it: its inode and its absolute path. Raises OSError."""
    path = os.path.abspath(folder)
    return f"{os.stat(path).st_ino} {path!a}"


def is_marked(folder: Path, mark: str) -> bool:
    """Whether `mark` was made for `folder`, which may have been moved or restored since; True for the empty mark of older versions."""
    mark = mark.strip()
    try:
        return not mark or any(ours == theirs for ours, theirs in zip(mark_folder(folder).split(" ", 1), mark.split(" ", 1), strict=False))
    except OSError:
        return False
