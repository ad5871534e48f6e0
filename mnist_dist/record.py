"""The record of a run: metrics.jsonl as a run writes it, and its whole folder as others read it. Imports no torch."""

import json
import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_dist.config import CLASSES, Config, make_config
from mnist_dist.errors import UserError
from mnist_dist.options import read_options_file

CONFIG_FILE, METRICS_FILE, STARTS_FILE, RESULT_FILE = "config.yaml", "metrics.jsonl", "starts.jsonl", "result.json"
LOCK_FILE = "lock"
CHECKPOINT_NAME = re.compile(r"step_(\d{8,})-([0-9a-f]{16})\.pt")  # its step, and the start of the SHA-256 of its bytes
_RESULT_NUMBERS = ("step", "test/accuracy", "test/errors", "test/images", "test/loss", "elapsed_s", "images_per_s", "world_size")

Row = dict[str, Any]

_log = logging.getLogger(__name__)


class Record:
    """metrics.jsonl: one JSON object a row, one row a step, steps only rising."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = 0  # where the next row goes: what lies behind it was never finished
        self._pending = b""
        self._writing = threading.Lock()  # rows come from the loop, `sync` from the thread that writes checkpoints
        self._waiting = False
        self.last_step = 0

    def truncate(self, step: int) -> None:
        """Keep the rows up to `step`, and of a torn last row nothing."""
        kept = 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            row = _parse_row(line)
            if row is None and number < len(lines):
                _log.warning("row %d of %s is damaged: it and the rows after it are lost", number, self.path)
            if row is None or row["step"] > step:
                break
            kept += len(line)
            self.last_step = row["step"]
        os.ftruncate(self._descriptor, kept)
        self._end = kept

    def append(self, row: Row) -> None:
        """Add a row. Where the disk refuses it, it is kept for the next try and a warning is given."""
        assert row["step"] > self.last_step, "rows only go forward"
        self.last_step = row["step"]
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            self._flush(line)
            self._waiting = False
        except OSError as error:
            if not self._waiting:  # said once, not for every row
                _log.warning("metrics.jsonl cannot be written, its rows wait in memory: %s", error.strerror)
            self._waiting = True

    def sync(self) -> None:
        """Make all rows durable. Raises OSError."""
        self._flush()
        os.fsync(self._descriptor)

    def _flush(self, line: bytes = b"") -> None:
        with self._writing:
            self._pending += line
            while self._pending:
                written = os.pwrite(self._descriptor, self._pending, self._end)
                self._end += written
                self._pending = self._pending[written:]

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `result` is None while the run is not finished."""

    path: Path
    config: Config
    rows: list[Row]
    starts: list[Row]
    result: Row | None


def read_run(run_dir: Path) -> Run:
    """Read the run in `run_dir`. Raises `UserError` where that is no run folder or one of its files is damaged."""
    if not os.path.isfile(run_dir / CONFIG_FILE):  # unlike Path.is_file, False for a name that the system refuses
        raise UserError(f"{run_dir} is not a run folder: it has no {CONFIG_FILE}; the folder that --run_dir named is wanted")
    return Run(run_dir, read_config(run_dir), _read_rows(run_dir / METRICS_FILE), _read_rows(run_dir / STARTS_FILE), read_result(run_dir))


def check_recipe(run_dir: Path, config: Config) -> None:
    """Raise `UserError` that shows what differs if the folder holds a run of another recipe than `config`'s."""
    if (run_dir / CONFIG_FILE).exists():
        there = read_config(run_dir).recipe()
        check_same(there, config.recipe(), f"run_dir {run_dir} holds another run; use another run_dir, or the same options:")


def check_same(there: Row, asked: Row, what: str) -> None:
    """Raise `UserError` that says `what` and shows each value in which the two differ."""
    missing = "(not there)"
    differences = [
        f"  {name}: {there.get(name, missing)} there, {asked.get(name, missing)} asked for"
        for name in sorted({*there, *asked})
        if there.get(name, missing) != asked.get(name, missing)
    ]
    if differences:
        raise UserError("\n".join([what, *differences]))


def read_config(run_dir: Path) -> Config:
    """The config of the run in a folder. Raises `UserError` where the file is missing or damaged."""
    path = run_dir / CONFIG_FILE
    return make_config(read_options_file(path), str(path))


@dataclass(frozen=True)
class Holder:
    """The process that took a run folder's lock, as the lock file names it, and its Slurm job, empty without one."""

    pid: int
    host: str
    job: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (Slurm job {self.job})" if self.job else "")


def read_holder(run_dir: Path) -> Holder | None:
    """Who took the lock of a run folder last, be it alive or not; None where the lock does not tell."""
    try:
        text = (run_dir / LOCK_FILE).read_text(errors="replace")[:500]
    except OSError:
        return None
    match = re.fullmatch(r"process (\d+) on (.+?)(?: \(Slurm job (\d+)\))?", text.strip())
    return Holder(int(match[1]), match[2], match[3] or "") if match else None


def read_result(run_dir: Path) -> Row | None:
    """The result of a finished run, None before. Raises `UserError` where the file is damaged."""
    path = run_dir / RESULT_FILE
    content = _read_file(path)
    if content is None:
        return None
    result = parse_object(content)
    good = {name: isinstance(result.get(name), int | float) for name in _RESULT_NUMBERS}
    good["test/confusion_matrix"] = _is_confusion(result.get("test/confusion_matrix"))
    for name in good:
        if not good[name]:
            raise UserError(f"{path} is damaged: it has no valid {name}; delete it to let the run write it again from its last checkpoint")
    return result


def _read_rows(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate((_read_file(path) or b"").splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # the run is writing it now, or was killed while it did
        row = _parse_row(line)
        if row is None:
            raise UserError(f"{path} is damaged: line {number} is not a JSON object with a step")
        rows.append(row)
    return rows


def _read_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _parse_row(line: bytes) -> Row | None:
    row = parse_object(line)
    return row if line.endswith(b"\n") and isinstance(row.get("step"), int) else None


def parse_object(text: bytes) -> Row:
    """The JSON object in `text`; an empty one where there is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_confusion(value: object) -> bool:
    rows = value if isinstance(value, list) else []
    return [isinstance(row, list) and [type(count) for count in row] for row in rows] == [[int] * CLASSES] * CLASSES


def mark_folder(run_dir: Path) -> str:
    """One line that names a folder: its inode and its absolute path. Raises OSError."""
    return f"{os.stat(run_dir).st_ino} {os.path.abspath(run_dir)!a}"


def is_marked(run_dir: Path, mark: str) -> bool:
    """Whether `mark` names this folder, moved or not; False for a copy, whose inode and path are both others. No mark fits all."""
    return not mark or any(mine == theirs for mine, theirs in zip(mark_folder(run_dir).split(" ", 1), mark.split(" ", 1), strict=False))
