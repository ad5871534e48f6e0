"""The batches of the steps: which samples each has on any number of ranks, and what is drawn for them."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler
from torch.utils.data._utils.pin_memory import pin_memory

from mnist_dist.config import Config
from mnist_dist.errors import RunError, UserError
from mnist_dist.exchange import split_shards
from mnist_dist.model import is_dense
from mnist_dist.randomness import derive_seed
from mnist_dist.samples import encode_tensor
from mnist_dist.source import explaining

_EVALUATED_AT_ONCE = 500  # samples of a batch of an evaluation
_PLAIN_BYTES = 1 << 18  # from about twice as many on, shared memory is quicker


class MicroBatch(NamedTuple):
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


@dataclass(frozen=True, eq=False)
class Batch:
    """What one rank takes of one step: int64 `indices` into a split, in parts of micro-batches: a part for each of its shards, or one."""

    step: int
    indices: Tensor
    parts: tuple[tuple[MicroBatch, ...], ...]

    @classmethod
    def of(cls, indices: Sequence[int] | Tensor, places: Sequence[int]) -> "Batch":
        """Samples of step 0 in one micro-batch."""
        return cls(0, torch.as_tensor(indices), ((MicroBatch(places),),))

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The micro-batches of all parts."""
        return list(itertools.chain(*self.parts))

    @property
    def places(self) -> list[int]:
        """The samples' places in the global batch, in the order of `indices`."""
        return list(itertools.chain(*(micro_batch.places for micro_batch in self.micro_batches)))

    def fill(self, samples: Iterable[Any]) -> "Batch":
        """The same, with the samples of each micro-batch."""
        return self._map(lambda micro_batch, its_own: micro_batch._replace(samples=its_own), samples)

    def fill_drawn(self, drawn: Iterable[Tensor]) -> "Batch":
        """The same, with what is drawn for each micro-batch."""
        return self._map(lambda micro_batch, its_own: micro_batch._replace(drawn=its_own), drawn)

    def _map(self, change: Callable[[MicroBatch, Any], MicroBatch], values: Iterable[Any]) -> "Batch":
        rest = iter(values)
        return replace(self, parts=tuple(tuple(change(micro_batch, next(rest)) for micro_batch in part) for part in self.parts))

    def pin_memory(self) -> "Batch":
        """The same, ready to be sent to a GPU. torch asks for it: of a tuple not every version would, and it makes lists of the places."""
        return self.fill(pin_memory(micro_batch.samples) for micro_batch in self.micro_batches)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[Any, ...]:
        return Sent.of(self).__reduce__()


class _Pickler(ForkingPickler):
    """Sends small tensors as they are: on torch's own way each takes a file of shared memory, and a connection to fetch that."""

    def reducer_override(self, value: Any) -> Any:
        """How a value is sent."""
        return (_make_tensor, (bytes(encode_tensor(value)), value.dtype, value.shape)) if _is_small(value) else NotImplemented


class Sent(NamedTuple):
    """A batch on its way to a worker or back. What receives it gets the batch itself."""

    content: bytes

    @classmethod
    def of(cls, batch: Batch) -> "Sent":
        """A batch, ready to be sent."""
        return cls(bytes(_Pickler.dumps((batch.step, batch.indices, batch.parts))))

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


class StepSampler(DistributedSampler[Any]):
    """Yields this rank's `Batch` of each step, without its samples, from any start step.

    Over all ranks, step k of an epoch trains on `permutation[k*B : (k+1)*B]`, where B is the global batch size and the permutation is a
    function of (seed, epoch): the batch does not depend on the number of ranks. What is left of an epoch after its last whole batch is
    left out, the same in every world. The batch is dealt out to the ranks, or to the shards of which each rank has some: two parts differ
    by at most one sample, where their number does not divide B. `micro_batch` cuts each further.
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
                parts.append(tuple(MicroBatch(places[start : start + at_once]) for start in range(0, len(places), at_once)))
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
    """Some parts of a split of `count` samples, in batches of one micro-batch: over all parts, each sample once.

    As many samples are computed at once as `micro_batch` says; else twice as many as a step has, since without gradients that needs no
    more memory. 500 at most.
    """
    size = min(_EVALUATED_AT_ONCE, config.micro_batch or 2 * config.batch_size)
    chunks = [chunk for part in mine for chunk in torch.split(torch.arange(count)[part::dealt_to], size) if len(chunk)]
    # A sample's place is its index, of one step: what is random in it is then the same on any number of ranks.
    return [Batch.of(chunk, range(int(chunk[0]), int(chunk[-1]) + 1, dealt_to)) for chunk in chunks]


def draw(config: Config, step: int, size: int, kind: type[UserError] | type[RunError] = RunError) -> Tensor | None:
    """What the task draws for a batch of `size` samples, a row for each; None: nothing.

    Raises `kind` where its code fails, and `UserError` where it returns anything else.
    """
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
    """The same, with what the task draws for each micro-batch, on `device`. Raises as `draw` does."""
    drawn = draw(config, batch.step, config.batch_size)
    if drawn is None:
        return batch
    micro_batches = batch.micro_batches
    # All are sent at once; and each is laid out alike, in memory of its own, however many a rank has.
    sent = send(torch.cat([drawn[_slice(micro_batch.places)] for micro_batch in micro_batches]), device)
    if len(micro_batches) == 1:
        return batch.fill_drawn([sent])
    return batch.fill_drawn(own.clone() for own in torch.split(sent, [micro_batch.size for micro_batch in micro_batches]))


def _slice(places: Sequence[int]) -> slice | list[int]:
    return slice(places.start, places.stop, places.step) if isinstance(places, range) else list(places)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, without waiting for what that is doing: from pinned memory, which stays where it is."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
