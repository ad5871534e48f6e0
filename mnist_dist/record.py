"""The record of a run: the files of its folder, metrics.jsonl as a run writes it, and all of it as others read it. Imports no torch."""

import contextlib
import datetime
import errno
import io
import json
import logging
import os
import re
import shlex
import stat
import threading
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from mnist_dist.config import SIZE_NAMES, Config, make_config
from mnist_dist.errors import UserError
from mnist_dist.files import as_argument, check_readable, describe_error, find_final_name, read_file, read_kernel_count, write_atomically
from mnist_dist.options import read_options_file, spell
from mnist_dist.source import BUILT_IN, Unknown, find_task, is_built_in, is_named_before, make_unknown, note_named
from mnist_dist.task import Row, Task, shorten_name

# What the training leaves in a run folder. Beside these it makes wandb/ and tensorboard/, and while it runs a lock; the launchers slurm/.
CONFIG_FILE, METRICS_FILE, RESULT_FILE = "config.yaml", "metrics.jsonl", "result.json"
STARTS_FILE, ENDS_FILE = "starts.jsonl", "ends.jsonl"
WEIGHTS_FILE, REPORT_FILE = "model.safetensors", "report.html"
CHECKPOINTS, CHECKPOINT_NAME = "checkpoints", re.compile(r"step_(\d{8,18})-([0-9a-f]{16})\.pt")  # its step, its SHA-256's beginning
PLOTS, CURVES = "plots", "curves"  # the picture that every run has
PICTURE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.png")
STACKS, STACK_NAME = "stacks", re.compile(r"rank\d{1,7}\.txt")  # of the ranks, when one of them was silent
_FILES = (CONFIG_FILE, METRICS_FILE, STARTS_FILE, ENDS_FILE, RESULT_FILE, WEIGHTS_FILE, REPORT_FILE)

_RECORD_BYTES_MAX = 256 << 20
_ROWS_MAX = 1_000_000
_STEPS_MAX = 2**53
_ALWAYS = ("run_dir", "batch_size", "learning_rate", "seed", "precision", "log_every", "checkpoint_every")  # from its begin to its end
_SMALL_BYTES_MAX = 1 << 20  # of a note
_RESULT_BYTES_MAX = 256 << 20  # it has the facts of the data, such as a vocabulary, and all measures
_DEPTH_MAX = 16  # of lists in a measure
_NAME_MAX = 1000  # letters of a measure's name: to draw a text takes time
_LIST_NAME = re.compile(r"(test|holdout)/(?!loss$).*", re.DOTALL)  # of what may be a list of numbers: a measure of a task
_RESULT_NUMBERS = ("step", "elapsed_s", "images_per_s", "world_size")

_log = logging.getLogger(__name__)


