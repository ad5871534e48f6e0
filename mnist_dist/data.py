"""The samples of a task, in the order of the steps: which of them a step takes, and how they reach the device.

A data set that is kept in memory lies on the device, so a batch is one gather: there are no worker processes to seed, feed or restore. Any
other is read sample by sample, in this process or by workers, each sample under its own seed.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import cached_property, partial
from multiprocessing.reduction import ForkingPickler
from pathlib import PurePath
from types import ModuleType
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, TensorDataset
from torch.utils.data._utils.pin_memory import pin_memory

from mnist_dist.config import Config
from mnist_dist.distributed import Group
from mnist_dist.errors import RunError, UserError, first_line, is_lost_worker
from mnist_dist.exchange import split_shards
from mnist_dist.machine import on_one_thread
from mnist_dist.model import is_dense
from mnist_dist.preemption import STOP_SIGNALS
from mnist_dist.randomness import (
    can_read_places,
    derive_seed,
    keeping_generators,
    read_generators,
    read_places,
    seed_generators,
    seeding_generators,
)
from mnist_dist.rendezvous import name_ranks
from mnist_dist.source import describe_exception, explaining
from mnist_dist.task import Data, Row, Task

_log = logging.getLogger(__name__)

_EVALUATED_AT_ONCE = 500  # samples of a batch of an evaluation
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_OPEN_FILES = "/proc/self/fd"  # of Linux
_DATA_SEED = 67_280_421_310_721  # the one that torch's own generator begins with
_FACTS_BYTES_MAX = 16 << 20  # as text
_FACT_TOLERANCE, _FACT_NOISE = 1e-4, 1e-8  # processors may round differently, and a mean of nothing but noise altogether
_PLAIN_BYTES = 1 << 18  # from about twice as many on, shared memory is quicker
_PLAIN_VALUES = (bool, int, float, complex, str, bytes, np.generic)
_WRITTEN_OUT = (*_PLAIN_VALUES, bytearray, Decimal, Fraction, date, time_of_day, timedelta)  # whose `repr` says all
_AGAIN_MOST = 1_000_000  # containers that are looked at once more
READING_RULE = (
    "what the data set stores (clone it first), and draw from the generators of torch, numpy and random alone, which are seeded before "
    "each sample"
)
_SHOWN = 32  # numbers of samples in a message
_LOOK_S = 1.0  # between two looks at the workers
_READING_SHARE = 0.8
_READ_S = 1.0  # for samples that are read to be read again
_PROBED = 4  # samples by which a data set is known, and a model is tried
_PROBED_MOST = 64  # on which it is tried whether a loss sees other samples
_GOLDEN_RATIO = 0.6180339887498949  # its multiples spread evenly, however many there are


class Piece(NamedTuple):
    """Samples that are computed at once: their places in the global batch, themselves once they are read, and what is drawn for them.

    The samples are rows of a data set in memory, or whatever the task's `collate` gave.
    """

    places: Sequence[int]
    samples: Any = None
    drawn: Tensor | None = None

    @property
    def size(self) -> int:
        """How many samples there are."""
        return len(self.places)


class Batch(NamedTuple):
    """What one rank takes of one step: int64 `indices` into a split, in parts (one for each of its shards, or one), and these in pieces."""

    step: int
    indices: Tensor
    parts: tuple[tuple[Piece, ...], ...]

    @classmethod
    def of(cls, indices: Sequence[int] | Tensor, places: Sequence[int]) -> "Batch":
        """Samples of step 0 in one piece."""
        return cls(0, torch.as_tensor(indices), ((Piece(places),),))

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of all parts."""
        return list(itertools.chain(*self.parts))

    @property
    def places(self) -> list[int]:
        """The samples' places in the global batch, in the order of `indices`."""
        return list(itertools.chain(*(piece.places for piece in self.pieces)))

    def fill(self, samples: Iterable[Any]) -> "Batch":
        """The same, with the samples of each piece."""
        return self._map(lambda piece, its_own: piece._replace(samples=its_own), samples)

    def fill_drawn(self, drawn: Iterable[Tensor]) -> "Batch":
        """The same, with what is drawn for each piece."""
        return self._map(lambda piece, its_own: piece._replace(drawn=its_own), drawn)

    def _map(self, change: Callable[[Piece, Any], Piece], values: Iterable[Any]) -> "Batch":
        rest = iter(values)
        return self._replace(parts=tuple(tuple(change(piece, next(rest)) for piece in part) for part in self.parts))

    def pin_memory(self) -> "Batch":
        """The same, ready to be sent to a GPU. torch asks for it, and would else make lists of the places."""
        return self.fill(pin_memory(piece.samples) for piece in self.pieces)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sent.of(self).__reduce__()


