"""The model of a task: its initial weights, and a table of its layers. `python -m mnist_dist.model` prints that of the built-in CNN."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from mnist_dist.errors import UserError
from mnist_dist.program import make_table
from mnist_dist.randomness import derive_seed, seeding_generators
from mnist_dist.source import BUILT_IN, explaining, find_task
from mnist_dist.task import Task


def build_model(task: Task, seed: int) -> nn.Module:
    """The model of `task`, its initial weights a function of `seed` alone; the global random state is left as it was.

    Raises `UserError` where the task's code fails.
    """
    with seeding_generators(derive_seed(seed, "weights")), explaining(task.name, "in build_model"):
        model = task.build_model()
    if not isinstance(model, nn.Module):
        raise UserError(f"task {task.name}: build_model returned {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            f"task {task.name}: build_model returned a {type(model).__name__} of torch.jit; expected a module that may hold one"
        )
    _check_parameters(task, model)
    _check_buffers(task, model)
    _check_memory(task, model)
    _check_state_dict(task, model)
    check_finite(task, model)
    return model


def _check_parameters(task: Task, model: nn.Module) -> None:
    """Raise `UserError` unless the parameters are float32 on the CPU; one with gaps in its memory is copied."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UserError(
                f"task {task.name}: {name} of its model has no shape yet; give the sizes of lazy layers, or call it once in build_model"
            )
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise UserError(
                f"task {task.name}: {name} of its model is {parameter.dtype} on {parameter.device}; expected torch.float32 on the CPU: "
                "the training chooses device and precision"
            )
        if torch.empty_like(parameter).stride() != parameter.stride():  # a view with gaps, which fused optimizers take for one without
            parameter.data = parameter.data.clone()


def _check_buffers(task: Task, model: nn.Module) -> None:
    """Raise `UserError` unless the buffers are dense; one that cannot be written to is copied."""
    for name, buffer in model.named_buffers():
        if not is_dense(buffer):
            raise UserError(
                f"task {task.name}: the buffer {name} of its model is sparse or nested; expected a dense one: make it in the forward pass, "
                "of buffers with its indices and its values"
            )
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not is_writable(buffer):
                module._buffers[name] = buffer.clone()


def _check_memory(task: Task, model: nn.Module) -> None:
    """Raise `UserError` where a parameter lies in the memory of another, or of a buffer."""
    names = {name for name, _ in model.named_parameters()}
    for one, other in find_overlaps(model):
        if {one, other} & names:
            raise UserError(
                f"task {task.name}: {one} and {other} of its model share memory, and are not one tensor: on a GPU, or on several "
                "processes, each would get its own; use one Parameter in both places, or give it a copy"
            )


def _check_state_dict(task: Task, model: nn.Module) -> None:
    """Raise `UserError` where the state holds what no file of weights can."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"task {task.name}: {name} in the state_dict of its model is {type(value).__name__}; expected tensors alone")
        try:
            safetensors.torch.save({name: torch.empty(0, dtype=value.dtype)})
        except Exception as error:  # it has none for this
            raise UserError(
                f"task {task.name}: {name} in the state_dict of its model is {value.dtype}, which no .safetensors file holds; keep it in "
                "another type, or out of the state (register_buffer with persistent=False)"
            ) from error


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is neither sparse nor nested: such a one has no strides, or no shape."""
    return tensor.layout == torch.strided and not tensor.is_nested


def is_writable(tensor: Tensor) -> bool:
    """Whether a tensor can be written to, and so may have been: one that is expanded cannot."""
    return all(stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def describe_dtype(dtype: torch.dtype) -> str:
    """A type of numbers by its own name, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def sum_bits(tensors: Iterable[Tensor]) -> Tensor:
    """For each tensor the sum of its bytes, read as int64, as [tensors]: exact, so the same in any order and on any device."""
    return torch.stack([_sum_words(tensor.detach().reshape(-1).view(torch.uint8)) for tensor in tensors])


def _sum_words(content: Tensor) -> Tensor:
    if content.storage_offset() % 8:
        content = content.clone()
    whole = len(content) // 8 * 8
    return content[:whole].view(torch.int64).sum() + content[whole:].sum(dtype=torch.int64)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())  # which torch does not know of eight bits


def check_finite(task: Task, model: nn.Module, when: str = "") -> None:
    """Raise `UserError` where the model's state holds what is not finite: no checkpoint of it would be written."""
    for name, value in model.state_dict().items():
        if not is_finite(value):
            raise UserError(
                f"task {task.name}: {name} of its model holds values that are not finite{when}; a smallest value so far may begin with "
                "torch.finfo(torch.float32).max, and a mask that is made anew may be left out of checkpoints: register_buffer(..., "
                "persistent=False)"
            )


def load_weights(task: Task, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model a state that its `state_dict` gave. Raises `UserError` where it does not take that."""
    try:
        model.load_state_dict(tensors)
    except Exception as error:  # of the model's own code, too
        reason = " ".join(str(error).split())[:500].rstrip(" .")
        raise UserError(
            f"task {task.name}: its model cannot load what its state_dict gives, so no run of it could be resumed: {reason}; leave nothing "
            "out of its state_dict, or give it a load_state_dict that does without"
        ) from error


def find_synchronized(model: nn.Module) -> str | None:
    """The first layer that exchanges its statistics by itself, as SyncBatchNorm does."""
    return next((name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)), None)


def find_overlaps(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names of parameters and buffers that lie in the same memory; a parameter that is used twice is none."""
    by_storage: dict[int, list[tuple[int, int, str]]] = {}
    # Of one buffer in two places each place gets its own, where a parameter stays one.
    for name, tensor in [*model.named_parameters(), *model.named_buffers(remove_duplicate=False)]:
        if tensor.layout == torch.strided and tensor.numel():
            length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            span = (tensor.data_ptr(), tensor.data_ptr() + length * tensor.element_size(), name)
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(span)
    return [(one[2], other[2]) for spans in map(sorted, by_storage.values()) for one, other in pairwise(spans) if other[0] < one[1]]


def describe_order(there: Iterable[str], here: Iterable[str]) -> str:
    """What to say where a model of the same parts has them in another order elsewhere: what belongs to them goes by their order."""
    place = next((f" ({one} is there where {other} is here)" for one, other in zip(there, here, strict=False) if one != other), "")
    return f"its parts are in another order{place}: make them in a fixed order (a set of words has another one in each process: sort it)"


def describe_model(model: nn.Module, example: Tensor) -> str:
    """A table of the layers of `model` with output shapes, parameters and float32 memory for one sample, by an `example` [1, ...]."""
    rows: list[tuple[str, str, int]] = []
    outputs = 0

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        nonlocal outputs
        outputs += output.numel()
        shape = str([-1, *output.shape[1:]])
        rows.append((f"{name} ({type(module).__name__})", shape, sum(p.numel() for p in module.parameters())))

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return make_table(
        ("layer", "output", "parameters"),
        [
            *rows,
            ("total parameters", "", total),
            ("trainable parameters", "", trainable),
            ("memory of the parameters (MiB)", "", f"{total * 4 / 2**20:.2f}"),
            ("outputs of one sample (MiB)", "", f"{outputs * 4 / 2**20:.2f}"),
        ],
    )


if __name__ == "__main__":
    print(describe_model(build_model(find_task(BUILT_IN)(), seed=0), torch.zeros(1, 1, 28, 28)))
