"""The samples of a task, in the order of the steps: which of them a step takes, and how they reach the device.

A data set that is kept in memory lies on the device, so a batch is one gather: there are no worker processes to seed, feed or restore. Any
other is read sample by sample, in this process or by workers, each sample under its own seed.
"""

import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, TensorDataset
from torch.utils.data._utils.pin_memory import pin_memory

from mnist_dist.config import Config
from mnist_dist.distributed import Group
from mnist_dist.errors import RunError, UserError, is_lost_worker
from mnist_dist.exchange import split_shards
from mnist_dist.preemption import STOP_SIGNALS
from mnist_dist.randomness import derive_seed
from mnist_dist.source import describe_exception, explaining
from mnist_dist.task import Data, Task
from mnist_dist.tier import Probe, is_same, list_tensors, read_generators
from mnist_dist.world import World

_EVALUATED_AT_ONCE = 500  # samples of a batch of an evaluation
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_PLAIN_BYTES = 1 << 18  # from about twice as many on, shared memory is quicker
_PLAIN_TYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64)  # the usual ones of those that numpy has
_PROBED = 4  # samples by which a data set is known, and a model is tried


class Share(NamedTuple):
    """What one rank takes of one step: int64 `indices` into a split, and of each of its parts the samples' places in the global batch."""

    step: int
    indices: Tensor
    parts: tuple[range, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _send_plainly(self)


class Batch(NamedTuple):
    """A share with the samples of each of its parts: rows of a data set in memory, or what the task's `collate` made; on the device."""

    step: int
    indices: Tensor
    samples: list[Any]
    parts: tuple[range, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _send_plainly(self)

    def pin_memory(self) -> "Batch":
        """The same, ready to be sent to a GPU. torch asks for it, and would else make lists of the ranges."""
        return self._replace(samples=pin_memory(self.samples))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Plain:
    """A small tensor between two processes: on torch's own way it takes a file of shared memory, and a connection to fetch that."""

    values: Any


def _send_plainly(sent: Share | Batch) -> tuple[Any, ...]:
    """How one goes to a worker or comes back."""
    return _receive, (type(sent), recursively_apply(lambda tensor: _Plain(tensor.numpy()), tuple(sent), test_type=_is_small))


def _receive(kind: type[Share] | type[Batch], fields: tuple[Any, ...]) -> Share | Batch:
    return kind(*recursively_apply(lambda sent: torch.from_numpy(sent.values), fields, test_type=lambda sent: isinstance(sent, _Plain)))


def _is_small(value: Any) -> bool:
    """Whether a value is a tensor that is sent plainly."""
    is_plain = isinstance(value, Tensor) and value.dtype in _PLAIN_TYPES and value.layout == torch.strided and not value.requires_grad
    return is_plain and value.nbytes <= _PLAIN_BYTES


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

    def __getitems__(self, share: Share) -> Batch:
        """A DataLoader calls this once for each batch."""
        where = torch.split(send(share.indices, self.tensors[0].device), [len(part) for part in share.parts])
        # Whole samples are copied; by tensor[part] it would be a number at a time, which on a CPU takes six times as long. Each part has
        # memory of its own: where a tensor begins in it may decide how its sums are rounded.
        samples: list[Any] = [tuple(tensor.index_select(0, part) for tensor in self.tensors) for part in where]
        return Batch(share.step, share.indices, samples, share.parts)


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
        self.draws_elsewhere = not _can_read_places()

    def __len__(self) -> int:
        return len(self.split)  # type: ignore[arg-type]

    def __getitems__(self, share: Share) -> Batch | _Failure:
        """A DataLoader calls this once for each batch."""
        worker = torch.utils.data.get_worker_info()
        at = np.zeros(2, np.int64) if worker is None or self.at is None else self.at.numpy()[worker.id]
        threads = torch.get_num_threads()
        if worker is None and threads > 1:
            torch.set_num_threads(1)  # as in a worker, where a sum over a large image is rounded the same
        try:
            # One hash a step: the seeds of its samples lie far apart, and so do those of two steps.
            first = derive_seed(self.seed, self.what, share.step)
            seeds = [(first + place * 0x9E3779B97F4A7C15) % 2**63 for place in itertools.chain(*share.parts)]
            samples = self._read(share.indices.tolist(), seeds, at.data)
            if isinstance(samples, str):
                return self._fail(samples)
            try:
                # Each part by itself, under a seed of its own: collate may pad to the longest of what it is given, or draw a mask.
                rest, parts = iter(samples), []
                for part in share.parts:
                    self.seed_collate(share.step, part)
                    parts.append(self.task.collate(list(itertools.islice(rest, len(part)))))
            except (Exception, SystemExit) as error:
                first = int(share.indices[0])
                return self._fail(
                    f"samples of the {self.what} data, from number {first} on, cannot be made a batch: {describe_exception(error)}"
                )
            return Batch(share.step, share.indices, parts, share.parts)
        finally:
            at[1] = -1
            if worker is None and threads > 1:
                torch.set_num_threads(threads)

    def _read(self, indices: list[int], seeds: list[int], at: memoryview) -> list[Any] | str:
        """The samples, each under its seed; or why one cannot be read."""
        seed = seed_generators if self.draws_elsewhere else torch.default_generator.manual_seed
        places = None if self.draws_elsewhere else _read_places()
        split: Any = self.split
        samples: list[Any] | str = (read := [])
        index = -1
        try:
            for index, its_seed in zip(indices, seeds, strict=True):
                at[1] = index
                seed(its_seed)
                read.append(split[index])
        except (Exception, SystemExit) as error:
            samples = f"sample {index} of the {self.what} data cannot be read: {describe_exception(error)}"
        if places not in (None, _read_places()):  # the first ones that draw from numpy or random are read once more, under their seeds
            self.draws_elsewhere = True
            return self._read(indices, seeds, at)
        return samples

    def seed_collate(self, step: int, part: range) -> None:
        """Seed what `collate` may draw for a part of a batch."""
        seed_generators(derive_seed(self.seed, f"{self.what} from place {part.start}", step))

    def _fail(self, reason: str) -> _Failure:
        return _Failure(f"task {self.task.name}: {reason}")


def is_in_memory(split: Dataset[Any]) -> TypeGuard[TensorDataset]:
    """Whether the samples of a split are rows of its tensors, and nothing is done to one that is read."""
    return isinstance(split, TensorDataset) and type(split).__getitem__ is TensorDataset.__getitem__


def keep_split(split: Dataset[Any], config: Config, what: str, device: torch.device) -> InMemory | Seeded:
    """A split as it is read: on `device` if it is kept in memory, else sample by sample."""
    return InMemory(split, device) if is_in_memory(split) else Seeded(split, config.task, config.seed, what)


def read_share(kept: InMemory | Seeded, share: Share, kind: type[UserError] | type[RunError] = UserError) -> Any:
    """The samples of a share of one part, read by this process. Raises `kind` where one cannot be read."""
    batch = kept.__getitems__(share)
    if isinstance(batch, _Failure):
        raise kind(batch.reason)
    (samples,) = batch.samples
    return samples


def seed_generators(seed: int) -> None:
    """Seed the generators of torch (on the CPU), numpy and random."""
    # `torch.manual_seed` would visit every kind of device, which takes a hundred times as long.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


# Where the generators of random and numpy, both Mersenne twisters, keep their place in a block of 624 numbers, and its first number.
_WORDS = 624
_RANDOM = id(random.random.__self__) + object.__basicsize__  # type: ignore[attr-defined]
_NUMPY = np.random.get_bit_generator().ctypes.state_address  # type: ignore[attr-defined]
_RANDOM_PLACE = (ctypes.c_uint32 * 2).from_address(_RANDOM)
_NUMPY_WORD = (ctypes.c_uint32 * 1).from_address(_NUMPY)
_NUMPY_PLACE = (ctypes.c_uint32 * 1).from_address(_NUMPY + 4 * _WORDS)


def _read_places() -> tuple[int, int, int, int]:
    """What changes when numpy or random are drawn from: the place moves, or after a whole block comes back beside another first number."""
    return _RANDOM_PLACE[0], _RANDOM_PLACE[1], _NUMPY_WORD[0], _NUMPY_PLACE[0]


@functools.cache
def _can_read_places() -> bool:
    """Whether the generators of this Python and this numpy are kept as `_read_places` expects."""
    states = random.getstate(), np.random.get_state()
    try:
        random.seed(1)
        np.random.seed(1)
        (random_place, _, _, numpy_place), expected = _read_places(), (_WORDS, _WORDS)
        random.random()  # noqa: S311
        after_random = _read_places()
        np.random.random_sample()
        after_numpy = _read_places()
        return (random_place, numpy_place) == expected and (after_random[0], after_random[3], after_numpy[3]) == (2, _WORDS, 2)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def load_data(config: Config) -> tuple[Config, Data]:
    """The data of the config's task, its --train_size, --test_size and --holdout heeded; and the config, with sizes and facts.

    Raises `UserError` for data that are missing or damaged, and for a task whose code fails.
    """
    task = config.task
    with explaining(task.name, "in load"):
        data = task.load()
    if not isinstance(data, Data):
        raise UserError(f"task {task.name}: load returned {type(data).__name__}; expected mnist_dist.task.Data(train, test)")
    sizes = (_count(task, data.train, "training"), _count(task, data.test, "test"))
    config = config.with_sizes(sizes)
    train, holdout = _hold_out(data.train, config.train_size or sizes[0], config.holdout)
    data = Data(train, take_samples(data.test, range(config.test_size or sizes[1])), holdout)
    if config.workers and all(map(is_in_memory, (data.train, data.evaluated))):
        raise UserError(
            f"workers is {config.workers}, but task {task.name} keeps its data in memory, where no worker has any work: leave it out"
        )
    with explaining(task.name, "in find_facts"):
        facts = task.find_facts(data.train)
    _check_facts(task, facts)
    return config.with_facts(facts), data


def _check_facts(task: Task, facts: Any) -> None:
    """Raise `UserError` unless a file gives the facts back as they are; else it would fail only once the training is done."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        if isinstance(facts, dict) and json.loads(json.dumps(facts, allow_nan=False)) == facts:
            return
    raise UserError(
        f"task {task.name}: find_facts returned {facts!r:.200}; expected a dictionary of plain values: finite numbers, words, lists of them"
    )


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
    return count


def _hold_out(split: Dataset[Any], size: int, count: int) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """The first `size` samples without `count` of them, evenly spread and the same for every seed, and those samples."""
    if not count:
        return take_samples(split, range(size)), None
    held = torch.zeros(size, dtype=torch.bool)
    held[torch.arange(count) * size // count] = True
    return tuple(take_samples(split, which.nonzero().flatten().tolist()) for which in (~held, held))  # type: ignore[return-value]


def take_samples(split: Dataset[Any], places: Sequence[int]) -> Dataset[Any]:
    """Some samples of a split; a range begins with the first."""
    if len(places) == len(split):  # type: ignore[arg-type]
        return split
    if is_in_memory(split):
        which = slice(len(places)) if isinstance(places, range) else torch.tensor(places)
        return TensorDataset(*(tensor[which] for tensor in split.tensors))
    return Subset(split, places)


def fingerprint(data: Data, task: Task) -> str:
    """A short hash of the training split, by which a checkpoint knows the data it was trained on.

    Of all that is kept in memory; else of the number of samples and of the first, the last and some in between.
    """
    digest = hashlib.sha256()
    if is_in_memory(data.train):
        for tensor in data.train.tensors:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        return digest.hexdigest()[:16]
    count = len(data.train)  # type: ignore[arg-type]
    places = sorted({place * (count - 1) // (_PROBED - 1) for place in range(_PROBED)})
    samples = read_share(Seeded(data.train, task, 0, "training"), Share(0, torch.tensor(places), (range(len(places)),)))
    buffer = io.BytesIO()
    for tensor in list_tensors(samples):
        buffer.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(f"{count} {places}".encode() + buffer.getvalue())
    return digest.hexdigest()[:16]


def probe(split: Dataset[Any], config: Config) -> Probe:
    """What a model is tried on. Raises `UserError` where a sample cannot be read, or `draw` fails."""
    places = torch.tensor([place % len(split) for place in range(_PROBED)])  # type: ignore[arg-type]
    kept, whole, half = keep_split(split, config, "training", torch.device("cpu")), range(_PROBED), range(_PROBED // 2)
    part = read_share(kept, Share(0, places[: len(half)], (half,)))
    samples = read_share(kept, Share(0, places, (whole,)))
    collate_draws = False
    if isinstance(kept, Seeded):  # collate came last, and left the generators as they were seeded for it, or not
        after = read_generators()
        kept.seed_collate(0, whole)
        collate_draws = read_generators() != after
    several = []
    for seed in range(2):
        seed_generators(seed)
        several.append(draw(config, 0, max(_PROBED, config.batch_size), (whole,), UserError))
    drawn, again = several
    return Probe(samples, part, drawn, drawn is None or is_same(drawn, again), collate_draws)


def draw(config: Config, step: int, size: int, parts: Sequence[range], kind: type[UserError] | type[RunError] = RunError) -> Any:
    """What the task draws for some places of a batch of `size` samples; None where it draws nothing. Raises `kind` where its code fails."""
    with explaining(config.task.name, f"in draw for step {step + 1}", kind):
        drawn = config.task.draw(config.seed, step, size)
    if drawn is None:
        return None
    if not isinstance(drawn, Tensor) or not drawn.ndim or len(drawn) != size:
        shown = list(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
        raise UserError(f"task {config.task.name}: draw returned {shown}; expected a tensor of {size} rows, one for each sample, or None")
    rows = [drawn[part.start : part.stop : part.step] for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class StepSampler(DistributedSampler[Any]):
    """Yields this rank's `Share` of each step, from any start step.

    Over all ranks, step k of an epoch trains on `permutation[k*B : (k+1)*B]`, where B is the global batch size and the permutation is a
    function of (seed, epoch): the batch does not depend on the number of ranks. What is left of an epoch after its last whole batch is
    left out, the same in every world. The batch is dealt out to the ranks, or to the shards of which each rank has some: two parts differ
    by at most one sample, where their number does not divide B.
    """

    def __init__(self, split: Any, config: Config, rank: int, world_size: int, start_step: int) -> None:
        self.dealt_to = config.shards or world_size
        super().__init__(split, num_replicas=self.dealt_to, rank=rank, shuffle=True, drop_last=False)
        self.config = config
        self.start_step = start_step
        self.mine = range(*split_shards(config.shards, rank, world_size)) if config.shards else range(rank, rank + 1)

    def __len__(self) -> int:
        return self.config.total_steps - self.start_step

    def __iter__(self) -> Iterator[Share]:
        orders, shuffled_epoch = [torch.empty(0)], -1
        size, steps_per_epoch = self.config.batch_size, self.config.steps_per_epoch
        for step in range(self.start_step, self.config.total_steps):
            epoch, batch = divmod(step, steps_per_epoch)
            if epoch != shuffled_epoch:
                # DistributedSampler shuffles by seed + epoch. The hash replaces that sum; the rest (a part's share) is its own work.
                self.seed, self.epoch = derive_seed(self.config.seed, "order", epoch) >> 1, 0
                orders, shuffled_epoch = [self._order(part) for part in self.mine], epoch
            # Of the whole permutation a part has the places part, part + dealt_to ...; of those, the ones within this batch.
            indices, places = [], []
            for part, order in zip(self.mine, orders, strict=True):
                first, end = (-(-(limit - part) // self.dealt_to) for limit in (batch * size, (batch + 1) * size))
                indices.append(order[first:end])
                places.append(range(part + first * self.dealt_to - batch * size, size, self.dealt_to))
            yield Share(step, indices[0] if len(indices) == 1 else torch.cat(indices), tuple(places))

    def _order(self, part: int) -> Tensor:
        self.rank = part
        return torch.tensor(list(super().__iter__()))

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: Accelerate calls this with its own count of epochs, but here the epoch follows from the step."""


def list_shares(count: int, group: Group | World, at_once: int | None) -> list[Share]:
    """This rank's part of a split of `count` samples, in batches of at most `at_once`: over all ranks, each sample once."""
    mine = torch.arange(count)[group.rank :: group.size]
    parts = torch.split(mine, min(_EVALUATED_AT_ONCE, at_once or _EVALUATED_AT_ONCE)) if len(mine) else ()
    # A sample's place is its index, of one step: what is random in it is then the same on any number of ranks.
    return [Share(0, part, (range(int(part[0]), int(part[-1]) + 1, group.size),)) for part in parts]


def read_on(split: Dataset[Any], config: Config, device: torch.device) -> Iterator[Any]:
    """The samples of a split in their order, in batches, read by this process alone onto `device`."""
    kept = keep_split(split, config, "test", device)
    for share in list_shares(len(kept), World(), config.micro_batch):
        yield send_to_device(read_share(kept, share, RunError), device)


class Reader:
    """Reads shares of a split, in their order, onto the device; again and again, by the same workers. Used in a `with` statement."""

    def __init__(self, split: Dataset[Any], config: Config, group: Group, what: str, shares: Any) -> None:
        self.device = group.device
        self.task, self.what = config.task, what
        self.timeout_s = config.timeout_s
        # Of each worker its process, and the sample that it is at, or -1. Memory that the processes share.
        self.workers = torch.full((0 if is_in_memory(split) else config.workers, 2), -1, dtype=torch.int64)
        several: dict[str, Any] = {}
        kept = keep_split(split, config, what, group.device)
        if len(self.workers):
            kept.at = self.workers.share_memory_()  # type: ignore[union-attr, no-untyped-call]
            # Forked: a data set of the user's file need not be pickled, nor be found by a fresh interpreter.
            several = {"multiprocessing_context": "fork", "persistent_workers": True, "timeout": config.timeout_s}
            several |= {"worker_init_fn": partial(_begin_work, self.workers)}
        pinned = self.device.type == "cuda" and isinstance(kept, Seeded)
        with warnings.catch_warnings(action="ignore"):  # of more workers than cores, on every rank
            loader: DataLoader[Any] = DataLoader(
                kept,  # type: ignore[arg-type]
                batch_sampler=shares,
                collate_fn=_keep,
                num_workers=len(self.workers),
                pin_memory=pinned,
                **several,
            )
        self._kept = kept
        self._is_waiting = False
        # Accelerate wraps it as for one process, because the shares are this rank's already: `accelerator.prepare` would shard it a second
        # time, and half of the samples would never be seen.
        self.loader = prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)

    def __iter__(self) -> Iterator[Batch]:
        self._is_waiting = True
        for batch in self.loader:
            self._is_waiting = False
            if isinstance(batch, _Failure):
                raise RunError(batch.reason)
            if isinstance(self._kept, Seeded) and self.device.type != "cpu":
                batch = batch._replace(samples=send_to_device(batch.samples, self.device, non_blocking=True))
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
        if iterator is not None:
            try:
                is_cut_off = is_cut_off and _has_dead_worker(iterator)
                iterator._shutdown_workers()
            except RuntimeError as late:  # a worker may be lost at this very moment
                if not is_lost_worker(late):
                    raise
                error = late if is_cut_off else error or late
        for pid, _sample in self.workers.tolist():
            with contextlib.suppress(OSError):  # it has gone, as it should
                if pid > 0:
                    os.kill(pid, signal.SIGKILL)
        # torch raises these wherever this process happens to be when a worker is lost.
        if error is None or not (is_cut_off or is_lost_worker(error)):
            return
        what = f"task {self.task.name}: a worker that reads the {self.what} data"
        if "timed out" in str(error) and self._is_waiting:
            raise RunError(f"{what} gave no samples for {self.timeout_s:g} s (see --timeout_s): {busy}") from error
        if is_cut_off or {int(pid) for pid in re.findall(r"\d+", str(error))} & set(self.workers[:, 0].tolist()):
            raise RunError(f"{what} died: {busy} ({str(error).splitlines()[0].rstrip(' .')}; out of memory?)") from error

    def _describe_workers(self) -> str:
        gone = [
            f"worker {number} of {len(self.workers)} (process {pid}) was at sample {sample}"
            for number, (pid, sample) in enumerate(self.workers.tolist())
            if sample >= 0
        ]
        return ", ".join(gone[:8]) or "none was at a sample"


def _has_dead_worker(iterator: Any) -> bool:
    """Whether a worker of torch's iterator is dead, or is within two seconds."""
    end = time.monotonic() + 2
    while not (is_dead := any(not worker.is_alive() for worker in iterator._workers)) and time.monotonic() < end:
        time.sleep(0.01)
    return is_dead


def _begin_work(workers: Tensor, number: int) -> None:
    """Make this process a worker that ends with the process it reads for, and never before."""
    # A signal to all processes of a job asks the run to save and stop, for which it needs its workers.
    signal.set_wakeup_fd(-1)
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    workers[number, 0] = os.getpid()


def _keep(batch: Any) -> Any:
    return batch