class _Pickler(ForkingPickler):
    """Sends small tensors as they are: on torch's own way each takes a file of shared memory, and a connection to fetch that."""

    def reducer_override(self, value: Any) -> Any:
        """How a value is sent."""
        return (_make_tensor, (bytes(encode_tensor(value)), value.dtype, value.shape)) if _is_small(value) else NotImplemented


class _Sent(NamedTuple):
    """A batch on its way to a worker or back. What receives it gets the batch itself."""

    content: bytes

    @classmethod
    def of(cls, batch: Batch) -> "_Sent":
        return cls(bytes(_Pickler.dumps(tuple(batch))))

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self.content,)


def _receive(content: bytes) -> Batch:
    return Batch(*_Pickler.loads(content))


def _make_tensor(content: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    # A bytearray can be written to. Of nothing, torch makes no tensor.
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)


def _is_small(value: Any) -> bool:
    """Whether a value is a tensor that is sent plainly."""
    is_plain = type(value) is Tensor and is_dense(value) and not value.is_quantized
    # One that is laid out otherwise, such as channels last, would arrive contiguous: a layer may round differently on it.
    return is_plain and value.is_contiguous() and not value.requires_grad and value.nbytes <= _PLAIN_BYTES


class _Failure(NamedTuple):
    """What a worker sends instead of a batch."""

    reason: str


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, without waiting for what that is doing: from pinned memory, which stays where it is."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class InMemory:
    """A `TensorDataset` on the device."""

    def __init__(self, split: TensorDataset, device: torch.device) -> None:
        self.tensors = tuple(tensor.to(device) for tensor in split.tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def fill(self, batch: Batch) -> Batch:
        """The batch with its samples."""
        where = torch.split(send(batch.indices, self.tensors[0].device), [piece.size for piece in batch.pieces])
        # Whole samples are copied; by tensor[piece] it would be a number at a time, which on a CPU takes six times as long. Each piece has
        # memory of its own: where a tensor begins in it may decide how its sums are rounded.
        return batch.fill(tuple(tensor.index_select(0, piece) for tensor in self.tensors) for piece in where)

    __getitems__ = fill  # a DataLoader calls this once for each batch


class Seeded:
    """Any other map-style data set. Sample i of a batch is read under a seed of its own, so that it is the same wherever it is read."""

    def __init__(self, split: Dataset[Any], task: Task, seed: int, what: str) -> None:
        self.split = split
        self.task = task
        self.seed = seed
        self.what = what
        # Which sample a worker is at, for the message about one that dies or hangs. Memory that the processes share.
        self.at: Tensor | None = None
        # To seed numpy and random takes ten times as long as to seed torch: it is done from the first sample on that draws from them.
        self.draws_elsewhere = not can_read_places()

    def __len__(self) -> int:
        return len(self.split)  # type: ignore[arg-type]

    def __getitems__(self, batch: Batch) -> Batch | _Sent | _Failure:
        """A DataLoader calls this once for each batch."""
        filled = self.fill(batch)
        if torch.utils.data.get_worker_info() is None or isinstance(filled, _Failure):
            return filled
        try:
            return _Sent.of(filled)
        except Exception as error:
            is_full = os.strerror(errno.EMFILE) in str(error)
            hint = "; each large tensor, or one that is not contiguous, takes an open file: raise the limit (ulimit -n)" if is_full else ""
            what = f"a batch of the {locate(self.split, self.what)[0]}"
            return self._fail(f"{what} cannot be sent by a worker: {describe_exception(error)}{hint}")

    @on_one_thread()  # as in a worker
    def fill(self, batch: Batch) -> Batch | _Failure:
        """The batch with its samples, or why there are none."""
        worker = torch.utils.data.get_worker_info()
        at = np.zeros(2, np.int64) if worker is None or self.at is None else self.at.numpy()[worker.id]
        try:
            # One hash a step: the seeds of its samples lie far apart, and so do those of two steps.
            first = derive_seed(self.seed, self.what, batch.step)
            seeds = [(first + place * 0x9E3779B97F4A7C15) % 2**63 for place in batch.places]
            samples = self._read(batch.indices.tolist(), seeds, at.data)
            if isinstance(samples, str):
                return self._fail(samples)
            made, done = [], 0
            try:
                # Each piece by itself, under a seed of its own: collate may pad to the longest of what it is given, or draw a mask.
                for piece in batch.pieces:
                    self.seed_collate(batch.step, piece)
                    made.append(self.task.collate(samples[done : done + piece.size]))
                    done += piece.size
            except (Exception, SystemExit) as error:
                data, numbers = locate(self.split, self.what, batch.indices[done : done + batch.pieces[len(made)].size].tolist())
                shown = ", ".join(map(str, numbers[:_SHOWN])) + (f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else "")
                one = f"sample{'s' * (len(numbers) > 1)} {shown} of the {data}"
                return self._fail(f"{one} cannot be made a batch: {describe_exception(error)}")
            return batch.fill(made)
        finally:
            at[1] = -1

    def _read(self, indices: list[int], seeds: list[int], at: memoryview) -> list[Any] | str:
        """The samples, each under its seed; or why one cannot be read."""
        seed: Callable[[int], object] = seed_generators
        places = None
        if not self.draws_elsewhere:
            seed_generators(0)  # numpy and random keep the second of two normal numbers, and hand it out without moving their place
            seed, places = torch.default_generator.manual_seed, read_places()
        split: Any = self.split
        samples: list[Any] | str = (read := [])
        index = -1
        try:
            for index, its_seed in zip(indices, seeds, strict=True):
                at[1] = index
                seed(its_seed)
                read.append(split[index])
        except (Exception, SystemExit) as error:
            samples = f"{name_sample(self.split, self.what, index)} cannot be read: {describe_exception(error)}"
        if places not in (None, read_places()):  # the first ones that draw from numpy or random are read once more, under their seeds
            self.draws_elsewhere = True
            return self._read(indices, seeds, at)
        return samples

    def seed_collate(self, step: int, piece: Piece) -> None:
        """Seed what `collate` may draw for a piece."""
        seed_generators(derive_seed(self.seed, f"{self.what} from place {piece.places[0]}", step))

    def _fail(self, reason: str) -> _Failure:
        return _Failure(f"task {self.task.name}: {reason}")


def is_in_memory(split: Dataset[Any]) -> TypeGuard[TensorDataset]:
    """Whether the samples of a split are rows of its tensors, and nothing is done to one that is read."""
    methods = ("__getitem__", "__len__")
    return isinstance(split, TensorDataset) and all(getattr(type(split), name) is getattr(TensorDataset, name) for name in methods)


def keep_split(split: Dataset[Any], config: Config, what: str, device: torch.device) -> InMemory | Seeded:
    """A split as it is read: on `device` if it is kept in memory, else sample by sample."""
    return InMemory(split, device) if is_in_memory(split) else Seeded(split, config.task, config.seed, what)


def read(kept: InMemory | Seeded, batch: Batch, kind: type[UserError] | type[RunError] = UserError) -> list[Piece]:
    """The pieces of a batch with their samples, read by this process. Raises `kind` where one cannot be read."""
    filled = kept.fill(batch)
    if isinstance(filled, _Failure):
        raise kind(filled.reason)
    return filled.pieces


def list_tensors(value: Any) -> list[Tensor]:
    """The strided tensors in samples, or in anything that holds some, in their order; of a sparse or nested one, those it consists of."""
    return _list_parts(value)[0]


def _list_parts(value: Any) -> tuple[list[Tensor], list[bytes]]:
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


def find_immovable(value: Any) -> str:
    """The kind of an object in samples that holds tensors, and has no method `to` to take them to a GPU; empty: there is none."""
    if isinstance(value, dict | list | tuple) and not hasattr(value, "to"):
        return next(filter(None, map(find_immovable, value.values() if isinstance(value, dict) else value)), "")
    return type(value).__name__ if list_tensors(value) and not hasattr(value, "to") else ""


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one kind and hold the same values; NaN is the same as NaN."""
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    # The second look is for NaN, and takes several times as long: seconds for a large model.
    return alike and (torch.equal(one, other) or bool(one.isclose(other, rtol=0, atol=0, equal_nan=True).all()))


def load_data(config: Config) -> tuple[Config, Data]:
    """The data of the config's task, its --train_size, --test_size and --holdout heeded; and the config, with sizes and facts.

    Raises `UserError` for data that are missing or damaged, and for a task whose code fails.
    """
    task = config.task
    # A split that is drawn, or a mean over all samples, is the same in each process and each start.
    with on_one_thread(), seeding_generators(_DATA_SEED), explaining(task.name, "in load"):
        data = task.load()
    if not isinstance(data, Data):
        raise UserError(f"task {task.name}: load returned {type(data).__name__}; expected mnist_dist.task.Data(train, test)")
    sizes = (_count(task, data.train, "training"), _count(task, data.test, "test"))
    config = config.with_sizes(sizes)
    train, holdout = _hold_out(data.train, config.train_size or sizes[0], config.holdout)
    data = Data(train, take_samples(data.test, range(config.test_size or sizes[1]), "test"), holdout)
    if config.workers and all(map(is_in_memory, (data.train, data.evaluated))):
        raise UserError(
            f"workers is {config.workers}, but task {task.name} keeps its data in memory, where no worker has any work: leave it out"
        )
    if type(task).collate is not Task.collate and any(map(is_in_memory, (data.train, data.evaluated))):
        raise UserError(
            f"task {task.name} has a method collate, and data in a TensorDataset, whose batches are gathered without it: leave it out, or "
            "give the data set a __getitem__ of its own"
        )
    with on_one_thread(), seeding_generators(_DATA_SEED), explaining(task.name, "in find_facts"):
        facts = task.find_facts(data.train)
    return config.with_facts(_make_plain(task, facts)), data


def are_facts(facts: Any) -> bool:
    """Whether a file gives `facts` back as they are."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        return isinstance(facts, dict) and bool(json.loads(json.dumps(facts, allow_nan=False)) == facts)
    return False


def _make_plain(task: Task, facts: Any) -> Row:
    """The facts as any file has them: a float, not numpy's own kind of it, which no checkpoint may hold.

    Raises `UserError` for facts that are no such, or too large; they would fail only once the training is done.
    """
    if not are_facts(facts):
        raise UserError(
            f"task {task.name}: find_facts returned {facts!r:.200}; expected a dictionary of plain values: finite numbers, words, lists of "
            "them"
        )
    if len(text := json.dumps(facts)) > _FACTS_BYTES_MAX:
        raise UserError(
            f"task {task.name}: find_facts returned {len(text):,} bytes of text; allowed: {_FACTS_BYTES_MAX:,}, as each result, "
            "checkpoint and file of weights holds them"
        )
    plain: Row = json.loads(text)
    return plain


def find_other_facts(there: Any, here: Any) -> list[str]:
    """The names of the facts that differ between two processes by more than rounding."""
    there = there if isinstance(there, dict) else {}
    return [str(name) for name in {**there, **here} if not _is_alike(there.get(name), here.get(name))]


def _is_alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=_FACT_TOLERANCE, abs_tol=_FACT_NOISE)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return [*one] == [*other] and all(map(_is_alike, one.values(), other.values()))
    return bool(one == other)


