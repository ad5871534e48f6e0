"""The trained weights of a run, read back: model.safetensors, and what its header says of the data."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor, nn

from mnist_dist.config import Config, make_config
from mnist_dist.errors import UserError, first_line
from mnist_dist.files import check_readable
from mnist_dist.model import build_model, describe_dtype, is_finite, load_weights
from mnist_dist.options import trait
from mnist_dist.record import CONFIG_FILE, RESULT_FILE, WEIGHTS_FILE, parse_object, read_named_config
from mnist_dist.source import BUILT_IN, Unknown, find_task, note_named
from mnist_dist.task import Task

# What a file of weights has beside its tensors: their names, and the facts, of which JSON within JSON writes a quote as four bytes.
_ROOM_BYTES = 80 << 20
_HEADER = "mnist_dist"


class TrainedModel(NamedTuple):
    """A model with its trained weights, on the CPU, in evaluation mode; and the config of its run, whose task has the facts of its data."""

    model: nn.Module
    config: Config

    @property
    def task(self) -> Task:
        """What it was trained for."""
        return self.config.task


def find_weights(path: str | Path) -> Path:
    """The file of weights that `path` means: a .safetensors file, or that of a run folder. Raises `UserError` where there is none."""
    check_readable(path)
    if os.path.isdir(path):
        file = Path(path) / WEIGHTS_FILE
        if not os.path.isfile(file):
            reason = "a run writes it when it is finished"
            if os.path.isfile(Path(path) / RESULT_FILE):
                reason = f"remove its {RESULT_FILE}, and the command of the run writes both again, from its last checkpoint"
            raise UserError(f"the folder {path} holds no {WEIGHTS_FILE}: {reason}")
        return file
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that the system refuses; a FIFO or device is no file either
        raise UserError(f"{path} is neither a run folder nor a file of weights; give one such as runs/mnist or runs/mnist/{WEIGHTS_FILE}")
    return Path(path)


def load_model(path: str | Path, task_name: str | None = None) -> TrainedModel:
    """The model of a run folder or a .safetensors file; a folder that holds nothing else serves as well.

    The code of its task is that which the user names by `task_name`, the built-in one, or that of a run whose task this user has trained
    before. Raises `UserError` where it is none of these, and for a file that is missing, damaged, of another model, or without its facts.
    """
    file = find_weights(path)
    try:
        file.open("rb").close()  # of a file that may not be read, safetensors says that it is not there
        with safetensors.safe_open(file, framework="pt") as content:
            header = _read_header(content.metadata() or {})
            config = _find_config(Path(path), file, header, task_name)
            model = build_model(config.task, seed=0)
            expected = model.state_dict()
            size, most = file.stat().st_size, _ROOM_BYTES + sum(tensor.nbytes for tensor in expected.values())
            if size > most:
                raise UserError(f"{file} has {size:,} bytes; weights of this model have at most {most:,}")
            _check_shapes(file, {name: content.get_slice(name).get_shape() for name in content.keys()}, expected)  # noqa: SIM118
            tensors = {name: content.get_tensor(name) for name in expected}
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is not a valid .safetensors file: {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    for name, tensor in tensors.items():
        kind = expected[name].dtype
        if tensor.dtype != kind or not is_finite(tensor):
            wanted = describe_dtype(kind)
            raise UserError(f"{file} holds {name} as {tensor.dtype} or with values that are not finite; expected finite {wanted} values")
    load_weights(config.task, model, tensors)
    return TrainedModel(model.eval(), config)


def _find_config(path: Path, file: Path, header: dict[str, Any], task_name: str | None) -> Config:
    if os.path.lexists(path / CONFIG_FILE):
        config = read_named_config(path, task_name)
    else:
        name = task_name or str(header["task"])
        if name != BUILT_IN and task_name is None:
            raise UserError(f"{file} is of task {name[:200]!r}; name its code yourself: --task {name[:200]}")
        task = find_task(name)
        note_named(task.name)
        config = make_config(header["options"], str(file), task)
    if isinstance(config.task, Unknown):
        raise UserError(
            f"{path} is a run of task {config.task.name[:200]!r}, whose code you have not named on this account: "
            f"add --task {config.task.name[:200]} if you trust it"
        )
    # Before there is a model, which may depend on the facts: it has as many outputs as classes, or as words.
    try:
        config.task.check_facts(header["facts"])
    except ValueError as error:
        raise UserError(f"{file} {error}") from error
    return config.with_facts(header["facts"])


def encode_weights(model: nn.Module, config: Config) -> bytes:
    """The file of weights."""
    # A copy of each: two names may share one tensor, as tied embeddings do, which safetensors refuses.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    return safetensors.torch.save(tensors, make_header(config.task))


def make_header(task: Task) -> dict[str, str]:
    """The metadata of a file of weights. One entry: safetensors writes several in random order, so that equal runs had other bytes.

    The facts stand in it as text; for a task that is not built in, also its name and the options of its recipe.
    """
    entries = {name: _to_text(value) for name, value in task.facts.items()}
    if task.name != BUILT_IN:
        options = {name: getattr(task, name) for name, field in type(task).model_fields.items() if trait(field, "recipe")}
        entries = {"task": task.name, "options": json.dumps(options), "facts": json.dumps(dict(task.facts))}
    return {_HEADER: json.dumps(entries, sort_keys=True)}


def _read_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The task's name, its options and facts, also of a file by an older version, which had the entries side by side."""
    entries = parse_object(metadata[_HEADER].encode(errors="replace")) if _HEADER in metadata else dict(metadata)
    entries = {name: value for name, value in entries.items() if isinstance(value, str)}
    if "task" in entries:
        options, facts = (parse_object(entries.get(name, "").encode(errors="replace")) for name in ("options", "facts"))
        return {"task": entries["task"], "options": options, "facts": facts}
    return {"task": BUILT_IN, "options": {}, "facts": {name: _from_text(value) for name, value in entries.items()}}


def _to_text(value: Any) -> str:
    """`value` as text that `_from_text` turns back: a word as it is, anything else as JSON."""
    return value if isinstance(value, str) and _from_text(value) == value else json.dumps(value)


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _check_shapes(file: Path, shapes: dict[str, list[int]], expected: dict[str, Tensor]) -> None:
    for name in [*expected, *shapes]:
        there = shapes.get(name, "missing")
        wanted = list(expected[name].shape) if name in expected else "no such tensor"
        if there != wanted:
            raise UserError(f"{file} is of another model: {name[:80]} is {there}, expected {wanted}")
