"""What a model's step depends on beside its samples: a probe on some of them, in float32 on the CPU, before anything is prepared.

*Any world*: no sample sees another one, nothing random happens but what the task draws for the whole batch, and only the optimizer changes
the model. Then a step is the same on any number of processes. *This world*: there is BatchNorm, dropout, a moving average or the like. Then
it is the same only on as many processes as before.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnist_dist.batches import MicroBatch
from mnist_dist.data import SampleProbe
from mnist_dist.errors import UserError
from mnist_dist.model import check_finite, describe_dtype, is_dense, is_finite, is_writable, load_weights
from mnist_dist.randomness import keeping_generators, read_generators, seed_generators
from mnist_dist.reader import READING_RULE
from mnist_dist.samples import is_same, list_tensors
from mnist_dist.source import explaining
from mnist_dist.task import Task

ANY_WORLD, THIS_WORLD = "any world", "this world"
_TOLERANCE = 1e-3  # of the largest value: rounding alone makes 1e-6 to 1e-5 of it
_LOSS_TOLERANCE = 1e-4  # of what is in the gradients
_GRADIENT_TOLERANCE = 1e-2  # of a gradient's norm
_GRADIENT_NOISE = 1e-5  # of the norm of all
_SCALE = 2.0**16  # of the losses, so that a gradient that is clipped for its size alone is found; exact, as a power of two
_NUDGE = 2**-10
_ROWS = 64  # that are looked for at once
_HELD_BYTES = 1 << 29  # of a batch that is tried, and of all its layers' outputs
_OF_ANY_MODULE = frozenset(vars(nn.Module()))  # attributes: parameters, buffers, modules, mode, hooks


class Tier(NamedTuple):
    """The number of processes on which a run keeps its promises, what makes it so, and the state that a forward pass changes."""

    name: str
    reason: str
    moved: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()  # parameters that got no gradient
    repeats: bool = True  # two passes over the same samples give the same bits
    written: tuple[str, ...] = ()  # parameters that a pass writes into, and leaves as they are, as one that clamps them

    @property
    def is_any_world(self) -> bool:
        """Whether the number of processes may change between two starts without shards; with them it may in any case."""
        return self.name == ANY_WORLD

    def describe(self, shards: int | None) -> str:
        """On which numbers of processes a run with so many shards keeps its promises, and why."""
        if not self.repeats:
            return f"no run has the bits of another one, because {self.reason}"
        if shards is None and self.is_any_world:
            return "any world: a step is the same on any number of processes"
        if shards is None:
            return f"this world: a step is the same only on as many processes, because {self.reason}"
        bits = f"any world: the same bits on 1 to {shards} processes of as many threads, by {shards} shards"
        return bits if self.is_any_world else f"{bits}, although {self.reason}"


class Trace(NamedTuple):
    """One pass of the losses: the losses themselves, each layer's output in order of their calls, and who drew random numbers."""

    losses: Tensor
    outputs: list[tuple[str, Tensor]]
    drew: str | None
    wrote: bool  # into the samples