def _count(task: Task, split: Any, what: str) -> int:
    if isinstance(split, IterableDataset):
        raise UserError(
            f"task {task.name}: its {what} data are an IterableDataset, which cannot be read from the middle: a run could neither share it "
            "nor resume. Expected a map-style Dataset, with __len__ and __getitem__"
        )
    with explaining(task.name, f"as the samples of its {what} data were counted"):
        count = len(split)
        getattr(split, "__getitem__")  # noqa: B009  one that lacks it is named
    if count < 1:
        raise UserError(f"task {task.name}: its {what} data hold no samples")
    if is_in_memory(split) and hasattr(split, "__getitems__"):
        raise UserError(
            f"task {task.name}: its {what} data are a TensorDataset with a method __getitems__, which nobody would call: give it a "
            "__getitem__, by which each sample is read"
        )
    for tensor in split.tensors if is_in_memory(split) else ():
        if not is_dense(tensor):
            kind = "nested" if tensor.is_nested else "sparse"
            raise UserError(
                f"task {task.name}: its {what} data are a TensorDataset of a {kind} tensor, whose samples cannot be gathered; expected "
                "dense tensors, or a Dataset of your own"
            )
    return count


def _hold_out(split: Dataset[Any], size: int, count: int) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """The first `size` samples without `count` of them, evenly spread and the same for every seed, and those samples."""
    if not count:
        return take_samples(split, range(size), "training"), None
    held = torch.zeros(size, dtype=torch.bool)
    held[torch.arange(count) * size // count] = True
    return tuple(take_samples(split, which.nonzero().flatten().tolist(), "training") for which in (~held, held))  # type: ignore[return-value]


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


def encode_tensor(tensor: Tensor) -> memoryview:
    """The bytes of a strided tensor's numbers, in their order, wherever they lie. Of one that lies so already no copy is made."""
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    # Of a single number torch keeps any stride, and then refuses to see it as bytes.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def fingerprint(split: Dataset[Any], task: Task, what: str = "training") -> str:
    """A short hash of a split, by which a checkpoint knows the data it was trained on, and ranks know that they have the same.

    Of all that is kept in memory; else of the number of samples and of the first, the last and some in between.
    """
    digest = hashlib.sha256()
    if is_in_memory(split):
        for tensor in split.tensors:
            digest.update(encode_tensor(tensor))
        return digest.hexdigest()[:16]
    count = len(split)  # type: ignore[arg-type]
    places = sorted({place * (count - 1) // (_PROBED - 1) for place in range(_PROBED)})
    [piece] = read(Seeded(split, task, 0, what), Batch.of(places, range(len(places))))
    tensors, others = _list_parts(piece.samples)
    digest.update(f"{count} {places}".encode())
    for tensor in tensors:
        digest.update(encode_tensor(tensor))
    digest.update(b"".join(others))
    return digest.hexdigest()[:16]


def check_same_data(told: Row, group: Group) -> None:
    """Raise `UserError` on all ranks where what is `told` of the data by some is not what rank zero tells."""
    first, *others = group.gather(told)
    if odd := [rank for rank, other in enumerate(others, start=1) if other != first]:
        raise UserError(
            f"rank zero has other data than {name_ranks(odd)} ({list_differing(first, others[odd[0] - 1])}): give all hosts the same, in "
            "the same order (os.listdir and glob have none: sort what they give)"
        )


def list_differing(one: Row, other: Row) -> str:
    """The names whose values differ, in words."""
    return ", ".join(sorted(name for name in {*one, *other} if one.get(name) != other.get(name)))


class Probe:
    """A few samples, on which a model is tried: read on the CPU whenever they are asked for, with what is drawn for them.

    Raises `UserError` where a sample cannot be read, or `draw` fails.
    """

    def __init__(self, split: Dataset[Any], config: Config) -> None:
        self._kept, self._split = keep_split(split, config, "training", torch.device("cpu")), split
        self._is_gathered = is_in_memory(split) and config.holdout > 0  # whose samples have other numbers than those that load returned
        draws = []  # of generators that are seeded differently
        for seed in range(2):
            seed_generators(seed)
            draws.append(draw(config, 0, max(_PROBED, config.batch_size), UserError))
        drawn, again = draws
        self.draw_repeats = drawn is None or (again is not None and is_same(drawn, again))
        self.most = max(_PROBED, min(_PROBED_MOST, config.batch_size))
        self._drawn = None if drawn is None else drawn[: self.most].clone()
        self._drew_at_first = self._find_drawn()
        self.half = self.take(range(_PROBED // 2))
        self.whole = self.take(range(_PROBED))
        if any(tensor.grad_fn is not None for tensor in list_tensors(self.whole.samples)):
            raise UserError(
                f"task {config.task.name}: its training data still hold the graph of how they were computed, through which gradients go "
                "back only once: detach them (x.detach()), or compute them under torch.no_grad()"
            )
        sent = send_to_device(self.whole.samples, torch.device("cpu"))
        if len(list_tensors(sent)) != len(list_tensors(self.whole.samples)):
            raise UserError(
                f"task {config.task.name}: collate makes a {type(self.whole.samples).__name__}, whose method `to` returns "
                f"{type(sent).__name__}; expected the batch on the device"
            )
        self.collate_draws = False
        if isinstance(self._kept, Seeded):  # collate came last, and left the generators as they were seeded for it, or not
            after = read_generators()
            self._kept.seed_collate(0, self.whole)
            self.collate_draws = read_generators() != after

    def take(self, places: Sequence[int]) -> Piece:
        """A batch of the samples at some places, of which there are `most`; the first ones are those of the whole."""
        piece = self._read(self._find(places), places)
        return piece._replace(drawn=None if self._drawn is None else self._drawn[list(places)])

    def _read(self, indices: Sequence[int], places: Sequence[int]) -> Piece:
        [piece] = read(self._kept, Batch.of(indices, places))
        return piece

    def name(self, place: int) -> str:
        """How messages name the sample at a place."""
        return "one of the training data" if self._is_gathered else name_sample(self._split, "training", self._find([place])[0])

    def _find(self, places: Sequence[int]) -> list[int]:
        """The samples at some places: by turns two from the beginning, and two from all over, for data may be sorted by class, or mixed."""
        count = len(self._kept)
        pairs = [(place // 4 * 2 + place % 2, place % 4 < 2) for place in places]
        return [number % count if is_near else int((number + 1) * _GOLDEN_RATIO % 1 * count) for number, is_near in pairs]

    @on_one_thread()  # as in a worker
    def _find_drawn(self) -> dict[int, bool]:
        """Of some samples, whether random numbers are drawn when they are read now."""
        found: dict[int, bool] = {}
        if isinstance(self._kept, Seeded):
            with keeping_generators(), contextlib.suppress(Exception, SystemExit):  # what cannot be read is named by who reads it next
                for index in self._find(range(_PROBED)):
                    before = read_generators()
                    self._kept.split[index]
                    found[index] = read_generators() != before
        return found

    @cached_property
    def drawn_once(self) -> list[int]:
        """Samples that were drawn at random when they were first read, and are kept since. The first of all may have set something up."""
        now = self._find_drawn()
        kept = [index for index, drew in [*self._drew_at_first.items()][1:] if drew and not now.get(index, True)]
        return locate(self._split, "training", kept)[1]

    @cached_property
    def is_stored(self) -> bool:
        """Whether a batch has tensors that the data set itself holds."""
        if isinstance(self._kept, InMemory):
            return False
        again = self.take(self.half.places)
        one, two = (
            {tensor.untyped_storage().data_ptr() for tensor in list_tensors(some.samples) if tensor.numel()} for some in (self.half, again)
        )
        return bool(one & two)

    @cached_property
    def changed(self) -> list[int]:
        """Two samples of which one is another when it is read once more, after others, and some at other places, seeded otherwise.

        As many are looked at as a second has time for: only few of them may be random.
        """
        if isinstance(self._kept, InMemory):
            return []
        digests: dict[range, bytes] = {}
        end_s = time.monotonic() + _READ_S
        for first in range(0, self.most, 2):
            if first >= _PROBED and time.monotonic() > end_s:
                break
            pair = range(first, min(first + 2, self.most))
            digests[pair] = digest(self.take(pair).samples)
        self._read(self._find(self.half.places), [place + _PROBED_MOST for place in self.half.places])
        changed = (pair for pair, before in digests.items() if digest(self.take(pair).samples) != before)
        return locate(self._split, "training", self._find(next(changed, ())))[1]


def digest(samples: Any) -> bytes:
    """A hash of all numbers and texts in samples."""
    tensors, others = _list_parts(samples)
    found = hashlib.sha256(b"".join(others))
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tensor.shape} ".encode())
        found.update(encode_tensor(tensor))
    return found.digest()


def draw(config: Config, step: int, size: int, kind: type[UserError] | type[RunError] = RunError) -> Tensor | None:
    """What the task draws for a batch of `size` samples, a row for each; None: nothing. Raises `kind` where its code fails."""
    with explaining(config.task.name, f"in draw for step {step + 1}", kind):
        drawn = config.task.draw(config.seed, step, size)
    if drawn is None:
        return None
    if not isinstance(drawn, Tensor) or not is_dense(drawn) or not drawn.ndim or len(drawn) != size:
        shown = list(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
        raise UserError(
            f"task {config.task.name}: draw returned {shown}; expected a dense tensor of {size} rows, one for each sample, or None"
        )
    return drawn


def add_drawn(batch: Batch, config: Config, device: torch.device) -> Batch:
    """The same, with what the task draws for each piece, on `device`. Raises `RunError` where its code fails."""
    drawn = draw(config, batch.step, config.batch_size)
    if drawn is None:
        return batch
    pieces = batch.pieces
    # All are sent at once; and each is laid out alike, in memory of its own, however many a rank has.
    sent = send(torch.cat([drawn[_slice(piece.places)] for piece in pieces]), device)
    return batch.fill_drawn([sent] if len(pieces) == 1 else [own.clone() for own in torch.split(sent, [piece.size for piece in pieces])])


def _slice(places: Sequence[int]) -> slice | list[int]:
    return slice(places.start, places.stop, places.step) if isinstance(places, range) else list(places)


class StepSampler(DistributedSampler[Any]):
    """Yields this rank's `Batch` of each step, without its samples, from any start step.

    Over all ranks, step k of an epoch trains on `permutation[k*B : (k+1)*B]`, where B is the global batch size and the permutation is a
    function of (seed, epoch): the batch does not depend on the number of ranks. What is left of an epoch after its last whole batch is
    left out, the same in every world. The batch is dealt out to the ranks, or to the shards of which each rank has some: two parts differ
    by at most one sample, where their number does not divide B. `micro_batch` cuts each into pieces.
    """

    def __init__(self, split: Any, config: Config, rank: int, world_size: int, start_step: int) -> None:
        self.dealt_to, self.mine = deal(config, rank, world_size)
        super().__init__(split, num_replicas=self.dealt_to, rank=rank, shuffle=True, drop_last=False)
        self.config = config
        self.start_step = start_step

    def __len__(self) -> int:
        return self.config.total_steps - self.start_step

    def __iter__(self) -> Iterator[Batch]:
        orders, shuffled_epoch = [torch.empty(0)], -1
        size, steps_per_epoch = self.config.batch_size, self.config.steps_per_epoch
        for step in range(self.start_step, self.config.total_steps):
            epoch, batch = divmod(step, steps_per_epoch)
            if epoch != shuffled_epoch:
                # DistributedSampler shuffles by seed + epoch. The hash replaces that sum; the rest (a part's share) is its own work.
                self.seed, self.epoch = derive_seed(self.config.seed, "order", epoch) >> 1, 0
                orders, shuffled_epoch = [self._order(part) for part in self.mine], epoch
            # Of the whole permutation a part has the places part, part + dealt_to ...; of those, the ones within this batch.
            indices, parts = [], []
            for part, order in zip(self.mine, orders, strict=True):
                first, end = (-(-(limit - part) // self.dealt_to) for limit in (batch * size, (batch + 1) * size))
                indices.append(order[first:end])
                places = range(part + first * self.dealt_to - batch * size, size, self.dealt_to)
                at_once = self.config.micro_batch or len(places)
                parts.append(tuple(Piece(places[start : start + at_once]) for start in range(0, len(places), at_once)))
            yield Batch(step, indices[0] if len(indices) == 1 else torch.cat(indices), tuple(parts))

    def _order(self, part: int) -> Tensor:
        self.rank = part
        return torch.tensor(list(super().__iter__()))

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: Accelerate calls this with its own count of epochs, but here the epoch follows from the step."""


def deal(config: Config, rank: int, world_size: int) -> tuple[int, range]:
    """To how many parts samples are dealt out, and which of them are a rank's: its shards, or one for each rank."""
    return (config.shards, range(*split_shards(config.shards, rank, world_size))) if config.shards else (world_size, range(rank, rank + 1))


def list_batches(count: int, dealt_to: int, mine: range, config: Config) -> list[Batch]:
    """Some parts of a split of `count` samples, in batches of one piece: over all parts, each sample once.

    Twice as many samples are computed at once as a step has, since without gradients that needs no more memory; and 500 at most.
    """
    size = min(_EVALUATED_AT_ONCE, config.micro_batch or 2 * config.batch_size)
    pieces = [piece for part in mine for piece in torch.split(torch.arange(count)[part::dealt_to], size) if len(piece)]
    # A sample's place is its index, of one step: what is random in it is then the same on any number of ranks.
    return [Batch.of(piece, range(int(piece[0]), int(piece[-1]) + 1, dealt_to)) for piece in pieces]


def read_on(split: Dataset[Any], config: Config, device: torch.device) -> Iterator[Any]:
    """The samples of a split in their order, in batches, read by this process alone onto `device`."""
    kept = keep_split(split, config, "test", device)
    for batch in list_batches(len(kept), 1, range(1), config):
        [piece] = read(kept, batch, RunError)
        yield send_to_device(piece.samples, device)


class Reader:
    """Reads batches of a split, in their order, onto the device; again and again, by the same workers. Used in a `with` statement."""

    def __init__(self, split: Dataset[Any], config: Config, group: Group, what: str, batches: Iterable[Batch]) -> None:
        self.device = group.device
        self.task, self.split, self.what = config.task, split, what
        # Other ranks wait for this one as long: it says what it waits for before they take it for silent.
        self.timeout_s = config.timeout_s * (_READING_SHARE if group.size > 1 else 1)
        # Of each worker its process, and the sample that it is at, or -1. Memory that the processes share.
        self.workers = torch.full((0 if is_in_memory(split) else config.workers, 2), -1, dtype=torch.int64)
        several: dict[str, Any] = {}
        kept = keep_split(split, config, what, group.device)
        if len(self.workers):
            kept.at = self.workers.share_memory_()  # type: ignore[union-attr, no-untyped-call]
            # Forked: a data set of the user's file need not be pickled, nor be found by a fresh interpreter.
            several = {"multiprocessing_context": "fork", "persistent_workers": True, "timeout": self.timeout_s}
            several |= {"worker_init_fn": partial(_begin_work, self.workers)}
        pinned = self.device.type == "cuda" and isinstance(kept, Seeded)
        with _allowing_workers():
            loader: DataLoader[Any] = DataLoader(
                kept,  # type: ignore[arg-type]
                batch_sampler=batches,  # type: ignore[arg-type]
                collate_fn=_keep,
                num_workers=len(self.workers),
                pin_memory=pinned,
                **several,
            )
            # Accelerate wraps it as for one process, because the batches are this rank's already: `accelerator.prepare` would shard it a
            # second time, and half of the samples would never be seen.
            self.loader = prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
        self._kept = kept
        self._is_waiting = False
        if len(self.workers):
            base: Any = self.loader.base_dataloader
            base._get_iterator = partial(_start_workers, base._get_iterator)

    def __iter__(self) -> Iterator[Batch]:
        self._is_waiting = True
        for batch in self.loader:
            self._is_waiting = False
            if isinstance(batch, _Failure):
                raise RunError(batch.reason)
            if isinstance(self._kept, Seeded) and self.device.type != "cpu":
                batch = batch._replace(parts=send_to_device(batch.parts, self.device, non_blocking=True))
            yield batch
            self._is_waiting = True
        self._is_waiting = False

    def __len__(self) -> int:
        """Number of samples of the split."""
        return len(self._kept)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        busy = self._describe_workers()
        iterator = getattr(self.loader.base_dataloader, "_iterator", None)
        # A worker that dies while its samples are on their way breaks the connection, maybe before torch has seen that it is dead.
        is_cut_off = self._is_waiting and isinstance(error, (OSError, EOFError)) and iterator is not None
        is_silent = self._is_waiting and "timed out" in str(error)
        numbers = set(self.workers[:, 0].tolist())
        ends = ""
        if iterator is not None:
            is_cut_off = is_cut_off and _has_dead_worker(iterator)
            ends = _describe_ends(iterator)
            if is_silent:  # torch would wait for each
                _kill_children(numbers)
            iterator._shutdown_workers()
        _kill_children(numbers)
        if error is None or not (is_cut_off or is_lost_worker(error)):
            return
        what = f"task {self.task.name}: a worker that reads the {locate(self.split, self.what)[0]}"
        if is_silent:
            raise RunError(f"{what} gave no samples for {self.timeout_s:g} s (see --timeout_s): {busy}") from error
        if is_cut_off or {int(pid) for pid in re.findall(r"\d+", str(error))} & numbers:
            raise RunError(f"{what} died: {busy} ({ends or first_line(error).rstrip(' .')})") from error

    def _describe_workers(self) -> str:
        gone = [
            f"worker {number} of {len(self.workers)} (process {pid}) was at sample {locate(self.split, self.what, [sample])[1][0]}"
            for number, (pid, sample) in enumerate(self.workers.tolist())
            if sample >= 0
        ]
        return ", ".join(gone[:8]) or "none was at a sample"


@contextlib.contextmanager
def _allowing_workers() -> Iterator[None]:
    """Without torch's warning of more workers than cores, which would come on every rank; others stay, also in workers that start here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


def _start_workers(make_iterator: Callable[[], Any]) -> Any:
    """Torch's iterator over the batches of workers, which notices within a second of waiting that one of them is dead.

    torch would raise that in a handler of SIGCHLD, wherever this process is: amid a step, whose work would be lost, or where Python drops
    the error, and then wait for the dead one as for a silent one.
    """
    before = signal.getsignal(signal.SIGCHLD)
    with _allowing_workers():
        iterator = make_iterator()
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    get = iterator._try_get_data

    def look_and_get(timeout_s: float) -> tuple[bool, Any]:
        while True:  # torch looks for dead workers whenever nothing has come; the time for which all stand still does not count
            found: tuple[bool, Any] = get(min(_LOOK_S, timeout_s))
            timeout_s -= _LOOK_S
            if found[0] or timeout_s <= 0:
                return found

    iterator._try_get_data = look_and_get
    return iterator


def _has_dead_worker(iterator: Any) -> bool:
    """Whether a worker of torch's iterator is dead, or is within two seconds."""
    end = time.monotonic() + 2
    while not (is_dead := any(not worker.is_alive() for worker in iterator._workers)) and time.monotonic() < end:
        time.sleep(0.01)
    return is_dead


def _describe_ends(iterator: Any) -> str:
    """How the workers of torch's iterator ended that are dead, in words."""
    codes = {worker.exitcode for worker in iterator._workers} - {None}
    names = {number.value: number.name for number in signal.Signals}  # those for real time have none
    words = {code: f"exit status {code}" if code >= 0 else f"killed by {names.get(-code, f'signal {-code}')}" for code in sorted(codes)}
    return ", ".join(words.values()) + "; out of memory?" * (-signal.SIGKILL in words)


def _kill_children(numbers: Collection[int]) -> None:
    """Kill those of this process's children that have these numbers: those that have gone may be others' by now."""
    for process in multiprocessing.active_children():
        if process.pid in numbers:
            process.kill()


def _reopen_files() -> None:
    """Open anew each regular file that is open for reading: forked processes share the place at which they read, and move it together."""
    for number in map(int, os.listdir(_OPEN_FILES) if os.path.isdir(_OPEN_FILES) else ()):
        try:
            mode, flags = os.fstat(number).st_mode, fcntl.fcntl(number, fcntl.F_GETFL)
        except OSError:  # the folder itself, which was open while it was listed
            continue
        if not stat.S_ISREG(mode) or flags & os.O_ACCMODE != os.O_RDONLY:
            continue
        try:
            own = os.open(f"{_OPEN_FILES}/{number}", flags & (os.O_DIRECT | os.O_NOATIME) | os.O_CLOEXEC)
        except OSError as error:
            name = os.readlink(f"{_OPEN_FILES}/{number}")
            _log.warning("a worker cannot open %s anew (%s): where a sample is read from it, workers mix them up", name, error.strerror)
            continue
        try:
            os.lseek(own, os.lseek(number, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(own, number, inheritable=os.get_inheritable(number))
        except OSError:  # one of the kernel's, which has no place
            pass
        finally:
            os.close(own)


def _begin_work(workers: Tensor, number: int) -> None:
    """Make this process a worker that ends with the process it reads for, and never before."""
    # A signal to all processes of a job asks the run to save and stop, for which it needs its workers.
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    workers[number, 0] = os.getpid()
    _reopen_files()


def _keep(batch: Any) -> Any:
    return batch