class Record:
    """metrics.jsonl: one JSON object a row, one row a step, steps only rising."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps = array("q")  # of the rows in the file, and of those that still wait for the disk
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise OSError(None, f"{path.name} is not a regular file")
        self._end = 0  # where the next row goes: what lies behind it was never finished
        self._pending = b""
        self._writing = threading.Lock()  # rows come from the loop, `sync` from the thread that writes checkpoints
        self._waiting = False

    def cut_back(self, step: int, promised: Iterable[int] | None = None) -> None:
        """Keep the valid rows up to `step`. Names on the log what is damaged, and which of the `promised` steps have no row."""
        good, moved, damaged = 0, io.BytesIO(), []  # rows that lie where they belong, in bytes; those behind what goes
        for number, start, line in self._read_lines():
            row = parse_object(line)
            is_good = is_row(row)
            if is_good and row["step"] > step:
                continue
            if not is_good or (self.steps and row["step"] <= self.steps[-1]):
                if line.endswith(b"\n"):  # else it was torn: the run was killed while it wrote
                    damaged.append(number)
                continue
            whole = line.rstrip(b"\r\n") + b"\n"
            if start == good and whole == line:
                good += len(line)
            else:
                moved.write(whole)
            self.steps.append(row["step"])
        if damaged:
            _log.warning("%s: %s damaged or out of order and left out", self.path, _name_some(damaged, "line", "lines"))
        missing = sorted(set(promised or ()) - set(self.steps))
        if missing:
            _log.warning("%s lacks rows that the checkpoint promises, those of %s", self.path, _name_some(missing, "step"))
        self._end = good + len(moved.getbuffer())
        if self._end == good:
            os.ftruncate(self._descriptor, good)
        else:
            with open(self._descriptor, "rb", closefd=False) as file:
                file.seek(0)
                content = file.read(good) + moved.getvalue()
            self._replace(content)

    def _read_lines(self) -> Iterator[tuple[int, int, bytes]]:
        """The number, the place and the bytes of each line, however many a long run has made. Raises OSError where one has no end."""
        start = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(iter(lambda: file.readline(_RECORD_BYTES_MAX), b""), start=1):
                if len(line) == _RECORD_BYTES_MAX:
                    raise OSError(errno.EFBIG, f"line {number} has more than the {len(line) - 1:,} bytes that are read", str(self.path))
                yield number, start, line
                start += len(line)

    def append(self, row: Row) -> None:
        """Add a row. Where the disk refuses it, it is kept for the next try and a warning is given."""
        assert not self.steps or row["step"] > self.steps[-1], "rows only go forward"
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            self._flush(line, row["step"])
            self._waiting = False
        except OSError as error:
            if not self._waiting:  # said once, not for every row
                _log.warning("metrics.jsonl cannot be written, its rows wait in memory: %s", error.strerror)
            self._waiting = True

    def copy_steps(self) -> list[int]:
        """The steps of all rows."""
        with self._writing:
            return self.steps.tolist()

    def sync(self) -> None:
        """Make all rows durable. Raises OSError."""
        self._flush()
        with self._writing:
            descriptor = os.dup(self._descriptor)  # the loop may replace it while this waits for the disk
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _flush(self, line: bytes = b"", step: int | None = None) -> None:
        with self._writing:
            self._pending += line
            if step is not None:
                self.steps.append(step)
            self._notice_changes()
            while self._pending:
                written = os.pwrite(self._descriptor, self._pending, self._end)
                self._end += written
                self._pending = self._pending[written:]

    def _notice_changes(self) -> None:
        """Repair what somebody did to the file since the last row, with a warning: no row goes where nobody finds it. Raises OSError."""
        own = os.fstat(self._descriptor)
        try:
            there = os.stat(self.path).st_ino
        except FileNotFoundError:
            there = None
        content = os.pread(self._descriptor, self._end, 0) if own.st_size < self._end or there != own.st_ino else b""
        if own.st_size < self._end:
            rows_before = len(self.steps) - self._pending.count(b"\n")
            content = content[: content.rfind(b"\n") + 1]
            rows = content.count(b"\n")
            lost = self.steps[rows:rows_before].tolist()
            del self.steps[rows:rows_before]
            os.ftruncate(self._descriptor, len(content))
            self._end = len(content)
            _log.warning("somebody has cut %s: the rows of %s are lost", self.path, _name_some(lost, "step"))
        elif own.st_size > self._end:
            os.ftruncate(self._descriptor, self._end)
            _log.warning("somebody has written to %s: what is not the run's own is removed", self.path)
        if there != own.st_ino:
            self._replace(content)
            _log.warning("somebody has removed or replaced %s: it is written again, with all rows", self.path)

    def _replace(self, content: bytes) -> None:
        write_atomically(self.path, content)
        old, self._descriptor = self._descriptor, os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.close(old)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)


def _name_some(numbers: list[int], one: str, several: str = "") -> str:
    """Some numbers in words: `step 5`, or `12 steps from 50 to 600`."""
    if len(numbers) == 1:
        return f"{one} {numbers[0]} is" if several else f"{one} {numbers[0]}"
    words = f"{len(numbers)} {several or one + 's'} from {numbers[0]} to {numbers[-1]}"
    return f"{words} are" if several else words


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `result` is None while the run is not finished."""

    path: Path
    config: Config
    rows: list[Row]
    starts: list[Row]
    ends: list[Row]  # of the starts that did not die without noting why
    result: Row | None


def read_run(run_dir: Path, config: Config | None = None) -> Run:
    """Read the run in `run_dir`, whose config may be known. Raises `UserError` where it is no run folder or a file is damaged."""
    check_readable(run_dir)
    if not os.path.isfile(run_dir / CONFIG_FILE):  # unlike Path.is_file, False for a name that the system refuses
        raise UserError(f"{run_dir} is not a run folder: it has no {CONFIG_FILE}; expected the folder that --run_dir named")
    starts = read_starts(run_dir)
    config = with_noted_sizes(config or read_config(run_dir), starts)
    return Run(run_dir, config, read_rows(run_dir, config), starts, read_ends(run_dir), read_result(run_dir, config))


def with_noted_sizes(config: Config, starts: list[Row]) -> Config:
    """The config, with the sizes of its data that the last start noted, where they were not known before that."""
    sizes = [tuple(start.get(name) for name in SIZE_NAMES) for start in starts]
    if config.has_sizes or not sizes or not all(is_count(size) for size in sizes[-1]):
        return config
    return config.with_sizes(sizes[-1])  # type: ignore[arg-type]