def find_tier(task: Task, model: nn.Module, probe: SampleProbe) -> Tier:
    """Compute the losses of a few samples, and of a batch and of its half, in training mode; the model stays as it was.

    Raises `UserError` where the losses are not one finite number for each sample, no parameter gets a gradient, or `draw` does not repeat.
    """
    if not probe.draw_repeats:
        raise UserError(
            f"task {task.name}: draw gives other numbers for the same seed and step: make them by a generator that is seeded with both"
        )
    if flaw := describe_flaw(probe):
        raise UserError(f"task {task.name}: {flaw}")
    with keeping(model) as kept:
        kinds = {name: value.dtype for name, value in model.state_dict().items()}
        check_loading(task, model, kept, {name for name, parameter in model.named_parameters() if parameter.requires_grad})
        seed_generators(0)
        versions = {name: parameter._version for name, parameter in model.named_parameters()}
        whole = trace(task, model, probe.whole)
        written = tuple(name for name, parameter in model.named_parameters() if parameter._version != versions.get(name))
        check_losses(task, whole.losses, probe.whole.size, [probe.name(place) for place in probe.whole.places])
        _check_first_pass(task, model, kinds)
        if whole.wrote and probe.is_stored:
            raise UserError(
                f"task {task.name}: losses writes into its batch, and collate hands on what the data set stores, which would change with "
                "each step: clone it in one of the two"
            )
        drawn = read_generators()
        gradients = find_gradients(task, model, whole.losses)
        draws_backward = read_generators() != drawn
        unused = tuple(list_unused(gradients))
        many = compute_many(task, model, probe, find_size(probe, whole))
        changed = kept.list_changed()
        kept.put_back()
        seed_generators(0)
        before = list_scalars(model)
        again = trace(task, model, probe.whole)
        kept.put_back()
        changed += [name for name, value in list_scalars(model).items() if before.get(name) != value]
        if not is_close(whole.losses, again.losses):
            raise UserError(
                f"task {task.name}: two passes over the same samples with the same weights and seeds have losses that differ: draw "
                "from the generators of torch, numpy and random alone, which are seeded before, and keep what changes in a buffer "
                "(register_buffer)"
            )
        repeats = torch.equal(whole.losses, again.losses)
        moved = tuple(dict.fromkeys([*find_moved(task, model, lambda: probe), *changed]))
        if saved := kinds.keys() & moved:
            check_loading(task, model, kept, saved)
        if not repeats:
            reason = (
                "two passes over the same samples with the same weights and seeds have losses that differ in their last digits (numbers "
                "must come from the generators of torch, numpy and random alone, and what changes must be in a buffer)"
            )
        elif drew := whole.drew or many.drew or ("collate" if probe.collate_draws else None):
            reason = f"{drew} draws random numbers"
        elif mixing := find_first_difference(whole, trace(task, model, probe.half)):  # a batch of its own: it may be padded less
            reason = f"in {mixing} the samples of a batch see each other"
        elif moved:
            reason = f"each forward pass changes {moved[0]}"
        elif hooked := list_hooked(model):
            reason = f"a hook changes the gradient of {hooked[0]} once it is added up"
        elif draws_backward:
            reason = "the backward pass draws random numbers"
        elif counting := find_counting(model):
            reason = f"{counting} divides a word's gradient by how often it is in the batch (scale_grad_by_freq)"
        elif is_mixing(task, model, probe, many.losses):
            reason = f"in the losses some of {len(many.losses)} samples see each other"
        else:
            micro_batches = (probe.half, probe.take(range(probe.half.size, probe.whole.size)))
            parts = (part for micro_batch in micro_batches if (part := find_part(task, model, micro_batch)) is not None)
            changed_in = find_other_gradient(gradients, parts)
            reason = f"the gradient of {changed_in} is not the sum of its samples' (does something clip it?)" if changed_in else ""
    return Tier(THIS_WORLD if reason else ANY_WORLD, reason, moved, unused, repeats, written)


def _check_first_pass(task: Task, model: nn.Module, kinds: dict[str, torch.dtype]) -> None:
    """Raise `UserError` where a pass has made the model's state another one than that of these `kinds`, or not finite."""
    if other := sorted(kinds.keys() ^ model.state_dict().keys()):
        raise UserError(
            f"task {task.name}: the first forward pass {'removes' if other[0] in kinds else 'adds'} {other[0]} of its model, which no "
            "optimizer would see, or no weights that are read again would fit: make all of the model in build_model"
        )
    for name, value in model.state_dict().items():
        if value.dtype != kinds[name]:
            raise UserError(
                f"task {task.name}: the first forward pass makes {name} of its model {describe_dtype(value.dtype)}, which was "
                f"{describe_dtype(kinds[name])}, and no checkpoint would fit: change it in place (copy_, mul_, add_), which keeps it"
            )
    check_finite(task, model, " after the first forward pass")


def check_loading(task: Task, model: nn.Module, kept: "Kept", spoiled: Collection[str]) -> None:
    """Raise `UserError` unless the model has its values again, those `spoiled` included, once it has loaded what its state_dict gave.

    A constant may be left out, which `build_model` makes anew: only what changes in a run is spoiled.
    """
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}  # plain, as it is read from a file
    kept.spoil(spoiled)
    load_weights(task, model, state)
    if lost := kept.list_changed():
        raise UserError(
            f"task {task.name}: {lost[0]} of its model is another one once the model has loaded what its state_dict gave, so a resumed "
            "run would be another one, too: let state_dict and load_state_dict hand on each tensor as it is"
        )


