"""The code of a task: found by the name that its user gave, checked, hashed; and what it raises, in one message. Imports no torch.

A task's code is run only because the user named it: on a command line, or in a config file of their own. A run folder may have been made by
somebody else, so the name in it counts only if this user has trained that task before (`is_named_before`).
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from pydantic import PydanticUserError, ValidationError

from mnist_dist.errors import RunError, UserError, describe_shortage, is_lost_rank, is_lost_worker
from mnist_dist.files import append_line, expand_path, read_file
from mnist_dist.options import Options, describe_kind
from mnist_dist.task import Task

BUILT_IN = "mnist"

_PACKAGE = "mnist_dist.tasks"
_ALL_WRITE = ("load", "build_model", "losses")
_FILE_BYTES_MAX = 16 << 20
_NAMED_BYTES_MAX = 1 << 20
_found: dict[str, type[Task]] = {}
_log = logging.getLogger(__name__)


def find_task(name: object) -> type[Task]:
    """The task that `name` means: one of this package, a module, or a file such as path/my_task.py. Raises `UserError`.

    Runs the code of that file, so `name` must come from the user.
    """
    if not isinstance(name, str) or not name or len(name) > 4096 or not name.isprintable():
        raise UserError(f"task is {name!r:.80}; allowed: mnist, a module such as my_package.my_task, or a file such as path/my_task.py")
    full = resolve_name(name)
    if full not in _found:
        before = set(sys.modules)
        module = _load(full)
        task = _find_class(full, module)
        task.name = full
        task.source = _hash_each(list(_list_files(module, set(sys.modules) - before)))
        _found[full] = task
    return _found[full]


def resolve_name(name: str) -> str:
    """A task's name as files hold it: the absolute path of a file, else the name itself. Raises `UserError`."""
    if not name.endswith(".py") and "/" not in name:
        return name
    try:
        full = os.path.abspath(expand_path(name))
        if not full.isprintable():  # the folder's name; files and messages hold it
            raise ValueError(f"its path is {full!r}; expected printable characters")
        return full
    except ValueError as error:
        raise UserError(f"task is {name!r}: {error}") from error


def is_built_in(name: str) -> bool:
    """Whether `name` is a task of this package."""
    spec = importlib.util.find_spec(f"{_PACKAGE}.{name}") if name.isidentifier() else None
    return spec is not None and spec.submodule_search_locations is not None  # a package: the modules beside it are no tasks


def _load(name: str) -> ModuleType:
    if is_built_in(name):
        return importlib.import_module(f"{_PACKAGE}.{name}")
    if not name.endswith(".py"):
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            raise UserError(f"task is {name!r}; allowed: mnist, a module such as my_package.my_task, or a file such as path/my_task.py")
        try:
            with explaining(name, "while it was imported"):
                return importlib.import_module(name)
        except ModuleNotFoundError as error:  # not one that the module itself lacks
            raise UserError(
                f"task is {name!r}, but there is no such module ({error}); a file is named by its path, such as ./{name}.py"
            ) from None
    if not os.path.isfile(name):
        raise UserError(f"task is {name!r}, which is not a file; expected mnist, a module, or the path of a file such as path/my_task.py")
    folder, stem = os.path.split(name.removesuffix(".py"))
    # What lies beside the file can be imported from it, as if it were run.
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module_name = stem if stem not in sys.modules and stem.isidentifier() else f"task_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with explaining(name, "while it was imported"), warnings.catch_warnings():
            warnings.filterwarnings("error", "Field name .* shadows", UserWarning)  # pydantic's, of an option that hides a method
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _find_class(name: str, module: ModuleType) -> type[Task]:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    # A base of another class in the same file is not the task.
    classes = [one for one in classes if not any(other is not one and issubclass(other, one) for other in classes)]
    if len(classes) != 1:
        found = ", ".join(sorted(one.__name__ for one in classes)) or "none"
        raise UserError(f"task {name} must define one class that extends mnist_dist.task.Task or Classification; found: {found}")
    task = classes[0]
    missing = [method for method in _ALL_WRITE if getattr(task, method) is getattr(Task, method)]
    if missing:
        raise UserError(f"task {name}: class {task.__name__} lacks {', '.join(missing)}; mnist_dist/task.py says what each must do")
    _check_fields(name, task)
    return task