def check_folder(run_dir: Path, config: Config) -> None:
    """Raise `UserError` if `run_dir` cannot be listed, or holds another run than `config`'s, or files of ours that belong to none."""
    config.to_yaml()  # refused here where it is too long to be read again
    try:
        os.scandir(run_dir).close()
        _check_folder(run_dir, config)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"run_dir {run_dir} cannot be used: {describe_error(error)}; expected a writable folder") from error


def has_begun(run_dir: Path) -> bool:
    """Whether a training has begun in a folder. Raises OSError."""
    return os.path.lexists(run_dir / CONFIG_FILE) or bool(list_newest_first(run_dir / CHECKPOINTS))


def _check_folder(run_dir: Path, config: Config) -> None:
    os.stat(run_dir / ".")  # a folder that can be listed and not entered
    if (run_dir / CONFIG_FILE).exists():
        there = read_config(run_dir, type(config.task)).recipe()
        try:
            check_same_recipe(there, config.recipe(), f"run_dir {run_dir} holds another run; use another run_dir, or the same options:")
        except UserError as error:
            own = shlex.join(["--config", as_argument(run_dir / CONFIG_FILE), "--run_dir", as_argument(run_dir)])
            raise UserError(f"{error}\n  to go on with what is there, as after an upgrade that has other defaults: {own}") from None
    elif has_begun(run_dir):
        if os.path.lexists(run_dir / RESULT_FILE):
            raise UserError(
                f"run_dir {run_dir} holds {RESULT_FILE} but no {CONFIG_FILE}, so nothing tells of which options: restore {CONFIG_FILE}, or "
                f"remove {RESULT_FILE}, and the run's own command writes both again from its last checkpoint"
            )
    else:
        for name in (*_FILES, *(f"{PLOTS}/{path.name}" for path in list_pictures(run_dir)), *list_stacks(run_dir)):
            path = run_dir / name
            if os.path.lexists(path) and not (os.path.isfile(path) and os.path.getsize(path) == 0):
                raise UserError(
                    f"run_dir {run_dir} holds {name} but no {CONFIG_FILE}, so it is not a run, and {name} would be overwritten: "
                    "use another run_dir, or move that file away"
                )


def list_stacks(run_dir: Path) -> list[str]:
    """The names, in a folder, of the files of stacks there."""
    return sorted(f"{STACKS}/{path.name}" for path in (run_dir / STACKS).glob("*.txt") if STACK_NAME.fullmatch(path.name))


def list_pictures(run_dir: Path) -> list[Path]:
    """The pictures in a folder under names that a report gives them."""
    return sorted(path for path in (run_dir / PLOTS).glob("*.png") if PICTURE_NAME.fullmatch(path.name))


def check_same(there: Row, asked: Row, what: str) -> None:
    """Raise `UserError` that says `what` and shows each value in which the two differ."""
    differences = []
    for name in sorted({*there, *asked}):
        if name not in there or name not in asked or there[name] != asked[name]:
            one = f"{spell(there[name])} there" if name in there else "not there"
            other = f"{spell(asked[name])} asked for" if name in asked else "not asked for"
            differences.append(f"  {name}: {one}, {other}")
    if differences:
        more = [f"  and {len(differences) - 20} more"] if len(differences) > 20 else []
        raise UserError("\n".join([what, *differences[:20], *more]))


def check_same_recipe(there: Row, asked: Row, what: str) -> None:
    """`check_same` of two recipes. Of two that both have steps, the epochs mean nothing, and may differ."""
    if there.get("steps") is not None and asked.get("steps") is not None:
        there, asked = ({name: value for name, value in recipe.items() if name != "epochs"} for recipe in (there, asked))
    check_same(there, asked, what)


def remove_temporary_files(run_dir: Path) -> None:
    """Delete what a killed writer left behind: regular files under names that this program gives them, and nothing else. Raises OSError."""
    own = {PLOTS: PICTURE_NAME, STACKS: STACK_NAME, CHECKPOINTS: CHECKPOINT_NAME, "": re.compile("|".join(map(re.escape, _FILES)))}
    for folder, pattern in own.items():
        with contextlib.suppress(FileNotFoundError), os.scandir(run_dir / folder) as entries:
            for entry in entries:
                if pattern.fullmatch(find_final_name(entry.name)) and entry.is_file(follow_symlinks=False):
                    os.unlink(entry)


