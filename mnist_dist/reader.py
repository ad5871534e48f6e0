"""How the samples of a batch are read, and reach the device.

A data set that is kept in memory lies on the device, so a batch is one gather: there are no worker processes to seed, feed or restore. Any
other is read sample by sample, in this process or by workers, each sample under its own seed.
"""

import contextlib
import errno
import fcntl
import logging
import multiprocessing
import os
import re
import signal
import stat
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from mnist_dist.batches import Batch, MicroBatch, Sent, list_batches, send
from mnist_dist.config import Config
from mnist_dist.distributed import Group
from mnist_dist.errors import RunError, UserError, first_line, is_lost_worker
from mnist_dist.machine import on_one_thread
from mnist_dist.preemption import ignore_stop_signals
from mnist_dist.randomness import can_read_places, derive_seed, read_places, seed_generators
from mnist_dist.samples import is_in_memory, locate, name_sample
from mnist_dist.source import describe_exception
from mnist_dist.starter import make_die_with_parent
from mnist_dist.task import Task

_log = logging.getLogger(__name__)
_OPEN_FILES = "/proc/self/fd"  # of Linux
_SHOWN = 32  # numbers of samples in a message
_LOOK_S = 1.0  # between two looks at the workers
_READING_SHARE = 0.8
READING_RULE = (
    "what the data set stores (clone it first), and draw from the generators of torch, numpy and random alone, which are seeded before "
    "each sample"
)


class _Failure(NamedTuple):
    """What a worker sends instead of a batch."""

    reason: str


class InMemory:
    """A `TensorDataset` on the device."""

    def __init__(self, split: TensorDataset, device: torch.device) -> None:
        self.tensors = tuple(tensor.to(device) for tensor in split.tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def fill(self, batch: Batch) -> Batch:
        """The batch with its samples."""
        where = torch.split(send(batch.indices, self.tensors[0].device), [micro_batch.size for micro_batch in batch.micro_batches])
        # Whole samples are copied; by tensor[own] it would be a number at a time, which on a CPU takes six times as long. Each micro-batch
        # has memory of its own: where a tensor begins in it may decide how its sums are rounded.
        return batch.fill(tuple(tensor.index_select(0, own) for tensor in self.tensors) for own in where)

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

    def __getitems__(self, batch: Batch) -> Batch | Sent | _Failure:
        """A DataLoader calls this once for each batch."""
        filled = self.fill(batch)
        if torch.utils.data.get_worker_info() is None or isinstance(filled, _Failure):
            return filled
        try:
            return Sent.of(filled)
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
                # Each micro-batch by itself, under a seed of its own: collate may pad to the longest of what it is given, or draw a mask.
                for micro_batch in batch.micro_batches:
                    self.seed_collate(batch.step, micro_batch)
                    made.append(self.task.collate(samples[done : done + micro_batch.size]))
                    done += micro_batch.size
            except (Exception, SystemExit) as error:
                data, numbers = locate(self.split, self.what, batch.indices[done : done + batch.micro_batches[len(made)].size].tolist())
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

    def seed_collate(self, step: int, micro_batch: MicroBatch) -> None:
        """Seed what `collate` may draw for a micro-batch."""
        seed_generators(derive_seed(self.seed, f"{self.what} from place {micro_batch.places[0]}", step))

    def _fail(self, reason: str) -> _Failure:
        return _Failure(f"task {self.task.name}: {reason}")


def keep_split(split: Dataset[Any], config: Config, what: str, device: torch.device) -> InMemory | Seeded:
    """A split as it is read: on `device` if it is kept in memory, else sample by sample."""
    return InMemory(split, device) if is_in_memory(split) else Seeded(split, config.task, config.seed, what)


def read(kept: InMemory | Seeded, batch: Batch, kind: type[UserError] | type[RunError] = UserError) -> list[MicroBatch]:
    """The micro-batches of a batch with their samples, read by this process. Raises `kind` where one cannot be read."""
    filled = kept.fill(batch)
    if isinstance(filled, _Failure):
        raise kind(filled.reason)
    return filled.micro_batches


def read_on(split: Dataset[Any], config: Config, device: torch.device) -> Iterator[Any]:
    """The samples of a split in their order, in batches, read by this process alone onto `device`."""
    kept = keep_split(split, config, "test", device)
    for batch in list_batches(len(kept), 1, range(1), config):
        [micro_batch] = read(kept, batch, RunError)
        yield send_to_device(micro_batch.samples, device)


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
            several |= {"worker_init_fn": partial(_begin_work, self.workers, make_die_with_parent())}
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
                batch = replace(batch, parts=send_to_device(batch.parts, self.device, non_blocking=True))
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


def _begin_work(workers: Tensor, die_with_parent: Callable[[], None], number: int) -> None:
    """Make this process a worker that ends with the process it reads for, and never before."""
    # A signal to all processes of a job asks the run to save and stop, for which it needs its workers.
    ignore_stop_signals()
    die_with_parent()
    workers[number, 0] = os.getpid()
    _reopen_files()


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


def _keep(batch: Any) -> Any:
    return batch
