"""The checks of `python -m mnist_dist.check`: each returns what it found in a few words, or raises what is wrong and what to do."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import Dataset

from mnist_dist import checkpoint
from mnist_dist.config import Config
from mnist_dist.data import load_data
from mnist_dist.errors import RunError, UserError
from mnist_dist.evaluation import check_tally
from mnist_dist.examination import STEPS, Broken, Ranks, Subject
from mnist_dist.files import write_atomically
from mnist_dist.machine import on_one_thread
from mnist_dist.model import build_model, describe_order
from mnist_dist.randomness import read_generators
from mnist_dist.reader import read_on
from mnist_dist.samples import find_immovable, take_samples
from mnist_dist.source import describe_exception, explaining
from mnist_dist.task import Row
from mnist_dist.tier import (
    Trace,
    check_losses,
    compute_many,
    describe_flaw,
    describe_unused,
    find_first_difference,
    find_gradients,
    find_size,
    is_close,
    is_mixing,
    keeping,
    list_unused,
)
from mnist_dist.weights import encode_weights
from mnist_dist.witness import build, digest, digest_data, digest_each, list_shapes, read_batch, take_step
from mnist_dist.world import World, choose_threads

_KILLED_AT, _SAVED_AT = 3, 2
_SUMMED = 12  # samples whose sums are compared with other weights
_MOVED = "with weights that were moved"
_MOVES = 6
_SHIFT = 5.0  # of a bias
_SIZE_OF_ZEROS = 0.1  # of a parameter that begins as zeros
_MOVED_TOLERANCE = 1e-3  # a number that is nearly another one counts differently by rounding alone
_TOLERANCE = 1e-4  # of losses, weights and sums: rounding alone makes 1e-7 to 1e-5
_MEASURED = 101  # samples by which the time of an evaluation is known
_TRIED_STEPS, _TRIED_S = 3, 10.0
_GRACE_S = 30
# Layers that a rule exempts, and that compute each row by itself once they are in evaluation mode.
_EXEMPT = (_BatchNorm, _DropoutNd, nn.MultiheadAttention, nn.RNNBase)
_SUMS = "sums must be added up over the samples, each sample for itself, their number first"
_SEEDED = "draw from the generators of torch, numpy and random, which are seeded before; the time or a generator of its own is not"


class Answer(NamedTuple):
    """What a check found, and its numbers for --json."""

    passed: bool
    text: str
    values: Row = {}  # noqa: RUF012  read, never written


def examine(config: Config, names: Sequence[str], deadline_s: float) -> Generator[tuple[str, Answer]]:
    """Make some checks, in this order. Raises `UserError` where there is nothing to check: the data or the model cannot be had."""
    config = config.replace(world_size=None, cuda_graph=False)  # the numbers of processes are the checks' own
    if {*names} & {"two processes", "evaluation", "resume"}:
        config.check_world(2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_one_thread())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mnist_dist_check_", ignore_cleanup_errors=True))
        subject = Subject(config, Path(folder), deadline_s, stack, names)
        known: dict[str, str] = {}
        flaw = describe_flaw(subject.probe)
        for name in names:
            answer = Answer(False, flaw) if flaw else _answer(_CHECKS[name], subject)
            first = known.setdefault(answer.text, name)
            yield name, answer if answer.passed or first == name else answer._replace(text=f"for the same reason as {first}")


def _answer(check: "Callable[[Subject], Found]", subject: Subject) -> Answer:
    try:
        return Answer(True, *check(subject))
    except (Broken, UserError, RunError) as error:
        return Answer(False, " ".join(str(error).split()))
    except Exception as error:
        return Answer(False, f"the code of the task failed: {describe_exception(error)}")


@contextlib.contextmanager
def _calming(model: nn.Module) -> Iterator[None]:
    """Training mode, but for the layers that may be random or see the batch."""
    with keeping(model):
        for module in model.modules():
            if isinstance(module, _EXEMPT):
                module.eval()
        yield


Found = tuple[str, Row]


def _check_losses(subject: Subject) -> Found:
    task, probe = subject.task, subject.probe
    with _calming(subject.model):
        whole = subject.trace(probe.whole)
        check_losses(task, whole.losses, probe.whole.size)
        # Such is the share of a rank where the batch has one sample for each.
        check_losses(task, subject.trace(probe.take([0])).losses, 1)
        if drew := (probe.collate_draws and "collate") or whole.drew:
            return f"one for each sample, finite; their order is not compared: {drew} draws random numbers", {}
        order = [*probe.whole.places[-1:], *probe.whole.places[:-1]]
        other = subject.trace(probe.take(order))
        if not is_close(whole.losses[order], other.losses):
            _check_repeat(subject)  # of which this would come
            raise Broken("the losses do not move with the samples: loss i must be that of sample i and of row i of what is drawn")
    return "one for each sample, finite, in the order of the samples", {}


def _check_rows(subject: Subject) -> Found:
    probe = subject.probe
    half = probe.whole.places[: probe.whole.size // 2]
    if probe.collate_draws:
        return "not compared: collate draws other random numbers for other samples", {}
    with _calming(subject.model):
        whole = subject.trace(probe.whole)
        check_losses(subject.task, whole.losses, probe.whole.size)
        if whole.drew is None:
            where = find_first_difference(whole, subject.trace(probe.take(half)))
            if where is None:
                subject.put_back()
                many = compute_many(subject.task, subject.model, probe, find_size(probe, whole))
                subject.put_back()
                where = "the losses" if is_mixing(subject.task, subject.model, probe, many.losses) else None
        else:
            # The same numbers are drawn only for tensors of the same shapes; samples that are padded to the longest need it among them.
            others = [subject.trace(probe.take([*half, *[place] * len(half)])) for place in probe.whole.places[len(half) :]]
            others = [other for other in others if _list_forms(other) == _list_forms(whole)]
            if not others:
                return f"not compared: {whole.drew} draws other random numbers for other samples", {}
            where = None if any(is_close(whole.losses[: len(half)], other.losses[: len(half)]) for other in others) else "the losses"
    modules = dict(subject.model.named_modules())
    known = [f"{name} ({type(module).__name__})" for name, module in modules.items() if isinstance(module, _BatchNorm)]
    if where is not None and where not in known:
        _check_repeat(subject)  # of which this would come
        raise Broken(
            f"in {where} the samples of a batch see each other: compute each sample's output and loss from its own row alone; is there a "
            "mean over the batch, or a shape that mixes its rows? Where it is meant, as in a contrastive loss: --skip rows"
        )
    return (f"this world: {known[0]} sees the whole batch, nothing else does" if known else "no sample sees another one"), {}


def _list_forms(trace: Trace) -> list[torch.Size]:
    return [output.shape for _, output in trace.outputs]


def _check_tier(subject: Subject) -> Found:
    text = subject.tier.describe(subject.config.shards)
    if not subject.tier.repeats:
        raise Broken(text)
    return text, {"tier": subject.tier.name, "reason": subject.tier.reason}


def _check_repeat(subject: Subject) -> Found:
    task, config, model = subject.task, subject.small, subject.model
    first, second = (task.draw(config.seed, 1, config.batch_size) for _ in range(2))
    if digest(first) != digest(second):
        raise Broken("draw gives other numbers for the same seed and step: make them by a generator that is seeded with both")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    passes = []
    for _ in range(2):
        [micro_batch] = read_batch(config, subject.data, 0)
        with keeping(model):
            seen = subject.trace(micro_batch)
            gradients = torch.autograd.grad(seen.losses.sum(), list(trained.values()), allow_unused=True)
        named = [(f"the gradient of {name}", gradient) for name, gradient in zip(trained, gradients, strict=True)]
        passes.append([*seen.outputs, ("the losses", seen.losses), *named])
    for (name, one), (_, other) in zip(*passes, strict=False):
        if digest(one) != digest(other):
            raise Broken(f"{name} differs between two passes with the same seed and weights: {_SEEDED}; and keep no count in the model")
    return f"{len(passes[0])} outputs and gradients are the same bits twice", {}


def _check_gradients(subject: Subject) -> Found:
    config, model = subject.config.model_copy(update={"micro_batch": None}), subject.model
    config.check_world(2)
    begun_s, tried, seldom = time.monotonic(), 0, set[str]()
    for step in range(_TRIED_STEPS):
        for rank in range(2):
            [micro_batch] = read_batch(config, subject.data, step, rank, 2)
            with keeping(model):
                losses = subject.trace(micro_batch).losses
                check_losses(subject.task, losses, micro_batch.size)
                unused = list_unused(find_gradients(subject.task, model, losses))
            if unused and config.shards is None:
                raise Broken(f"on rank {rank} of 2 in step {step + 1}: {describe_unused(subject.task, unused)}")
            seldom |= set(unused)
            tried += 1
        if time.monotonic() - begun_s > _TRIED_S:
            break
    count = sum(parameter.requires_grad for parameter in model.parameters())
    batches = f"in {tried} batches of {config.batch_size // 2}"
    if seldom:
        return f"{min(seldom)} did not always get one, {batches}, which is zero in a shard", {}
    return f"each of {count} parameters gets one, {batches}", {}


def _check_model(subject: Subject) -> Found:
    here = digest_each(subject.model.state_dict())
    _compare(
        "the initial", here, digest_each(build_model(subject.task, subject.config.seed).state_dict()), f"when it is built again: {_SEEDED}"
    )
    there = subject.found["model"]
    _check_order(there, here)
    _compare("the initial", here, there, f"in another process: {_SEEDED}")
    rule = "build_model must need no more than options and facts (find_facts), for weights are read without data"
    if isinstance(shapes := subject.found["shapes"], str):
        raise Broken(f"no model can be built before load is called: {rule}: {shapes}")
    _compare("the shape of", list_shapes(subject.model), shapes, f"before load is called: {rule}")
    return f"{len(here)} tensors, the same bits whenever they are built", {}


def _check_data(subject: Subject) -> Found:
    config, rule = subject.config, "a sample may depend on its index and on the generators of torch, numpy and random, seeded before each"
    here = digest_data(config, subject.data)
    _compare("", here, digest_data(config, subject.data, backwards=True), f"when it is read again, in another order: {rule}")
    again, data = load_data(subject.given)
    fixed = "in load and find_facts, draw from the generators of torch, numpy and random, which are seeded, or give your own a fixed seed"
    _compare("", here, digest_data(again, data), f"when the data are loaded again: {fixed}; {rule}")
    _compare("", here, subject.found["data"], f"in another process: {fixed}; {rule}")
    kind = find_immovable(subject.probe.whole.samples)
    note = f"; a batch holds a {kind}, which cannot go to a GPU: give it a method to(device)" if kind else ""
    return f"{len(here)} digests of samples and facts, the same whenever and wherever they are read{note}", {}


def _compare(what: str, here: dict[str, str], there: dict[str, str], when: str) -> None:
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differing:
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise Broken(f"{f'{what} ' if what else ''}{differing[0]}{more} differs {when}")


def _check_order(there: Iterable[str], here: Iterable[str]) -> None:
    if [*there] != [*here] and {*there} == {*here}:
        raise Broken(f"the model is another one in another process: {describe_order(there, here)}")


def _check_state(subject: Subject) -> Found:
    encode_weights(subject.model, subject.config)
    if isinstance(subject.state, str):
        raise Broken(f"no step can be made: {subject.state}")
    there = subject.found["state"]
    if isinstance(there, str):
        raise Broken(f"another process cannot continue from the state_dict: {there}")
    changed = f"{subject.changed[0]} changes in a step and is not in state_dict" if subject.changed else ""
    _check_order(there, subject.state)
    if subject.state != there:
        differing = next(name for name in subject.state if subject.state[name] != there.get(name))
        cause = changed or "something that is neither a parameter nor a buffer changes in a step"
        raise Broken(f"{differing} differs in a process that continues from the state_dict: {cause}; keep it in a buffer (register_buffer)")
    note = f"; {changed}: harmless while no step depends on it" if changed else ""
    return f"another process makes the same step from it{note}", {}


def _check_two(subject: Subject) -> Found:
    two = subject.train_on_two()
    if subject.config.shards:
        _compare_states(subject.train_on_one(), two, "between one process and two with shards")
        return f"the same bits as one: {STEPS} steps with {subject.config.shards} shards", {}
    if not subject.tier.is_any_world:
        _compare_states(two, subject.train("again", 2), "between two runs of two processes")
        return f"this world: {STEPS} steps of two processes are the same bits in two runs; one process would train otherwise", {}
    one = subject.train_on_one()
    two.wait()  # first: where a rank hangs, it is one of these
    states = one.state["model"], two.state["model"]
    rule = "a loss must be the same wherever it is computed; does it depend on a rank, a process, or how many samples are with it?"
    worst = 0.0
    for step, (here, there) in enumerate(zip(one.losses, two.losses, strict=True), start=1):
        worst = max(worst, abs(here - there) / max(abs(here), abs(there), 1e-12))
        if not worst <= _TOLERANCE:
            raise Broken(f"the loss of step {step} is {here:.6g} in one process and {there:.6g} in two: {rule}")
    largest = max(
        (float(tensor.abs().max()) for tensor in states[0].values() if tensor.is_floating_point() and tensor.numel()), default=1.0
    )
    for name, here in states[0].items():
        if here.numel():
            here, there = here.double(), states[1][name].double()
            # What moves by rounding alone, as the bias before a normalization, is measured by the others.
            difference = float((here - there).abs().max()) / max(float(here.abs().max()), 0.01 * largest)
            worst = max(worst, difference)
            if not difference <= _TOLERANCE:
                raise Broken(f"after {STEPS} steps {name} differs by {difference:.1e} of itself between one process and two: {rule}")
    return f"as one: {STEPS} steps, losses and weights within {worst:.0e} (allowed {_TOLERANCE:.0e})", {"difference": worst}


def _compare_states(one: Ranks, other: Ranks, when: str) -> None:
    here, there = (
        digest_each({f"the loss of step {step}": loss for step, loss in enumerate(ranks.losses, start=1)})
        | digest_each(ranks.state["model"])
        | digest_each({"the optimizer's state": ranks.state["optimizer"]["state"]})
        for ranks in (one, other)
    )
    _compare("", here, there, f"{when}: {_SEEDED}; and all state belongs into state_dict")


def _check_sums(subject: Subject, measured: int) -> None:
    """Compare the sums of some samples at once with those of a few at a time, with other weights than the first; and measure so many.

    At first many a model answers the same to all, and then even what is no sum, such as a mean of means, adds up.
    """
    count = min(_SUMMED, measured)
    some, all_measured = (take_samples(subject.data.evaluated, range(size)) for size in (count, measured))
    begun_s = time.monotonic()
    for move in range(_MOVES):
        if time.monotonic() - begun_s > _TRIED_S:
            break
        subject.put_back()
        found: list[Tensor] = []
        # A model may refuse such weights: a width that must be positive, say.
        with contextlib.suppress(Exception), keeping(subject.model), torch.no_grad():
            _move_weights(subject.model, move)
            subject.model.eval()
            found = [_add_up(subject, some, _SUMMED), _add_up(subject, some, _SUMMED // 3), _add_up(subject, all_measured, None)]
        if not found or not torch.cat(found).isfinite().all():
            continue
        whole, parts, sums = found
        for index, (a, b) in enumerate(zip(whole.tolist(), parts.tolist(), strict=True)):
            if not abs(a - b) <= _MOVED_TOLERANCE * max(abs(a), abs(b)):
                raise Broken(
                    f"sum {index} of tally is {a:.6g} for {count} samples at once and {b:.6g} for {_SUMMED // 3} at a time, {_MOVED}: "
                    f"{_SUMS}"
                )
        with explaining(subject.task.name, f"in measure, {_MOVED}", RunError), contextlib.suppress(OverflowError):
            subject.task.measure(sums)


def _move_weights(model: nn.Module, move: int) -> None:
    """At first at random, by half of their own mean size, by all of it, and so on; at last all biases down, or up, until they decide."""
    generator = torch.Generator().manual_seed(move)
    for parameter in (one for one in model.parameters() if one.requires_grad):
        if move < _MOVES - 2:
            size = float(parameter.abs().mean()) or _SIZE_OF_ZEROS
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=2.0 ** (move - 1) * size)
        elif parameter.ndim < 2:
            parameter.add_(_SHIFT if move % 2 else -_SHIFT)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0.0  # torch keeps it so: padding must add nothing


def _add_up(subject: Subject, split: Dataset[Any], at_once: int | None) -> Tensor:
    """The sums of the tally of all samples of a split, so many at a time; None: as many as an evaluation takes."""
    config = subject.config.model_copy(update={"micro_batch": at_once})
    tallies = (subject.task.tally(subject.model, batch) for batch in read_on(split, config, torch.device("cpu")))
    return torch.stack([tally.sums.double() for tally in tallies]).sum(0)


def _check_evaluation(subject: Subject) -> Found:
    one, two = subject.train_on_one(), subject.train_on_two()
    with keeping(subject.model), torch.no_grad():
        (row,) = read_on(take_samples(subject.data.evaluated, range(1)), subject.config, torch.device("cpu"))
        before = read_generators()
        tally = subject.task.tally(subject.model.eval(), row)
        check_tally(subject.task, tally, 1)
        counted = float(tally.sums[0])
        tally_draws = read_generators() != before
    if counted != 1:
        raise Broken(f"the tally of one sample counts {counted:g}: {_SUMS}")
    here, there = one.evaluation, two.evaluation
    for answer, who in ((here, "one process"), (there, "two processes")):
        if "error" in answer:
            raise Broken(f"in {who}: {answer['error']}")
    shards = subject.config.shards
    if (subject.probe.collate_draws or tally_draws) and not shards:
        what = "collate" if subject.probe.collate_draws else "tally (is there a dropout that does not heed model.eval()?)"
        return f"not compared: {what} draws other random numbers for the batches of two processes; with --shards they are the same", {}
    tolerance = 0 if shards else _TOLERANCE
    for index, (a, b) in enumerate(zip(here["sums"], there["sums"], strict=True)):
        if not abs(a - b) <= tolerance * max(abs(a), abs(b)):
            raise Broken(f"sum {index} of tally is {a:.6g} in one process and {b:.6g} in two: {_SUMS}")
    for name, value in here["measures"].items():
        pairs = zip(_list_numbers(value), _list_numbers(there["measures"].get(name)), strict=False)
        if any(abs(a - b) > 10 * tolerance * max(abs(a), abs(b)) for a, b in pairs):
            raise Broken(f"the measure {name} differs between one process and two, and their sums do not: compute it from the sums alone")
    if not (subject.probe.collate_draws or tally_draws):
        _check_sums(subject, here["samples"])
    same = "the same bits" if shards else "the same"
    return f"{here['samples']} samples, {len(here['sums'])} sums and the measures are {same} on one process and on two", {}


def _list_numbers(value: Any) -> list[float]:
    if isinstance(value, list):
        return [number for part in value for number in _list_numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


def _check_resume(subject: Subject) -> Found:
    unbroken, size = (subject.train_on_one(), 1) if subject.tier.is_any_world else (subject.train_on_two(), 2)
    subject.train("broken", size, _SAVED_AT, _KILLED_AT, kill=True).wait()
    resumed = subject.train("broken again", size)
    _compare_states(unbroken, resumed, f"after {STEPS} steps where the run was killed at step {_KILLED_AT} and resumed from {_SAVED_AT}")
    where = f"{STEPS} steps on {size} process{'es' * (size > 1)}"
    return f"killed at step {_KILLED_AT} and resumed from {_SAVED_AT}, {where} end in the same bits", {}


def _check_cost(subject: Subject) -> Found:
    config, split = subject.config, subject.data.evaluated
    threads = config.threads or choose_threads(World())
    torch.set_num_threads(threads)
    try:
        model, optimizer = build(config)
        times_s: list[float] = []
        while len(times_s) < _TRIED_STEPS + 1 and sum(times_s) < _TRIED_S:
            times_s.append(_time(lambda: take_step(config, subject.data, model, optimizer, len(times_s))))
        step_s = sorted(times_s[1:] or times_s)[len(times_s[1:]) // 2]  # the first one allocates
        some = take_samples(split, range(min(_MEASURED, len(split))))  # type: ignore[arg-type]

        def evaluate() -> None:
            with torch.no_grad():
                for batch in read_on(some, config, torch.device("cpu")):
                    subject.task.tally(model, batch)

        model.eval()
        evaluation_s = _time(evaluate) / len(some) * len(split)  # type: ignore[arg-type]
        state, file = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, subject.folder / "cost.pt"
        content = checkpoint.encode(state)
        checkpoint_s = _time(lambda: write_atomically(file, checkpoint.encode(state)))
    finally:
        torch.set_num_threads(1)
    # The signal may come as a step, an evaluation or the writing of a checkpoint begins; the ranks agree on it one step later.
    grace_s = max(_GRACE_S, math.ceil(2 * (2 * step_s + evaluation_s + 2 * checkpoint_s)))
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    values = {"parameters": parameters, "checkpoint_bytes": len(content), "checkpoint_s": checkpoint_s, "step_s": step_s}
    values |= {"evaluation_s": evaluation_s, "threads": threads, "signal_delay_s": grace_s}
    text = (
        f"{parameters:,} parameters; a checkpoint is {len(content):,} bytes and takes {checkpoint_s:.2g} s; a step of {config.batch_size} "
        f"takes {step_s:.2g} s and an evaluation {evaluation_s:.2g} s on {threads} thread{'s' * (threads > 1)} of this CPU; twice two "
        f"steps, two checkpoints and an evaluation: --signal_delay_s at least {grace_s}"
    )
    return text, values


def _time(work: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


_CHECKS: dict[str, Callable[[Subject], Found]] = {
    "losses": _check_losses,
    "rows": _check_rows,
    "tier": _check_tier,
    "repeat": _check_repeat,
    "gradients": _check_gradients,
    "model": _check_model,
    "data": _check_data,
    "state": _check_state,
    "two processes": _check_two,
    "evaluation": _check_evaluation,
    "resume": _check_resume,
    "cost": _check_cost,
}
