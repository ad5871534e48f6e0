"""The data of a task: loaded and checked, known again by a fingerprint, and a few samples of them on which a model is tried."""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import Dataset, IterableDataset

from mnist_dist.batches import Batch, MicroBatch, draw
from mnist_dist.config import Config
from mnist_dist.distributed import Group
from mnist_dist.errors import UserError
from mnist_dist.machine import on_one_thread
from mnist_dist.model import is_dense
from mnist_dist.randomness import keeping_generators, read_generators, seed_generators, seeding_generators
from mnist_dist.reader import InMemory, Seeded, keep_split, read
from mnist_dist.rendezvous import name_ranks
from mnist_dist.samples import digest, encode_tensor, is_in_memory, is_same, list_parts, list_tensors, locate, name_sample, take_samples
from mnist_dist.source import explaining
from mnist_dist.task import Data, Row, Task

_DATA_SEED = 67_280_421_310_721  # the one that torch's own generator begins with
_FACTS_BYTES_MAX = 16 << 20  # as text
_FACT_TOLERANCE, _FACT_NOISE = 1e-4, 1e-8  # processors may round differently, and a mean of nothing but noise altogether
_READ_S = 1.0  # for samples that are read to be read again
_PROBED = 4  # samples by which a data set is known, and a model is tried
_PROBED_MOST = 64  # on which it is tried whether a loss sees other samples
_GOLDEN_RATIO = 0.6180339887498949  # its multiples spread evenly, however many there are


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


def fingerprint(split: Dataset[Any], task: Task, what: str = "training") -> str:
    """A short hash of a split, by which a checkpoint knows the data it was trained on, and ranks know that they have the same.

    Of all that is kept in memory; else of the number of samples and of the first, the last and some in between.
    """
    hashed = hashlib.sha256()
    if is_in_memory(split):
        for tensor in split.tensors:
            hashed.update(encode_tensor(tensor))
        return hashed.hexdigest()[:16]
    count = len(split)  # type: ignore[arg-type]
    places = sorted({place * (count - 1) // (_PROBED - 1) for place in range(_PROBED)})
    [micro_batch] = read(Seeded(split, task, 0, what), Batch.of(places, range(len(places))))
    tensors, others = list_parts(micro_batch.samples)
    hashed.update(f"{count} {places}".encode())
    for tensor in tensors:
        hashed.update(encode_tensor(tensor))
    hashed.update(b"".join(others))
    return hashed.hexdigest()[:16]


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


class SampleProbe:
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
        with explaining(config.task.name, f"as its batch, a {type(self.whole.samples).__name__}, was sent to a device"):
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

    def take(self, places: Sequence[int]) -> MicroBatch:
        """A batch of the samples at some places, of which there are `most`; the first ones are those of the whole."""
        micro_batch = self._read(self._find(places), places)
        return micro_batch._replace(drawn=None if self._drawn is None else self._drawn[list(places)])

    def _read(self, indices: Sequence[int], places: Sequence[int]) -> MicroBatch:
        [micro_batch] = read(self._kept, Batch.of(indices, places))
        return micro_batch

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