def find_size(probe: SampleProbe, few: Trace) -> int:
    """How many samples a model is tried on: as a step may have, if the memory bears it by a `few` of them and their outputs."""
    held = [*(output for _, output in few.outputs), *list_tensors(probe.whole.samples)]
    bytes_each = sum(tensor.nbytes for tensor in held) // len(few.losses)
    return max(len(few.losses), min(probe.most, _HELD_BYTES // max(bytes_each, 1)))


def compute_many(task: Task, model: nn.Module, probe: SampleProbe, size: int, step: int = 1) -> Trace:
    """The losses of the first, or of every other one, of `size` samples, without gradients where they need none.

    Raises `UserError` where one is not finite.
    """
    micro_batch = probe.take(range(0, size, step))
    seed_generators(0)
    try:
        with torch.no_grad():
            found = trace(task, model, micro_batch, keep_outputs=False)
    except UserError:  # as of a penalty for gradients
        seed_generators(0)
        found = trace(task, model, micro_batch, keep_outputs=False)
    check_losses(task, found.losses, micro_batch.size, [probe.name(place) for place in micro_batch.places])
    return found._replace(losses=found.losses.detach())


def is_mixing(task: Task, model: nn.Module, probe: SampleProbe, losses: Tensor) -> bool:
    """Whether every other sample of a batch has another loss than the given one where the rest is not with it.

    A loss may see only some others, such as those of its class, of which there is none among a few samples.
    """
    half = compute_many(task, model, probe, len(losses), step=2)
    return not is_close(losses[::2], half.losses, _LOSS_TOLERANCE)


def describe_flaw(probe: SampleProbe) -> str:
    """Why no promise can be kept on such data; empty where there is no reason."""
    if probe.drawn_once:
        return (
            f"sample {probe.drawn_once[0]} of the training data is drawn at random when it is first read, and kept: each process, and each "
            "start, would draw its own; keep what is not random (of a transform, what it is given), or draw it in load"
        )
    numbers = " or ".join(map(str, dict.fromkeys(probe.changed)))
    return numbers and (
        f"sample {numbers} of the training data differs when it is read again: __getitem__ and collate must not change {READING_RULE}"
    )


def find_moved(task: Task, model: nn.Module, make_probe: Callable[[], SampleProbe]) -> list[str]:
    """The parameters that a forward pass changes, as far as one can know before: those that nobody trains, and those with a max_norm.

    The model stays as it was.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None]
    limited = {id(table.weight) for table in tables}  # changed once their rows are long enough, maybe after many steps
    moved = [name for name, parameter in model.named_parameters() if id(parameter) in limited]
    frozen = {name: parameter for name, parameter in model.named_parameters() if not (parameter.requires_grad or name in moved)}
    if not frozen:
        return moved
    with keeping(model, {*moved, *frozen}):
        # An average that the pass moves may equal at first what it follows.
        with torch.no_grad():
            nudged = {name: parameter.add_(_NUDGE).clone() for name, parameter in frozen.items()}
        trace(task, model, make_probe().whole)
        return moved + [name for name in frozen if not is_same(frozen[name], nudged[name])]


def check_shape(task: Task, losses: Any, count: int) -> None:
    """Raise `UserError` unless `losses` is a tensor with one for each of `count` samples. Waits for no device."""
    if not isinstance(losses, Tensor):
        raise UserError(f"task {task.name}: losses returned {type(losses).__name__}; expected a tensor with one loss for each sample")
    if not is_dense(losses):
        raise UserError(f"task {task.name}: losses returned a sparse or nested tensor; expected a dense one with one loss for each sample")
    if losses.shape != (count,):
        hint = ": their mean or sum? reduction='none' keeps one for each" if losses.numel() == 1 else ""
        raise UserError(f"task {task.name}: losses has shape {list(losses.shape)} for {count} samples; expected [{count}]{hint}")


def check_losses(task: Task, losses: Any, count: int, names: Sequence[str] = ()) -> None:
    """Raise `UserError` unless `losses` are one finite number for each of `count` samples, whose `names` may be known."""
    check_shape(task, losses, count)
    if not losses.is_floating_point():
        raise UserError(f"task {task.name}: the losses are {describe_dtype(losses.dtype)}; expected floating-point numbers")
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad and names and len(bad) < count:
        raise UserError(f"task {task.name}: the loss of {names[bad[0]]} is {losses[bad[0]]:g}; expected a finite number")
    if bad:
        raise UserError(f"task {task.name}: the losses of {count} samples are {losses.tolist()}; expected finite numbers")


def find_gradients(task: Task, model: nn.Module, losses: Tensor) -> dict[str, Tensor | None]:
    """The gradients of the sum of the losses; None for a parameter that gets none.

    Raises `UserError` where no parameter gets one, or one that cannot be averaged.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UserError(f"task {task.name}: its model has no parameter to train")
    if not losses.requires_grad:
        raise UserError(f"task {task.name}: its losses do not depend on the model's parameters; are they detached?")
    with explaining(task.name, "in the backward pass of its losses"):
        gradients = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise UserError(f"task {task.name}: {name} gets a sparse gradient; expected a dense one (an embedding with sparse=False)")
    return dict(zip(trained, gradients, strict=True))


def list_unused(gradients: dict[str, Tensor | None]) -> list[str]:
    """The parameters that get no gradient."""
    return [name for name, gradient in gradients.items() if gradient is None]


def list_hooked(model: nn.Module) -> list[str]:
    """The parameters with a hook for their gradient once it is added up."""
    return [name for name, parameter in model.named_parameters() if parameter._post_accumulate_grad_hooks]


def find_counting(model: nn.Module) -> str | None:
    """The first embedding whose gradient depends on how often a word is in a batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
            return _name_layer(name, module)
    return None


def _name_layer(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def find_part(task: Task, model: nn.Module, micro_batch: MicroBatch) -> dict[str, Tensor | None] | None:
    """The gradients of some samples, found from `_SCALE` times their losses; None where these reach no parameter."""
    losses = trace(task, model, micro_batch).losses
    if not losses.requires_grad:
        return None
    try:
        gradients = find_gradients(task, model, losses * _SCALE)
        return {name: None if gradient is None else gradient / _SCALE for name, gradient in gradients.items()}
    except UserError:  # of code that looks how large they are
        return find_gradients(task, model, trace(task, model, micro_batch).losses)


def find_other_gradient(whole: dict[str, Tensor | None], parts: Iterable[dict[str, Tensor | None]]) -> str | None:
    """The first parameter whose gradient is not the sum of those of some parts, but for rounding and for what it makes a ReLU do.

    What is too large, as numbers in float16 may be when they are scaled, is not looked at.
    """
    rests = {name: gradient for name, gradient in whole.items() if gradient is not None}
    sizes = {name: float(gradient.norm()) for name, gradient in rests.items()}
    whole.clear()  # of a large model, no more than two gradients are kept at once
    for part in parts:
        for name in [*rests]:
            if (gradient := part.pop(name)) is not None and not is_finite(gradient):
                del rests[name]
            elif gradient is not None:
                sizes[name] = max(sizes[name], float(gradient.norm()))
                rests[name] = rests[name] - gradient
        gradient = None
    # Of some parameters the gradient is zero but for rounding, such as the bias of an attention's keys.
    noise = _GRADIENT_NOISE * math.hypot(*sizes.values())
    return next((name for name, rest in rests.items() if float(rest.norm()) > _GRADIENT_TOLERANCE * sizes[name] + noise), None)


def describe_unused(task: Task, unused: Sequence[str]) -> str:
    """That these parameters get no gradient, and what to do about it."""
    more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
    return (
        f"task {task.name}: {', '.join(unused[:5])}{more} {'get' if len(unused) > 1 else 'gets'} no gradient from the losses, and several "
        "processes would wait for it: use it in each step, train with --shards, where a missing gradient is zero, or freeze it with "
        "requires_grad_(False) if it is never used"
    )


def trace(task: Task, model: nn.Module, micro_batch: MicroBatch, *, keep_outputs: bool = True) -> Trace:
    """The losses of some samples, and what each layer did on the way."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which would compile the hooks as well
    outputs: list[tuple[str, Tensor]] = []
    drew: list[str] = []
    before = [read_generators()]

    def note_draw(what: str) -> None:
        try:
            now = read_generators()
        except RuntimeError:  # within a transform of torch.func, where no numbers can be read: the end of the pass tells
            return
        if now != before[0]:
            drew.append(what)
            before[0] = now

    def note(what: str, output: Any) -> None:
        note_draw(what)
        if isinstance(output, Tensor) and keep_outputs and is_dense(output) and _has_memory(output):
            outputs.append((what, output.detach().clone()))

    outside = "the forward pass, outside of its layers,"
    hooks = []
    for name, module in model.named_modules():
        if not list(module.children()) and not isinstance(module, torch.jit.ScriptModule):  # which takes no such hooks
            what = _name_layer(name, module)
            hooks.append(module.register_forward_pre_hook(lambda *_: note_draw(outside)))
            hooks.append(module.register_forward_hook(lambda _module, _inputs, output, what=what: note(what, output)))
    try:
        own = copy_micro_batch(micro_batch)
        with explaining(task.name, "in losses"):
            losses = task.losses(model, own.samples, own.drawn)
    finally:
        for hook in hooks:
            hook.remove()
    note_draw(outside)
    wrote = not all(map(is_same, list_tensors(micro_batch.samples), list_tensors(own.samples)))
    return Trace(losses, outputs, drew[0] if drew else None, wrote)


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has numbers of its own: within a transform of torch.func it may stand for many."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def copy_micro_batch(micro_batch: MicroBatch) -> MicroBatch:
    """The same samples once more: losses may write into what it is given, and in a training gets no batch twice."""
    try:
        return copy.deepcopy(micro_batch)
    except Exception:  # of a user's own kind that cannot be copied, and hardly is written into
        return micro_batch


def find_first_difference(whole: Trace, part: Trace) -> str | None:
    """The first layer whose output for the samples of a part differs between a batch and this part, its first samples; None: nowhere."""
    for (name, one), (other_name, other) in zip(whole.outputs, part.outputs, strict=False):
        if name != other_name:
            break
        if one.ndim and other.ndim and one.shape[1:] == other.shape[1:] and not _has_rows(one, other):
            return name
    return None if is_close(whole.losses[: len(part.losses)], part.losses, _LOSS_TOLERANCE) else "the losses"


def _has_rows(one: Tensor, other: Tensor) -> bool:
    """Whether each row of `other` is one of `one`, but for rounding. A sample may be several rows, and those of others be in between."""
    if len(other) > len(one) or is_close(one[: len(other)], other):
        return len(other) <= len(one)
    one, other = (rows.double().reshape(len(rows), -1) for rows in (one, other))
    tolerance = _TOLERANCE * one.abs().max().clamp(min=1e-6)
    return all(bool((torch.cdist(some, one, p=torch.inf).amin(1) <= tolerance).all()) for some in torch.split(other, _ROWS))


def is_close(one: Tensor, other: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Whether two tensors are equal but for rounding."""
    if one.shape != other.shape:
        return False
    one, other = one.detach().double(), other.detach().double()
    return bool((one - other).abs().max() <= tolerance * one.abs().max().clamp(min=1e-6)) if one.numel() else True


def list_scalars(model: nn.Module) -> dict[str, bool | int | float | str]:
    """The numbers and texts among the attributes of a model, which no checkpoint holds, by their names in words."""
    return {
        f"the attribute {key} of {_name_layer(name, module)}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
    }


def list_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by their names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class Kept:
    """The values that the buffers of a model had, and its parameters: all, or those of some names."""

    def __init__(self, model: nn.Module, parameters: Collection[str] | None = None) -> None:
        self._model = model
        buffers = dict(model.named_buffers())
        self._kept = {
            name: (tensor, tensor.detach().clone())
            for name, tensor in list_state(model).items()
            if parameters is None or name in parameters or name in buffers
        }

    def list_changed(self) -> list[str]:
        """The names of those that have other values now. Waits for the device."""
        now = list_state(self._model)
        return [name for name, (tensor, value) in self._kept.items() if now.get(name) is not tensor or not is_same(tensor, value)]

    @torch.no_grad()
    def spoil(self, names: Collection[str]) -> None:
        """Give those of some names other values."""
        for name, (tensor, value) in self._kept.items():
            if name in names and is_writable(tensor):
                tensor.zero_()
                if is_same(tensor, value):
                    tensor.fill_(1)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give them their values back; after a backward pass, if there is one."""
        for name, (tensor, value) in self._kept.items():
            if is_writable(tensor):
                tensor.copy_(value)
            owner, _, own_name = name.rpartition(".")
            if own_name in (buffers := self._model.get_submodule(owner)._buffers):
                buffers[own_name] = tensor  # the pass may have put another in its place


@contextmanager
def keeping(model: nn.Module, parameters: Collection[str] | None = None) -> Iterator[Kept]:
    """Leave a model's buffers, its parameters (all, or those named), its mode, and this process's generators on the CPU as they were.

    So are the other attributes of its modules: a mask that a pass keeps for the next one may be of another device than that will be on.
    The model is in training mode until then.
    """
    kept, attributes = Kept(model, parameters), [(module, _copy_attributes(module)) for module in model.modules()]
    training = model.training
    model.train()
    try:
        with keeping_generators():
            yield kept
    finally:
        model.train(training)
        kept.put_back()
        for module, before in attributes:
            _put_back_attributes(module, before)


def _copy_attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module holds beside its parameters, buffers and modules, and of a dictionary, list or set the content."""
    return {
        name: (value, copy.copy(value) if type(value) in (dict, list, set) else None)
        for name, value in vars(module).items()
        if name not in _OF_ANY_MODULE
    }


def _put_back_attributes(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    now = vars(module)
    for name in now.keys() - before.keys() - _OF_ANY_MODULE:
        del now[name]
    for name, (value, content) in before.items():
        now[name] = value
        if content is not None:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
