"""The samples of a split: which of them are taken, what messages call one, and what it holds."""

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from types import ModuleType
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

_PLAIN_VALUES = (bool, int, float, complex, str, bytes, np.generic)
_WRITTEN_OUT = (*_PLAIN_VALUES, bytearray, Decimal, Fraction, date, time_of_day, timedelta)  # whose `repr` says all
_AGAIN_MOST = 1_000_000  # containers that are looked at once more


def is_in_memory(split: Dataset[Any]) -> TypeGuard[TensorDataset]:
    """Whether the samples of a split are rows of its tensors, and nothing is done to one that is read."""
    methods = ("__getitem__", "__len__")
    return isinstance(split, TensorDataset) and all(getattr(type(split), name) is getattr(TensorDataset, name) for name in methods)


class _Taken(Subset[Any]):
    """Some samples of a split, which know of which: where a task's data come from, for messages."""

    def __init__(self, split: Dataset[Any], places: Sequence[int], what: str) -> None:
        super().__init__(split, places)
        self.what = what


def take_samples(split: Dataset[Any], places: Sequence[int], what: str = "") -> Dataset[Any]:
    """Some samples of a split, by default of one that was taken from another; a range begins with the first."""
    if len(places) == len(split):  # type: ignore[arg-type]
        return split
    if is_in_memory(split):
        which = slice(len(places)) if isinstance(places, range) else torch.tensor(places)
        return TensorDataset(*(tensor[which] for tensor in split.tensors))
    return _Taken(split, places, what)


def locate(split: Any, what: str, indices: Sequence[int] = ()) -> tuple[str, list[int]]:
    """What the data are called that a split is of, and where its samples lie in what the task's `load` returned.

    A user knows a sample by that place alone: --holdout takes samples out of the training data, and the others move up.
    """
    while isinstance(split, _Taken):
        what, indices, split = split.what or what, [split.indices[index] for index in indices], split.dataset
    return f"{what} data", list(indices)


def name_sample(split: Any, what: str, index: int) -> str:
    """How messages name a sample of a split, by its place in what the task's `load` returned."""
    data, [place] = locate(split, what, [index])
    return f"sample {place} of the {data}"


def list_tensors(value: Any) -> list[Tensor]:
    """The strided tensors in samples, or in anything that holds some, in their order; of a sparse or nested one, those it consists of."""
    return list_parts(value)[0]


def list_parts(value: Any) -> tuple[list[Tensor], list[bytes]]:
    """The same tensors; and arrays, pictures, and the numbers and texts in containers and data classes, as bytes."""
    tensors: list[Tensor] = []
    others: list[bytes] = []
    rest, known, above, again = [value], set[int](), set[int](), 0
    while rest:
        value = rest.pop()
        if isinstance(value, _Left):
            above.discard(value.number)
        elif isinstance(value, Tensor):
            if value.is_nested:
                rest += reversed(value.unbind())
            elif value.layout == torch.strided:
                tensors.append(value)
            else:
                value = value.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
                rest += value.values(), value.indices()
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            others.append(f"{value.dtype} {value.shape} ".encode() + value.tobytes())
        elif isinstance(value, _WRITTEN_OUT):
            others.append(repr(value).encode(errors="replace"))
        elif isinstance(value, Enum):
            others.append(f"{type(value).__qualname__}.{value.name}".encode(errors="replace"))
        elif isinstance(value, PurePath):  # the same file may lie elsewhere
            pass
        elif _is_picture(value):  # one that is loaded only now has other attributes afterwards
            with contextlib.suppress(Exception):  # it may be closed
                others.append(f"{value.mode} {value.size} ".encode() + value.tobytes())
        elif isinstance(value, set | frozenset):  # in an order of its own in each process
            others += sorted(repr(part).encode(errors="replace") for part in value if isinstance(part, _WRITTEN_OUT))
        elif isinstance(value, dict | list | tuple | np.ndarray):
            # It may be a part of itself, as a node is of its children, or of so many others that all ways to it would take for ever.
            number = id(value)
            again += (is_known := number in known)
            if number not in above and not (is_known and again > _AGAIN_MOST):
                known.add(number)
                above.add(number)
                rest.append(_Left(number))
                held = value.values() if isinstance(value, dict) else value.ravel() if isinstance(value, np.ndarray) else value
                rest += reversed([*held])
        elif not isinstance(value, type | ModuleType) and id(value) not in known:  # an object, once, for others may refer to it
            known.add(id(value))
            state: Any = object.__getstate__(value) or ()  # of slots as well, it is a pair
            own = {name: part for each in (state if isinstance(state, tuple) else [state]) for name, part in (each or {}).items()}
            # Of what is plain only the fields of a data class: another may be a count of uses, or the name of a file.
            told = {field.name for field in fields(value) if field.compare} if is_dataclass(value) else ()
            rest += reversed([part for name, part in own.items() if name in told or not isinstance(part, _PLAIN_VALUES)])
    return tensors, others


def _is_picture(value: Any) -> bool:
    """Whether a value is one of Pillow's, which need not be imported for that."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


class _Left(NamedTuple):
    """That all parts of a container have been looked at."""

    number: int


def digest(samples: Any) -> bytes:
    """A hash of all numbers and texts in samples."""
    tensors, others = list_parts(samples)
    found = hashlib.sha256(b"".join(others))
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tensor.shape} ".encode())
        found.update(encode_tensor(tensor))
    return found.digest()


def encode_tensor(tensor: Tensor) -> memoryview:
    """The bytes of a strided tensor's numbers, in their order, wherever they lie. Of one that lies so already no copy is made."""
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    # Of a single number torch keeps any stride, and then refuses to see it as bytes.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one kind and hold the same values; NaN is the same as NaN."""
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    # The second look is for NaN, and takes several times as long: seconds for a large model.
    return alike and (torch.equal(one, other) or bool(one.isclose(other, rtol=0, atol=0, equal_nan=True).all()))


def find_immovable(value: Any) -> str:
    """The kind of an object in samples that holds tensors, and has no method `to` to take them to a GPU; empty: there is none."""
    if isinstance(value, dict | list | tuple) and not hasattr(value, "to"):
        return next(filter(None, map(find_immovable, value.values() if isinstance(value, dict) else value)), "")
    return type(value).__name__ if list_tensors(value) and not hasattr(value, "to") else ""