def list_newest_first(checkpoints: Path) -> list[Path]:
    """The checkpoints in a folder by falling step, valid or not; none where there is no folder. Raises OSError where it cannot be read."""
    try:
        with os.scandir(checkpoints) as entries:
            paths = [Path(entry.path) for entry in entries if CHECKPOINT_NAME.fullmatch(entry.name)]
    except FileNotFoundError:
        return []
    return sorted(paths, key=find_step, reverse=True)


def find_step(path: Path) -> int:
    """The step that a checkpoint's name carries."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def read_config(run_dir: Path, task: type[Task] | None = None) -> Config:
    """The config of the run in a folder, with the folder as it is called here. Raises `UserError` where the file is missing or damaged.

    The folder may be somebody else's, so the code of the task that it names is not run: `task` is the one that the user named. Where that
    is None, or another one, the task of this package; else the options are there, and nothing that could be called.
    """
    path = run_dir / CONFIG_FILE
    values = read_options_file(path)
    if missing := [name for name in _ALWAYS if name not in values]:
        raise UserError(f"{path} is damaged: it lacks {missing[0]}, which every run writes there")
    values.pop("run_dir", None)
    if values.get("log_with") not in (None, "tensorboard"):  # older versions knew more trackers
        del values["log_with"]
    name = values.get("task", BUILT_IN)
    # A file that was moved is the same task; what is another one's is told by the comparison of the recipes.
    if task is None or shorten_name(task.name) != shorten_name(str(name)):
        task = find_task(name) if isinstance(name, str) and is_built_in(name) else make_unknown(name)
    return make_config(values, str(path), task).replace_run_dir(run_dir)


def read_named_config(run_dir: Path, name: str | None) -> Config:
    """The config of a run, with the code of its task: the one that the user names here, or has named before for a run of their own.

    Raises `UserError` where the user has done neither, and as `read_config` does.
    """
    config = read_config(run_dir)
    if name is not None:
        given = find_task(name)
        note_named(given.name)
        return make_config(config.values() | {"task": given.name}, str(run_dir / CONFIG_FILE), given).replace_run_dir(run_dir)
    if isinstance(config.task, Unknown) and is_named_before(config.task.name):
        if config.task.name.endswith(".py") and not os.path.isfile(config.task.name):
            raise UserError(f"{run_dir} is a run of task {config.task.name}, which is no file any more: name where it is now by --task")
        return read_config(run_dir, find_task(config.task.name))
    return config


def read_result(run_dir: Path, config: Config | None) -> Row | None:
    """The result of a finished run of `config`, which may not be known; None before. Raises `UserError` where the file is damaged."""
    path = run_dir / RESULT_FILE
    content = _read(path, _RESULT_BYTES_MAX)
    if content is None:
        return None
    result = parse_object(content)
    result = _rename_split(result, config) if config else result
    split = config.evaluated_split if config else "holdout" if "holdout/loss" in result else "test"
    good = {name: is_measure(value, name) for name, value in result.items() if name.startswith(f"{split}/")}
    good |= {name: is_number(result.get(name)) for name in (*_RESULT_NUMBERS, f"{split}/loss")}
    good["step"] = is_count(result.get("step")) and (config is None or 1 <= result["step"] <= find_last_step(config))
    if config is not None:
        good[config.best] = is_number(result.get(config.best))
        task = config.task.with_facts(result)  # among whose values they are
        wrong = task.check_measures(pick_measures(result, split))
        good |= {} if wrong is None else {f"{split}/{wrong}": False}
    for name in good:
        if not good[name]:
            raise UserError(
                f"{path} is damaged: it has no valid {name[:80]}; delete it to let the run write it again from its last checkpoint"
            )
    return result


def pick_measures(values: Row, split: str) -> Row:
    """The measures of a split in a row or a result, without its name."""
    return {name.removeprefix(f"{split}/"): value for name, value in values.items() if name.startswith(f"{split}/")}


def find_last_step(config: Config) -> int:
    """The last step of a run; a very high one where the size of its data is not known."""
    return config.total_steps if config.has_sizes else _STEPS_MAX


def read_rows(run_dir: Path, config: Config, tail_bytes: int | None = None) -> list[Row]:
    """The rows of metrics.jsonl, or those in its last `tail_bytes`. Raises `UserError` where one is damaged or their steps do not rise."""
    path = run_dir / METRICS_FILE
    rows: list[Row] = []
    for number, row in _read_lines(path, tail_bytes):
        if not is_row(row) or isinstance(row.get(config.best), list):
            raise UserError(f"{path} is damaged: line {number} is not a JSON object of numbers with a step")
        if row["step"] > find_last_step(config):
            raise UserError(f"{path} is damaged: line {number} is of step {row['step']}; the run has {config.total_steps}")
        if rows and row["step"] <= rows[-1]["step"]:
            raise UserError(f"{path} is damaged: line {number} is of step {row['step']}, after one of step {rows[-1]['step']}")
        rows.append(_rename_split(row, config))
    return rows


def read_starts(run_dir: Path) -> list[Row]:
    """The rows of starts.jsonl. Raises `UserError` where one is damaged."""
    return _read_notes(run_dir / STARTS_FILE)


def read_ends(run_dir: Path) -> list[Row]:
    """The rows of ends.jsonl: `start` counts starts from one, `why` says in words why it ended. Raises `UserError` as `read_starts`."""
    ends = _read_notes(run_dir / ENDS_FILE)
    return [end for end in ends if is_count(end.get("start")) and isinstance(end.get("why"), str)]


def _read_notes(path: Path) -> list[Row]:
    rows = []
    for number, row in _read_lines(path):
        if not is_count(row.get("step")) or not all(
            value is None or is_number(value) or isinstance(value, str | bool) for value in row.values()
        ):
            raise UserError(f"{path} is damaged: line {number} is not a JSON object of words and numbers with a step")
        rows.append(row)
    return rows


def count_memory_kills() -> int | None:
    """How many processes the kernel of this host has killed for their memory since it booted; None where it does not tell.

    Of a process that was killed nothing else tells an ordinary user why: two counts, of its start and of now, do.
    """
    return read_kernel_count("/proc/vmstat", "oom_kill")


def make_timestamp() -> str:
    """Now, as the record has it: in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def parse_timestamp(text: object) -> float | None:
    """A time as the record and Slurm have it, in seconds since 1970; None where it is no such text."""
    try:
        return datetime.datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError):
        return None


