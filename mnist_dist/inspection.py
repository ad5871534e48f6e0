"""What the ranks of a short run compute, compared with each other and with a recorded run, so that the rank that is wrong is named.

Before the first step every rank computes the gradients of the same whole batches, alone. In the steps it notes which samples it took and
what the loss of each was; now and then the ranks compare their weights. What they tell each other is small in worlds of any size: hashes,
and sketches of 61 numbers, whose differences are as long as those of the vectors that they stand for, within a fifth or so.
"""

import contextlib
import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import mul
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from mnist_dist.batches import Batch, StepSampler
from mnist_dist.config import Config, make_config
from mnist_dist.distributed import Group
from mnist_dist.errors import RunError, UserError
from mnist_dist.finding import Finding
from mnist_dist.machine import describe_arithmetic
from mnist_dist.randomness import derive_seed, make_generator, seed_generators
from mnist_dist.reference import BATCHES, SKETCH, Reference, Sketch, name_source
from mnist_dist.source import explaining
from mnist_dist.state import TrainingState
from mnist_dist.task import Task
from mnist_dist.tier import keeping
from mnist_dist.witness import read_batch
from mnist_dist.world import find_host

GRADIENT_TOLERANCE = 1e-5  # of the gradient's norm
CURVE_TOLERANCE = 1e-4  # of the loss of a step
SAMPLE_TOLERANCE = 1e-3  # of the same, for the loss of one sample
WEIGHT_TOLERANCE = 1e-5  # of the norm of the weights, between machines of different kinds
EXCHANGE_TOLERANCE = 1e-3  # of the norm of the gradient that the ranks exchanged
_BATCH_MAX = 8  # samples of each
_PERTURBATION = 1e-6  # of each weight
_ROUNDINGS_ALLOWED = 5
_WEIGHTS_EVERY = 10  # steps
_CHUNK = 1 << 20  # numbers of a tensor that are on the CPU at once
_APART = 30  # times as far off as the others is a rank that went wrong alone: what all share, they show by less unlike amounts
_SHOWN = 8
_ADVICE = "this machine or this world does not train right: run it on one process, then on one host, to see where it begins"


class Fingerprint(NamedTuple):
    """What stands for some tensors: the beginning of the SHA-256 of their bits, and their sketch."""

    bits: str
    sketch: Sketch


class Rank(NamedTuple):
    """What one rank tells the others of itself before the first step."""

    host: str
    device: str
    kind: str  # ranks of the same kind round alike
    data: str
    gradients: list[Fingerprint]


class Steps(NamedTuple):
    """What one rank tells the others of its steps at the end."""

    losses: list[float]  # of each step, the sum over the rank's own samples
    counts: list[int]  # of each step, how many these were
    differences: list[float]  # of each step, the largest between the loss of one of them and the recorded one
    strange: str  # the first step in which a sample is not the one that belongs there, in words


@dataclass
class _Flaws:
    """What is wrong with the steps of a run, in words; what to do about it; the ranks that it can be put down to; and numbers."""

    values: dict[str, Any]
    reasons: list[str] = field(default_factory=list)
    next_steps: list[str] = field(default_factory=list)
    ranks: set[int] = field(default_factory=set)

    def add(self, reason: str, next_step: str = "", ranks: Iterable[int] = ()) -> None:
        """One more."""
        self.reasons.append(reason)
        self.next_steps += [next_step] if next_step else []
        self.ranks |= {*ranks}


