"""Exact evaluation over any number of processes."""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from mnist_dist.batches import Batch, deal, list_batches
from mnist_dist.config import Config
from mnist_dist.distributed import Group
from mnist_dist.errors import NotFiniteError, RunError, UserError
from mnist_dist.exchange import TreeSum
from mnist_dist.model import describe_dtype, is_finite
from mnist_dist.program import make_table
from mnist_dist.randomness import seed_generators, seeding_generators
from mnist_dist.reader import READING_RULE, Reader, Seeded, keep_split, read
from mnist_dist.record import is_measure, is_number
from mnist_dist.samples import digest, locate
from mnist_dist.source import describe_exception, explaining
from mnist_dist.task import Evaluation, Example, Row, Tally, Task
from mnist_dist.tier import keeping

_log = logging.getLogger(__name__)

_EXAMPLES = 100
_REHEARSED = 4  # samples
_MISTAKES = (AttributeError, KeyError, NameError, TypeError)
_TEXTS = ("does not require grad", "to unpack")


@torch.no_grad()
def evaluate(
    config: Config,
    model: nn.Module,
    reader: Reader,
    group: Group,
    moved: Collection[str] = (),
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """What `model` makes of the split that `reader` was opened on, and at most 100 examples, those with the highest scores.

    `model` is not DDP's: its forward pass would expect all ranks to have as many batches.
    Each batch finds the model as it was, and so does the caller: its buffers, and the parameters `moved`, which a forward pass may change.
    Each rank takes some parts of it; sums are reduced once, with shards along their tree, and the task divides them once. All ranks call
    `after_batch` equally often, which may raise what ends the evaluation early. Raises `RunError` unless exactly the split was counted,
    `UserError` where the task's code does not keep to the contract.
    """
    task = config.task
    dealt_to, mine = deal(config, group.rank, group.size)
    sums_of: dict[int, Tensor] = {}  # each part of this rank's that has a sample
    done, lengths = 0, set[int]()
    indices, scores, outputs = [], [], []
    rounds = max(group.gather(len(reader.loader)))
    with keeping(model, moved) as kept:
        model.eval()
        for number, batch in itertools.zip_longest(range(rounds), reader):
            if number:
                kept.put_back()
                after_batch()
            if batch is None:
                continue  # another rank has one more
            seed_generators(int(batch.indices[0]), group.device)
            [micro_batch] = batch.micro_batches
            with explaining(task.name, "in tally", RunError):
                tally = task.tally(model, micro_batch.samples)
            check_tally(task, tally, micro_batch.size)
            lengths.add(len(tally.sums))
            if len(lengths) > 1:
                raise RunError(_describe_lengths(task, lengths))
            part = micro_batch.places[0] % dealt_to
            sums_of[part] = sums_of.get(part, 0) + tally.sums
            done += micro_batch.size
            if tally.scores is not None and tally.outputs is not None:
                best = tally.scores.topk(min(_EXAMPLES, len(tally.scores))).indices
                indices.append(batch.indices.to(best.device)[best])
                scores.append(tally.scores[best])
                outputs.append(tally.outputs[best])
    sums = _add_up(config, sums_of, mine, group)
    count = len(reader)
    if not sums.isfinite().all():
        first = int((~sums.isfinite()).nonzero()[0])
        why = "the weights or their outputs are not finite numbers"
        if first > 1 and all(map(is_finite, model.parameters())):
            why = f"sum {first} of tally is the first; is it a ratio of one batch, such as 0/0? Ratios are for measure"
        raise NotFiniteError(f"the sums of the evaluation are not finite ({sums[:8].tolist()}): {why}")
    if round(float(sums[0])) != count:
        if (in_all := sum(group.gather(done))) != count:
            raise RunError(f"the evaluation read {in_all} {task.samples}, but the split has {count}: its ranks do not share it correctly")
        raise RunError(_describe_count(task, float(sums[0]), count))
    with explaining(task.name, "in measure"), seeding_generators(0):  # as for an interval that is found by drawing
        measures = task.measure(sums)
    if isinstance(measures, dict):  # one without a value, such as the precision where nothing was found, has none in the record
        measures = {name: value if name in ("loss", task.best) else _replace_unknown(value, None) for name, value in measures.items()}
    _check_measures(task, measures)
    # Only now, so that no batch waits for the device.
    examples: list[tuple[float, Example]] = []
    if indices:
        # Each batch may have outputs of another length.
        rows = zip(*(itertools.chain.from_iterable(some.tolist() for some in parts) for parts in (scores, indices, outputs)), strict=True)
        examples = _choose([(score, Example(place, output)) for score, place, output in rows if score >= 0])
    found = _choose([example for part in group.gather(examples) for example in part])
    return Evaluation(count, measures, [example for _, example in found], sums.tolist())


def _choose(examples: Sequence[tuple[float, Example]]) -> list[tuple[float, Example]]:
    return sorted(examples, key=lambda example: (-example[0], example[1].place))[:_EXAMPLES]


def _add_up(config: Config, sums_of: dict[int, Tensor], mine: range, group: Group) -> Tensor:
    """The sums over all parts, on the CPU; of a part that had no sample there are none."""
    sizes = {*itertools.chain(*group.gather([len(sums) for sums in sums_of.values()]))}
    if len(sizes) > 1:
        raise RunError(_describe_lengths(config.task, sizes))
    nothing = torch.zeros(max(sizes), dtype=torch.float64, device=group.device)

    def find(part: int) -> Tensor:
        return sums_of.get(part, nothing).clone()

    return (TreeSum(config.shards, group)(lambda part: [find(part)])[0] if config.shards else group.sum(find(mine[0]))).cpu()


def _describe_lengths(task: Task, lengths: Collection[int]) -> str:
    return f"task {task.name}: tally has {sorted(lengths)} sums for different batches; expected as many for each (bincount: minlength)"


def rehearse(config: Config, model: nn.Module, split: Any, group: Group, moved: Collection[str]) -> None:
    """Raise `UserError` for a mistake in the task's code that the first evaluation would find, maybe after hours: on a few samples."""
    task = config.task
    count = min(_REHEARSED, len(split))
    kept, batch = keep_split(split, config, "test", torch.device("cpu")), Batch.of(range(count), range(count))
    [micro_batch] = read(kept, batch)
    with torch.no_grad(), keeping(model, moved), _refusing_mistakes(task, group, count, "tally"):
        tally = task.tally(model.eval(), send_to_device(micro_batch.samples, group.device))
        check_tally(task, tally, count)
        if abs(float(tally.sums[0]) - count) > 0.5:
            raise UserError(_describe_count(task, float(tally.sums[0]), count))
        measures: Any = None
        with _refusing_mistakes(task, group, count, "measure", IndexError):
            measures = _replace_unknown(task.measure(tally.sums.cpu()), 0.0)
            _check_measures(task, measures)
        if measures is not None:  # so few samples may have no measures
            with _refusing_mistakes(task, group, count, "describe"):
                task.describe(measures)
            table: Any = None
            with _refusing_mistakes(task, group, count, "tabulate"):
                table = task.tabulate(measures)
            with _refusing_mistakes(task, group, count, "tabulate", ValueError):
                if table is not None:
                    make_table(*table)
    if isinstance(kept, Seeded):
        _check_reading(task, model, group, kept, batch, moved)


def _check_reading(task: Task, model: nn.Module, group: Group, kept: Seeded, batch: Batch, moved: Collection[str]) -> None:
    """Raise `UserError` where samples are others once `tally` has had them, for the second time: an object may keep what it finds."""
    [micro_batch] = read(kept, batch)
    before = digest(micro_batch.samples)
    with torch.no_grad(), keeping(model, moved), contextlib.suppress(Exception):
        task.tally(model.eval(), send_to_device(micro_batch.samples, group.device))
    [again] = read(kept, batch)
    if digest(again.samples) != before:
        raise UserError(
            f"task {task.name}: the first {micro_batch.size} samples of the {locate(kept.split, 'test')[0]} differ when they are read "
            f"again, after tally had them: none of __getitem__, collate and tally may change {READING_RULE}"
        )


def _describe_count(task: Task, counted: float, count: int) -> str:
    return (
        f"task {task.name}: the first of tally's sums counted {counted:.6g} {task.samples} in all, and {count} were evaluated; "
        "expected the number of samples in each batch"
    )


def describe(task: Task, measures: Row) -> str:
    """An evaluation in the task's own words; where it finds none, as for a measure without a value, in the usual ones."""
    try:
        return task.describe(measures)
    except Exception as error:
        _log.warning("task %s failed in describe: %s", task.name, describe_exception(error))
        return Task.describe(task, measures)


@contextlib.contextmanager
def _refusing_mistakes(task: Task, group: Group, count: int, what: str, *more: type[Exception]) -> Iterator[None]:
    """Raise `UserError` for a mistake that any samples would show. Any other is a warning: it may come of there being only `count`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, (*_MISTAKES, *more)) or any(text in str(error) for text in _TEXTS):
            raise UserError(f"task {task.name} failed in {what}: {describe_exception(error)}") from error
        if group.is_main:
            first, reason = f"the first {count} {task.samples}", describe_exception(error)
            _log.warning("task %s failed in %s on %s, maybe for there being so few: %s", task.name, what, first, reason)


def check_tally(task: Task, tally: Any, count: int) -> None:
    """Raise `UserError` unless `tally` is what the contract says, of `count` samples."""
    sums = tally.sums if isinstance(tally, Tally) else None
    if not isinstance(sums, Tensor) or sums.ndim != 1 or not len(sums) or sums.dtype != torch.float64:
        shown = f"{sums.dtype} {list(sums.shape)}" if isinstance(sums, Tensor) else type(tally).__name__
        raise UserError(f"task {task.name}: tally returned {shown}; expected mnist_dist.task.Tally of float64 sums [k], their number first")
    for name, values in (("scores", tally.scores), ("outputs", tally.outputs)):
        if values is not None and (not isinstance(values, Tensor) or not values.ndim or len(values) != count):
            raise UserError(f"task {task.name}: the {name} of tally must be a tensor of {count} rows, one for each sample of the batch")
    has_examples = tally.scores is not None and tally.outputs is not None
    if has_examples and (tally.scores.dtype == torch.bool or tally.scores.is_complex()):
        raise UserError(f"task {task.name}: the scores of tally are {describe_dtype(tally.scores.dtype)}; expected numbers with an order")
    if tally.scores is not None and tally.scores.ndim != 1:
        raise UserError(f"task {task.name}: the scores of tally have shape {list(tally.scores.shape)}; expected one number for each sample")


def _check_measures(task: Task, measures: Any) -> None:
    entries, needed = measures if isinstance(measures, dict) else {}, dict.fromkeys(("loss", task.best))
    flaws = [f"it lacks {name}" for name in dict.fromkeys((*needed, *(task.in_rows or ()))) if name not in entries]
    # What passes here is read back without a complaint.
    flaws += [
        f"{name} is {value!r:.80}"
        for name, value in entries.items()
        if not isinstance(name, str) or not is_measure(value, name) or (name in needed and not is_number(value))
    ]
    if flaws:
        raise UserError(
            f"task {task.name}: measure must return numbers (an accuracy is from 0 to 1) or lists of them by their names, "
            f"with {' and '.join(needed)} among them; {flaws[0]}"
        )


def _replace_unknown(value: Any, by: float | None) -> Any:
    """The same measures with `by` in the place of each that is None or no finite number, as where too few samples were counted."""
    if isinstance(value, dict):
        return {name: _replace_unknown(entry, by) for name, entry in value.items()}
    if isinstance(value, list):
        return [_replace_unknown(entry, by) for entry in value]
    return by if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def open_evaluation(split: Any, config: Config, group: Group, what: str = "test") -> Reader:
    """A reader of this rank's parts of a split, for `evaluate`. To be closed, as in a `with` statement."""
    return Reader(split, config, group, what, list_batches(len(split), *deal(config, group.rank, group.size), config))