def read_note(path: Path) -> Row:
    """The JSON object in a small file; an empty one where there is none, or where it is damaged."""
    try:
        return parse_object(read_file(path, _SMALL_BYTES_MAX))
    except OSError:
        return {}


def _read(path: Path, bytes_max: int, *, tail: bool = False) -> bytes | None:
    try:
        return read_file(path, bytes_max, tail=tail)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_lines(path: Path, tail_bytes: int | None = None) -> Iterable[tuple[int, Row]]:
    """The number and the object of each complete line; an empty object for a damaged one. Raises `UserError`."""
    content = _read(path, tail_bytes or _RECORD_BYTES_MAX, tail=tail_bytes is not None) or b""
    begins_amid_a_line = len(content) == tail_bytes
    for number, line in enumerate(io.BytesIO(content), start=1):
        if not line.endswith(b"\n"):
            break  # the run is writing it now, or was killed while it did
        if number > _ROWS_MAX:
            raise UserError(f"{path} has more than {_ROWS_MAX:,} lines, the most that are read")
        row = parse_object(line)
        if row or number > 1 or not begins_amid_a_line:
            yield number, row


def parse_object(text: bytes) -> Row:
    """The JSON object in `text`; an empty one where there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_row(row: Row) -> bool:
    """Whether `row` is one of metrics.jsonl: a step, and numbers, some of which may not be known; of an evaluation, lists of them, too."""
    return is_count(row.get("step")) and all(
        isinstance(name, str) and is_measure(value, name) and (not isinstance(value, list) or _LIST_NAME.fullmatch(name))
        for name, value in row.items()
    )


def is_step_row(row: object) -> bool:
    """Whether `row` is one that tells of a step, as a person is shown it."""
    numbers = ("epoch", "train/loss", "train/learning_rate", "train/images_per_s")
    return isinstance(row, dict) and is_row(row) and all(is_number(row.get(name)) for name in numbers)


def is_measure(value: object, name: str = "", depth: int = 0) -> bool:
    """Whether `value`, in so many lists already, can be a measure called `name`: a number, or a list of such; one may not be known."""
    if len(name) > _NAME_MAX:
        return False
    if isinstance(value, list):
        return depth < _DEPTH_MAX and all(is_measure(entry, name, depth + 1) for entry in value)
    return value is None or (is_number(value) and (not name.endswith("accuracy") or 0 <= value <= 1))


def is_count(value: object) -> TypeGuard[int]:
    """Whether `value` can be a number of steps, images or processes."""
    return type(value) is int and 0 <= value < 2**53


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return type(value) in (int, float) and -1e300 < value < 1e300  # type: ignore[operator]


def _rename_split(row: Row, config: Config) -> Row:
    """`row` with what was evaluated on held-out images under their name: older versions called these `test/`, too."""
    if config.evaluated_split == "test":
        return row
    return {re.sub("^test/", f"{config.evaluated_split}/", name): value for name, value in row.items()}