def take_fingerprint(tensors: Iterable[Tensor]) -> Fingerprint:
    """The fingerprint of float tensors. A sketch is linear: that of a difference is the difference of two."""
    hashed, total = hashlib.sha256(), torch.zeros(SKETCH, dtype=torch.float64)
    for number, tensor in enumerate(tensors):
        for part, piece in enumerate(torch.split(tensor.detach().reshape(-1), _CHUNK)):
            numbers = piece.cpu()
            hashed.update(numbers.numpy().tobytes())
            # Each number, with a sign drawn for its place, is added to one of the sketch.
            signs = torch.randint(0, 2, numbers.shape, generator=make_generator(number, "sketch", part), dtype=torch.int8)
            padded = torch.zeros(-(-len(numbers) // SKETCH) * SKETCH, dtype=torch.float64)
            padded[: len(numbers)] = numbers.double() * (2 * signs - 1)
            total += padded.view(-1, SKETCH).sum(0)
    return Fingerprint(hashed.hexdigest()[:16], [float(f"{value:.9g}") for value in total.tolist()])


def measure_distance(one: Sketch, other: Sketch) -> float:
    """How far one vector is from another, in parts of the other's norm. Infinite where either is not finite."""
    distance = math.dist(one, other) / max(math.hypot(*other), 1e-30)
    return distance if math.isfinite(distance) else math.inf


def watch_losses(task: type[Task], noted: list[Tensor]) -> type[Task]:
    """The same task, which notes the losses of all samples that are trained on."""

    class Watched(task):  # type: ignore[valid-type, misc]
        def losses(self, model: Any, batch: Any, drawn: Any) -> Tensor:
            found: Tensor = super().losses(model, batch, drawn)
            if isinstance(found, Tensor) and model.training:
                noted.append(found.detach())
            return found

    return Watched


class Inspection:
    """Looks at a run while it trains, on every rank alike; `findings` has what it found, and `values` what a reference records."""

    def __init__(self, config: Config, reference: Reference | None, report: Callable[[Finding], None]) -> None:
        self.noted: list[Tensor] = []
        self.config = make_config(config.values(), task=watch_losses(type(config.task), self.noted))
        self.reference = reference
        self.findings: list[Finding] = []
        self._report = report
        self.values: dict[str, Any] = {}
        self.ranks: list[Rank] = []
        self._weights: dict[str, Sketch] = {}
        self._first_gradient: Sketch = []
        self._parting: tuple[int, list[Fingerprint]] | None = None  # the step after which the weights of two ranks differ

    def take_turns(self, batches: Iterable[Batch], state: TrainingState) -> Iterator[Batch]:
        """Hand on the batches of a run, and look at what comes of them."""
        group, self.config = state.group, state.config  # with what is known of the data
        if self.reference is not None:
            _check_start(self.reference, state)
        self._compare_gradients(state)
        expected = iter(StepSampler(state.data.train, self.config.model_copy(update={"shards": None}), 0, 1, 0))
        losses: list[Tensor] = []
        places: list[list[int]] = []
        strange = ""
        for step, batch in enumerate(batches, start=1):
            if batch.step != step - 1:
                raise RunError(
                    f"{self._name([group.rank])} got the samples of step {batch.step + 1} in step {step}: is its loader sharded twice?"
                )
            own = batch.places
            strange = strange or _find_strange(batch, own, next(expected).indices)
            self.noted.clear()
            yield batch
            losses.append(torch.cat(self.noted))
            places.append(own)
            if step == 1:
                self._first_gradient = self._sketch_gradient(state)
            if step in (1, state.config.total_steps) or step % _WEIGHTS_EVERY == 0:
                self._compare_weights(state, step)
        self._judge(group, [loss.double().cpu() for loss in losses], places, strange)

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self._report(finding)

    # The gradients of the same batches.

    def _compare_gradients(self, state: TrainingState) -> None:
        group, size = state.group, min(self.config.batch_size, _BATCH_MAX)
        config = self.config.model_copy(update={"batch_size": size, "shards": None, "steps": None, "epochs": BATCHES})
        prints = [take_fingerprint(_compute_gradient(config, state, step % config.total_steps)) for step in range(BATCHES)]
        device = str(group.device) if group.device.type == "cuda" else "cpu"
        kind = describe_arithmetic(group.device)
        self.ranks = group.gather(Rank(find_host(), device, kind, state.fingerprint, prints))
        if self.reference is not None:
            rounding = self.reference.rounding
        else:
            with _perturbing(state.bare_model):
                moved = [take_fingerprint(_compute_gradient(config, state, step % config.total_steps)) for step in range(BATCHES)]
            rounding = statistics.median(measure_distance(one.sketch, other.sketch) for one, other in zip(moved, prints, strict=True))
        self._add(compare_gradients(self.ranks, self.reference, rounding))
        self.values |= {
            "task": self.config.task.short_name,
            "source": name_source(self.config),
            "options": self.config.recipe(),
            "data": state.fingerprint,
            "made_on": {"processes": group.size, "device": group.device.type, "machine": kind},
            "any_world": state.tier.is_any_world,
            "rounding": rounding,
            "gradients": [one.sketch for one in prints],
        }

    # The steps.

    def _sketch_gradient(self, state: TrainingState) -> Sketch:
        return take_fingerprint(parameter.grad for parameter in state.bare_model.parameters() if parameter.grad is not None).sketch

    def _compare_weights(self, state: TrainingState, step: int) -> None:
        mine = take_fingerprint(parameter for parameter in state.bare_model.parameters() if parameter.requires_grad)
        self._weights[str(step)] = mine.sketch
        if self._parting is None and len({*state.group.gather(mine.bits)}) > 1:
            self._parting = step, state.group.gather(mine)

    def _judge(self, group: Group, losses: list[Tensor], places: list[list[int]], strange: str) -> None:
        rows = [row.tolist() for row in losses]
        differences = _measure_losses(losses, places, self.reference)
        steps = group.gather(Steps([math.fsum(row) for row in rows], [len(row) for row in rows], differences, strange))
        size = self.config.batch_size
        means = [math.fsum(one.losses[step] for one in steps) / size for step in range(len(rows))]
        self._add(self._judge_curve(steps, means))
        self.values |= {"first_gradient": self._first_gradient, "weights": self._weights, "losses": means}
        if self.reference is None:  # rank zero writes it: of all samples, in the order of the batch
            table = torch.zeros(len(rows), size, dtype=torch.float64)
            for row, places_of, values in zip(table, places, losses, strict=True):
                if len(places_of) == len(values):
                    row[places_of] = values
            if group.size > 1:
                torch.distributed.all_reduce(table, group=group.control)
            self.values["samples"] = [[float(f"{value:.7g}") for value in row] for row in table.tolist()]

    def _judge_curve(self, steps: list[Steps], means: list[float]) -> Finding:
        """What the steps of all ranks show, and the mean loss of each step."""
        flaws = _Flaws(values={"steps": len(means), "world_size": len(steps)})
        text = f"{len(means)} steps on {len(steps)} process{'es' * (len(steps) > 1)}"
        if self.reference is not None:
            text += self._compare_means(flaws, means)
            flaws.values["sample_difference"] = _keep_finite(max(max(one.differences) for one in steps))
        by_loader = self._compare_places(flaws, steps)
        parted = next((step for step in range(len(means)) if any(one.differences[step] > SAMPLE_TOLERANCE for one in steps)), None)
        began_wrong = bool(flaws.next_steps) or parted == 0  # and so is what was exchanged
        exchange = "" if began_wrong else self._describe_exchange()
        if parted is not None:
            self._compare_samples(flaws, parted + 1, [one.differences[parted] for one in steps], bool(exchange))
        if exchange:
            flaws.add(
                exchange, "look at what averages the gradients: communication hooks, Accelerate's settings, the library of collectives"
            )
        if self._parting is not None:
            ranks, reason = self._describe_weights(*self._parting)
            if reason:
                flaws.add(reason, "", ranks)
                flaws.values |= {"weights_step": self._parting[0], "weights_ranks": sorted(ranks)[:64]}
        if not flaws.reasons:
            return Finding("curve", "ok", text, "", flaws.values)
        if by_host := flaws.ranks - by_loader:  # a loader is no fault of a host
            flaws.next_steps.append(advise(by_host, self.ranks))
        flaws.values["ranks"] = sorted(flaws.ranks)[:64]
        return Finding("curve", "WRONG", "; ".join(flaws.reasons), "; ".join(flaws.next_steps) or _ADVICE, flaws.values)

    def _compare_means(self, flaws: _Flaws, means: list[float]) -> str:
        """Compare the loss of each step with the recorded one; how far off the farthest is, in words."""
        assert self.reference is not None
        recorded = self.reference.losses
        scales = [statistics.fmean(map(abs, row)) for row in self.reference.samples]
        differences = [abs(mean - expected) / max(scale, 1e-30) for mean, expected, scale in zip(means, recorded, scales, strict=True)]
        worst = max(differences)
        flaws.values |= {"difference": _keep_finite(worst), "allowed": CURVE_TOLERANCE}
        wrong = next((step for step, one in enumerate(differences) if not one <= CURVE_TOLERANCE), None)
        if wrong is not None:
            flaws.values["step"] = wrong + 1
            flaws.add(
                f"the loss of step {wrong + 1} is {means[wrong]:.6f}, the recorded one {recorded[wrong]:.6f}: a relative difference of "
                f"{differences[wrong]:.1e}, allowed {CURVE_TOLERANCE:.0e}"
            )
        return f", at most {worst:.1e} from the recorded losses (allowed {CURVE_TOLERANCE:.0e})"

    def _compare_places(self, flaws: _Flaws, steps: list[Steps]) -> set[int]:
        """Look whether each rank took the samples of its place, and all together a batch; the ranks that took others."""
        size = self.config.batch_size
        counts = [sum(of_step) for of_step in zip(*(one.counts for one in steps), strict=True)]
        wrong = next((step for step, seen in enumerate(counts) if seen != size), None)
        if wrong is not None:
            flaws.add(
                f"in step {wrong + 1} the ranks took {counts[wrong]} samples together, and a batch has {size}",
                "look for a loader that is sharded twice, or not at all",
            )
        odd = [rank for rank, one in enumerate(steps) if one.strange]
        if odd:
            which = "each rank" if len(odd) == len(steps) > 1 else self._name(odd)
            flaws.add(
                f"{which} took other samples than belong to its place: {steps[odd[0]].strange}",
                "look for a loader that is sharded twice, or data that are shifted",
                odd if len(odd) < len(steps) else (),
            )
        return {*odd}

    def _compare_samples(self, flaws: _Flaws, step: int, off: list[float], is_exchange_wrong: bool) -> None:
        """Name the ranks whose samples were the first to be off, in this step by so much, where they are not all off alike."""
        first_ones = [rank for rank, one in enumerate(off) if one > SAMPLE_TOLERANCE]
        by = max(off)
        flaws.values |= {"parted_step": step, "parted_ranks": first_ones[:64]}
        rest = [one for rank, one in enumerate(off) if rank not in first_ones]
        alike = not rest or is_exchange_wrong or by < _APART * statistics.median(rest)
        who = ("all ranks" if len(off) > 1 else self._name([0])) if alike else self._name(first_ones)
        flaws.add(
            f"{who} went wrong {'' if alike else 'first, '}in step {step}: the loss of a sample is off by {by:.1e} of the mean",
            "their samples, or what is drawn for them, are not those recorded: compare the data and the code" * (alike and step == 1),
            () if alike else first_ones,
        )

    def _describe_exchange(self) -> str:
        """How the gradient that the ranks exchanged in step 1 differs from the recorded one; nothing where it does not."""
        if self.reference is None:
            return ""
        expected = self.reference.first_gradient
        off = measure_distance(self._first_gradient, expected)
        if off <= EXCHANGE_TOLERANCE:
            return ""
        factor = math.fsum(map(mul, self._first_gradient, expected)) / max(math.hypot(*expected) ** 2, 1e-30)
        rest = measure_distance(self._first_gradient, [factor * value for value in expected])
        if rest <= EXCHANGE_TOLERANCE:
            return (
                f"the gradient that the ranks exchanged in step 1 is {factor:.4f} times the recorded one: is it a sum in place of a mean?"
            )
        return f"the gradient that the ranks exchanged in step 1 is off by {off:.1e} of its norm"

    def _describe_weights(self, step: int, prints: list[Fingerprint]) -> tuple[set[int], str]:
        """Which ranks have other weights than the rest, and how far off these are; no word where rounding explains it."""
        most, count = Counter(one.bits for one in prints).most_common(1)[0]
        usual = next(one.sketch for one in prints if one.bits == most)
        off = {rank: measure_distance(one.sketch, usual) for rank, one in enumerate(prints) if one.bits != most}
        if len({rank.kind for rank in self.ranks}) > 1 and all(one <= WEIGHT_TOLERANCE for one in off.values()):
            return set(), ""
        by = max(off.values())
        if 2 * count > len(prints):
            return {*off}, f"{self._name(off)} had other weights than the rest after step {step}, off by {by:.1e} of their norm"
        recorded = self.reference.weights.get(str(step)) if self.reference is not None else None
        if recorded is not None:
            far = [measure_distance(one.sketch, recorded) for one in prints]
            near = min(far)
            named = [rank for rank, one in enumerate(far) if not one <= 3 * near + 1e-12]
            if named and not all(one <= WEIGHT_TOLERANCE for one in far):
                return {
                    *named
                }, f"{self._name(named)} had other weights than recorded after step {step}, off by {max(far):.1e} of their norm"
        return set(), (
            f"the weights of {self._name(range(len(prints)))} differed after step {step}, by {by:.1e} of their norm; which are wrong "
            "is not known"
        )

    def _name(self, ranks: Iterable[int]) -> str:
        return describe_ranks(ranks, self.ranks)


def _keep_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def describe_ranks(ranks: Iterable[int], known: Sequence[Rank]) -> str:
    """Ranks in words: `rank 1 on host a (cpu, AMD EPYC ...)`."""
    ordered = sorted(ranks)
    words = [f"rank {rank} on host {known[rank].host} ({known[rank].device}, {known[rank].kind})" for rank in ordered[:_SHOWN]]
    return ", ".join(words) + (f" and {len(ordered) - _SHOWN} more ranks" if len(ordered) > _SHOWN else "")


def advise(ranks: Iterable[int], known: Sequence[Rank]) -> str:
    """What to do about ranks that are wrong."""
    hosts = sorted({known[rank].host for rank in ranks})
    shown = ",".join(hosts[:_SHOWN]) + (",..." if len(hosts) > _SHOWN else "")
    return f"start without {shown} (srun --exclude); if the rest is ok then, have its memory, processor and GPU tested"


def compare_gradients(ranks: Sequence[Rank], reference: Reference | None, rounding: float) -> Finding:
    """Which ranks compute other gradients of the same batches than were recorded, or than the rest.

    `rounding`: how far, in parts of its norm, a gradient moves by rounding. Where it decides between two sides of a kink, as in a ReLU, the
    gradient of a batch moves a thousand times as far. So ranks that may round in different ways are compared by the median over the
    batches, and ranks of the same kind, which round alike, by the worst batch.
    """
    allowed = max(GRADIENT_TOLERANCE, _ROUNDINGS_ALLOWED * rounding)
    centre = [
        [
            statistics.median(value if math.isfinite(value) else math.inf for value in column)
            for column in zip(*(rank.gradients[batch].sketch for rank in ranks), strict=True)
        ]
        for batch in range(len(ranks[0].gradients))
    ]
    among = _measure_all(ranks, centre)
    far = among if reference is None else _measure_all(ranks, reference.gradients)
    what = "the median of the ranks" if reference is None else "the recorded gradients"
    wrong = {rank: off for rank, off in enumerate(far) if off > allowed}
    if len(wrong) == len(ranks) > 2:  # do some of them differ from the rest as well?
        wrong = {rank: far[rank] for rank, off in enumerate(among) if off > allowed} or wrong
    apart, unsure = _compare_alike(ranks)
    wrong |= {rank: off for rank, off in apart.items() if off > GRADIENT_TOLERANCE and far[rank] <= allowed}
    if not {*wrong} & {*unsure}:
        wrong |= {rank: off for rank, off in unsure.items() if off > GRADIENT_TOLERANCE}
    is_unknown = len(wrong) == len(ranks) or {*wrong} == {*unsure}
    odd_data = [rank for rank, one in enumerate(ranks) if one.data != (reference.data if reference is not None else _find_usual(ranks))]
    values: dict[str, Any] = {"batches": len(centre), "world_size": len(ranks), "allowed": allowed, "difference": _keep_finite(max(far))}
    text = f"{len(centre)} batches on {len(ranks)} rank{'s' * (len(ranks) > 1)}"
    tail = f"of the gradient's norm away from {what} (allowed {allowed:.0e})"
    if wrong:
        values["ranks"] = sorted(wrong)[:64]
        worst = max(wrong, key=lambda rank: wrong[rank])
        parts = [f"{describe_ranks([worst], ranks)} is {wrong[worst]:.1e} {tail if far[worst] > allowed else 'off'}"]
        if rest := {*wrong} - {worst}:
            parts.append(f"so {'is' if len(rest) == 1 else 'are'} {describe_ranks(rest, ranks)}, at least {min(wrong.values()):.1e}")
        if right := [off for rank, off in enumerate(far) if rank not in wrong]:
            parts.append(f"the other {len(right)} rank{'s' * (len(right) > 1)} at most {max(right):.1e}")
        if odd_data:
            parts.append(f"other data are on {describe_ranks(odd_data, ranks)}")
        if {*wrong} <= {*odd_data}:
            next_step = "give all hosts the same data, then run verify again"
        elif not is_unknown:
            next_step = advise(wrong, ranks)
        elif reference is not None and len(ranks) == len(wrong):
            made = ", ".join(f"{name} {value}" for name, value in reference.made_on.items())
            next_step = f"all ranks are wrong: compare the versions, the code and the machine with those of the record ({made})"
        else:
            next_step = "which of these ranks is wrong is not known: start with each of them alone"
        return Finding("gradients", "WRONG", "; ".join(parts), next_step, values)
    if len({_list_bits(rank) for rank in ranks}) == 1 < len(ranks):
        text += ", the same bits on all"
    if reference is not None or len(ranks) > 1:
        text += f", at most {max(far):.1e} {tail}"
    if strange := {**apart, **unsure}:
        values["ranks"] = sorted(strange)[:64]
        text += f"; {describe_ranks(strange, ranks)}: other bits than ranks of the same kind, off by {max(strange.values()):.1e}"
        return Finding("gradients", "WARN", text, f"run verify again: if the same rank differs, {advise(strange, ranks)}", values)
    return Finding("gradients", "ok", text, "", values)


def _measure_all(ranks: Sequence[Rank], expected: Sequence[Sketch]) -> list[float]:
    """For each rank the median over the batches of how far its gradient is from the expected one."""
    return [
        statistics.median(measure_distance(one.sketch, other) for one, other in zip(rank.gradients, expected, strict=True))
        for rank in ranks
    ]


def _list_bits(rank: Rank) -> tuple[str, ...]:
    return tuple(one.bits for one in rank.gradients)


def _find_usual(ranks: Sequence[Rank]) -> str:
    return Counter(rank.data for rank in ranks).most_common(1)[0][0]


def _compare_alike(ranks: Sequence[Rank]) -> tuple[dict[int, float], dict[int, float]]:
    """The ranks whose gradients are not the bits of most ranks of the same kind, and how far off their worst batch is.

    And those of kinds in which no bits have a majority, so that nobody knows which ranks are wrong.
    """
    apart: dict[int, float] = {}
    unsure: dict[int, float] = {}
    for kind in {rank.kind for rank in ranks}:
        alike = {index: rank for index, rank in enumerate(ranks) if rank.kind == kind}
        usual, count = Counter(map(_list_bits, alike.values())).most_common(1)[0]
        sketches = next(rank.gradients for rank in alike.values() if _list_bits(rank) == usual)
        off = {
            index: max(measure_distance(one.sketch, other.sketch) for one, other in zip(rank.gradients, sketches, strict=True))
            for index, rank in alike.items()
            if _list_bits(rank) != usual
        }
        if 2 * count > len(alike):
            apart |= off
        elif off:
            unsure |= dict.fromkeys(alike, max(off.values()))
    return apart, unsure


@contextlib.contextmanager
def _perturbing(model: nn.Module) -> Iterator[None]:
    """Move each weight by some units in its last place, as rounding moves what comes of it; and back."""
    with keeping(model):
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                noise = torch.randn(parameter.shape, generator=make_generator(number, "perturbation"))
                parameter.mul_(1 + _PERTURBATION * noise.to(parameter.device))
        yield


def _compute_gradient(config: Config, state: TrainingState, step: int) -> list[Tensor]:
    """The gradient of a whole batch, computed by this process alone, with the weights as they are; they stay so."""
    task, device = config.task, state.group.device
    micro_batches = send_to_device(read_batch(config, state.data, step), device)
    with keeping(state.bare_model), explaining(task.name, "in the gradients of a batch", RunError):
        seed_generators(derive_seed(config.seed, "gradients", step), device)
        return state.compute_gradients(micro_batches, config.batch_size)[0]


def _check_start(reference: Reference, state: TrainingState) -> None:
    """Raise `UserError` where this start cannot give what was recorded, however right it is."""
    size, device = state.group.size, state.group.device.type
    if not state.tier.is_any_world:
        made = reference.made_on
        if state.tree is None and size != made.get("processes"):
            raise UserError(
                f"the reference was recorded on {made.get('processes')} processes, and this start has {size}; a step of this task is the "
                f"same only there, because {state.tier.reason}: start as many, or record with --shards"
            )
        if device != made.get("device"):
            raise UserError(
                f"the reference was recorded on {made.get('device')}, and this start is on {device}, where a model draws other random "
                f"numbers ({state.tier.reason}): record there"
            )
    if len({*state.group.gather(state.fingerprint)}) == 1 and state.fingerprint != reference.data:
        raise UserError(
            f"the reference was recorded on other data (their hash is {reference.data}, here {state.fingerprint}): use the same"
        )
    if state.config.total_steps != len(reference.losses) or len(reference.samples[0]) != state.config.batch_size:
        raise UserError(
            f"the reference has {len(reference.losses)} steps of {len(reference.samples[0])} samples, and this run "
            f"{state.config.total_steps} of {state.config.batch_size}"
        )


def _find_strange(batch: Batch, places: list[int], expected: Tensor) -> str:
    if len(places) != len(batch.indices):
        return f"in step {batch.step + 1} it had {len(batch.indices)} samples for {len(places)} places"
    right = expected[places]
    wrong = (batch.indices.cpu() != right).nonzero().flatten().tolist()
    if not wrong:
        return ""
    first = wrong[0]
    return (
        f"in step {batch.step + 1} {len(wrong)} of {len(places)}, the first of them sample {int(batch.indices[first])} in place of "
        f"{int(right[first])}"
    )


def _measure_losses(losses: list[Tensor], places: list[list[int]], reference: Reference | None) -> list[float]:
    """Of each step, the largest difference between the loss of a sample and the recorded one, in parts of the mean of these."""
    differences = [0.0] * len(losses)
    for step, (row, own) in enumerate(zip(losses, places, strict=True)):
        if reference is not None and len(row) == len(own) and own:
            expected = torch.tensor(reference.samples[step], dtype=torch.float64)
            off = float((row - expected[own]).abs().max()) / max(float(expected.abs().mean()), 1e-30)
            differences[step] = off if math.isfinite(off) else math.inf
    return differences
