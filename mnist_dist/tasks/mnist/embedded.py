"""The files of MNIST that come with the package. Imports no torch: they are unpacked while that is imported."""

import hashlib
import json
import lzma
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import resources
from typing import Any

from mnist_dist.errors import UserError

_ahead: list[Mapping[str, Future[bytes]]] = []


def load_ahead() -> None:
    """Begin to unpack the files, for the next `read_files`."""
    if not _ahead:
        _ahead.append(_begin(None))


def read_files(folder: Any = None) -> dict[str, bytes]:
    """The four files (of another `folder`, in a test), unpacked, by name. Raises `UserError` for one that is missing or damaged."""
    begun = _ahead.pop() if _ahead and folder is None else _begin(folder)
    return {name: unpacked.result() for name, unpacked in begun.items()}


def _begin(folder: Any) -> Mapping[str, Future[bytes]]:
    folder = folder or resources.files("mnist_dist.tasks.mnist") / "files"
    checksums = json.loads((folder / "checksums.json").read_text())

    def unpack(name: str) -> bytes:
        file = folder / f"{name}.xz"
        try:
            raw = lzma.decompress(file.read_bytes())
        except (OSError, lzma.LZMAError, EOFError) as error:
            raise UserError(f"the data file {file} is missing or damaged ({error}): install the package again") from error
        if hashlib.sha256(raw).hexdigest() != checksums[name]:
            raise UserError(f"the data file {file} is damaged (its checksum differs): install the package again")
        return raw

    threads = ThreadPoolExecutor(2)  # lzma releases the interpreter lock
    try:
        return {name: threads.submit(unpack, name) for name in checksums}
    finally:
        threads.shutdown(wait=False)