def _check_fields(name: str, task: type[Task]) -> None:
    from mnist_dist.config import Config  # which imports this module

    for field_name, field in task.model_fields.items():
        if field_name in Config.model_fields or field_name in ("config", "print_config"):
            raise UserError(f"task {name}: its option {field_name} has the name of an option that every training has; give it another")
        if field_name in dir(Options) or (field_name in dir(Task) and field_name not in Task.model_fields):
            raise UserError(f"task {name}: its option {field_name} has the name of something that every task has; give it another")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", field_name):
            raise UserError(f"task {name}: its option {field_name} must be written in small letters, digits and _")
        if describe_kind(task, field_name) is None:
            raise UserError(
                f"task {name}: its option {field_name} is of type {field.annotation}; allowed: bool, int, float, str, a Literal of words, "
                "or one of these with | None"
            )
        if field.is_required():
            raise UserError(f"task {name}: its option {field_name} has no default; give it one")
    with explaining(name, "with its defaults"):
        task()


def _list_files(module: ModuleType, imported: set[str]) -> Iterator[Path]:
    """The file of `module`, and those of its own folder or package that came with it."""
    own = Path(str(module.__file__))
    yield own
    for name in sorted(imported):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and Path(file) != own and Path(file).is_relative_to(own.parent) and "site-packages" not in Path(file).parts:
            yield Path(file)


def find_root(task: type[Task]) -> Path | None:
    """The folder in which Python finds the module of a task; None for a file, which is found by its path, and for a built-in task."""
    if is_built_in(task.name) or task.name.endswith(".py"):
        return None
    top = sys.modules[task.name.partition(".")[0]]
    return Path(str(top.__file__)).resolve().parents[1 if hasattr(top, "__path__") else 0]


def _hash_each(files: list[Path]) -> str:
    """Files and the beginning of the SHA-256 of each, in one line: `my_task.py 3f2a91c04b7d, my_layers.py ...`."""
    words = []
    for file in files:
        try:
            digest = hashlib.sha256(read_file(file, _FILE_BYTES_MAX)).hexdigest()[:12]
        except OSError:
            digest = "unreadable"
        words.append(f"{file.relative_to(files[0].parent)} {digest}")
    return ", ".join(words)


