"""The trained weights of a run, read back: model.safetensors and what its header says of the data."""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch

from mnist_dist.config import DATASET_SIZES
from mnist_dist.errors import UserError
from mnist_dist.model import CNN, build_model
from mnist_dist.record import WEIGHTS_FILE, parse_object

_BYTES_MAX = 64 << 20
_HEADER = "mnist_dist"


class TrainedModel(NamedTuple):
    """A CNN with its trained weights, on the CPU; `mean` and `std` are of its training pixels on the scale 0 to 1."""

    model: CNN
    mean: float
    std: float
    metadata: dict[str, str]

    @property
    def dataset(self) -> str:
        """The name of the data set it was trained on."""
        return self.metadata["dataset"]


def find_weights(path: str | Path) -> Path:
    """The file of weights that `path` means: a .safetensors file, or that of a run folder. Raises `UserError` where there is none."""
    if os.path.isdir(path):
        file = Path(path) / WEIGHTS_FILE
        if not os.path.isfile(file):
            raise UserError(f"the folder {path} holds no {WEIGHTS_FILE}: a run writes it when it is finished")
        return file
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that the system refuses; a FIFO or device is no file either
        raise UserError(f"{path} is neither a run folder nor a file of weights; give one such as runs/mnist or runs/mnist/{WEIGHTS_FILE}")
    return Path(path)


def load_model(path: str | Path) -> TrainedModel:
    """The model of a run folder or a .safetensors file, in evaluation mode.

    Raises `UserError` for a file that is missing, damaged, of another model, or without the data's `dataset`, `mean` and `std`.
    """
    file = find_weights(path)
    model = build_model(seed=0)
    expected = model.state_dict()
    try:
        size = file.stat().st_size
        if size > _BYTES_MAX:
            raise UserError(f"{file} has {size:,} bytes; weights of this model have at most {_BYTES_MAX:,}")
        with safetensors.safe_open(file, framework="pt") as content:
            metadata = _read_header(content.metadata() or {})
            _check_shapes(file, {name: content.get_slice(name).get_shape() for name in content.keys()}, expected)  # noqa: SIM118
            tensors = {name: content.get_tensor(name) for name in expected}
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is not a valid .safetensors file: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise UserError(f"{file} holds {name} as {tensor.dtype} or with values that are not finite; expected finite float32 values")
    model.load_state_dict(tensors)
    missing = [name for name in ("dataset", "mean", "std") if name not in metadata]
    if missing:
        raise UserError(f"{file} does not say its {', '.join(missing)}; expected a file that a run of this package wrote")
    if metadata["dataset"] not in DATASET_SIZES:
        raise UserError(f"{file} says that its dataset is {metadata['dataset'][:40]!r}; known: {', '.join(DATASET_SIZES)}")
    return TrainedModel(model.eval(), _read_number(file, metadata, "mean"), _read_number(file, metadata, "std"), metadata)


def make_header(dataset: str, mean: float, std: float) -> dict[str, str]:
    """The metadata of a file of weights. One entry: safetensors writes several in random order, so that equal runs had other bytes."""
    return {_HEADER: json.dumps({"dataset": dataset, "mean": str(mean), "std": str(std)}, sort_keys=True)}


def _read_header(metadata: dict[str, str]) -> dict[str, str]:
    """The metadata of a file of weights, also of one by an older version, which had the entries side by side."""
    entries = parse_object(metadata[_HEADER].encode(errors="replace")) if _HEADER in metadata else metadata
    return {name: value for name, value in entries.items() if isinstance(value, str)}


def _check_shapes(file: Path, shapes: dict[str, list[int]], expected: dict[str, torch.Tensor]) -> None:
    for name in [*expected, *shapes]:
        there = shapes.get(name, "missing")
        wanted = list(expected[name].shape) if name in expected else "no such tensor"
        if there != wanted:
            raise UserError(f"{file} is of another model: {name[:80]} is {there}, expected {wanted}")


def _read_number(file: Path, metadata: dict[str, str], name: str) -> float:
    try:
        value = float(metadata[name])
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1 or (name == "std" and value == 0):
        raise UserError(f"{file} says that its {name} is {metadata[name][:40]!r}; expected a number from 0 to 1")
    return value