def hash_files(root: Path, files: Iterable[Path]) -> str:
    """The beginning of a SHA-256 over the names, as seen from `root`, and the contents of files. Hidden ones are left out."""
    found = hashlib.sha256()
    for file in sorted(file for file in files if not file.name.startswith(".")):
        try:
            content = read_file(file, _FILE_BYTES_MAX)
        except OSError as error:
            content = f"unreadable: {error.strerror}".encode()
        found.update(f"{file.relative_to(root)} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()[:12]


@functools.cache
def hash_package() -> str:
    """The hash of this package's code, where that lies in files."""
    package = Path(str(resources.files("mnist_dist")))
    return hash_files(package, package.rglob("*.py"))


def find_changed(before: str, now: str) -> list[str]:
    """The files that differ between the sources of a task at two starts."""
    one, other = (dict(word.rsplit(" ", 1) for word in text.split(", ") if " " in word) for text in (before, now))
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


@contextlib.contextmanager
def explaining(name: str, when: str, kind: type[UserError] | type[RunError] = UserError) -> Iterator[None]:
    """Turn what a task's code raises into one `kind` of error that names the file, the line and the reason."""
    try:
        yield
    except (UserError, RunError, KeyboardInterrupt, GeneratorExit):
        raise
    except ModuleNotFoundError as error:
        if error.name and name.split(".")[0] == error.name.split(".")[0] and not name.endswith(".py"):
            raise  # the task itself is not there
        raise kind(f"task {name} failed {when}: {describe_exception(error)}") from error
    except (Exception, SystemExit) as error:
        # In a step ranks and workers are waited for, by torch's code or ours.
        by_user = all(map(_is_users, traceback.extract_tb(error.__traceback__)[-1:]))
        if kind is RunError and (is_lost_worker(error) or (is_lost_rank(error) and not by_user)):
            raise
        text = describe_exception(error)
        if words := describe_shortage(error):  # which is no mistake of the task's
            kind, text = RunError, f"{words}: {text}"
        raise kind(f"task {name} failed {when}: {text}") from error


def describe_exception(error: BaseException) -> str:
    """Where in the user's code an exception came from, its kind and its first line."""
    lines = str(error).strip().splitlines()
    hint = ""
    if isinstance(error, ValidationError):  # its first line names nothing
        lines = ["; ".join(": ".join([*map(str, one["loc"]), one["msg"]]) for one in error.errors())]
        if any(one["type"] == "frozen_instance" for one in error.errors()):
            hint = " (a task holds its options alone: compute the value where it is needed, or give it to the data set or the model)"
    elif isinstance(error, PydanticUserError) and error.code in ("model-field-missing-annotation", "schema-for-unknown-type"):
        lines = [re.split(r"\. (?:All model|Set `)", lines[0])[0]]  # the rest is of pydantic's own settings
        hint = " (write an option as `width: int = 3`, and anything else as `width: ClassVar[int] = 3`, with ClassVar from typing)"
    elif lines and lines[0].startswith("'DistributedDataParallel' object"):
        hint = " (of several processes, losses may call the model itself alone, and no method or attribute of it)"
    elif lines and "does not require grad" in lines[0]:
        hint = " (an evaluation computes without gradients: what needs them there says `with torch.enable_grad():`)"
    elif lines and lines[0].startswith("Expected more than 1 value per channel"):
        hint = " (a part of the batch is one sample: batch_size, micro_batch, shards and the number of processes say how it is cut)"
    elif any("specialized it to be a constant" in line for line in lines):  # torch.export's, a line behind one that says nothing
        lines = [line.strip() for line in lines if "specialized it to be a constant" in line]
        hint = " (the number of samples must not become a plain number of Python: write x.shape[0] for len(x))"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = list(filter(_is_users, traceback.extract_tb(error.__traceback__)))
    place = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: " if frames else ""
    return f"{place}{type(error).__name__}{': ' + lines[0][:500] if lines else ''}{hint}"


def _is_users(frame: traceback.FrameSummary) -> bool:
    is_ours = Path(frame.filename).is_relative_to(Path(__file__).parent)
    return not is_ours and "site-packages" not in frame.filename and "<frozen" not in frame.filename


def _named_file() -> Path:
    folder = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(folder) / "mnist-dist" / "tasks"


def note_named(name: str) -> None:
    """Remember that this user has named the task `name`; where there is no home to write to, a warning says what follows."""
    if is_built_in(name) or is_named_before(name):
        return
    file = _named_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        append_line(file, name.encode())
    except OSError as error:
        reason = error.strerror or error
        _warn(f"the task {name} cannot be remembered as yours, {file} cannot be written ({reason}): later programs need --task {name}")


@functools.cache  # a program may name its task more than once
def _warn(text: str) -> None:
    _log.warning("%s", text)


def is_named_before(name: str) -> bool:
    """Whether this user has trained or checked the task `name`, so that a run folder may name it, too."""
    if is_built_in(name):
        return True
    try:
        return name.encode(errors="replace") in read_file(_named_file(), _NAMED_BYTES_MAX).splitlines()
    except OSError:
        return False


class Unknown(Task):
    """A task whose code is not there, or not named by the user: its options as they stand in a file, and nothing that could run."""

    model_config = Task.model_config | {"extra": "allow"}

    why: ClassVar[str] = ""  # its code does not run

    @property
    def values(self) -> dict[str, Any]:
        """Its options."""
        return dict(self.model_extra or {})


def make_unknown(name: object, why: str = "") -> type[Unknown]:
    """A task of that name whose code is not run: `why` tells what stands in the way, by default that the user has not named it."""
    short = str(name)[:4096]
    return _make_stranger(short, why or f"its code has not been named on this account; --task {short[:200]} names it")


@functools.lru_cache(64)  # a class takes a millisecond, and there may be a thousand runs of it
def _make_stranger(name: str, why: str) -> type[Unknown]:
    class Stranger(Unknown):
        """One of these."""

    Stranger.name, Stranger.why = name, why
    return Stranger
