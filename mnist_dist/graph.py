"""A training step as a CUDA graph: its hundreds of small kernels are launched at once, where launching each takes longer than it runs."""

import re
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from mnist_dist.errors import UserError

# Libraries choose their kernels, and optimizers make their state, in the first steps: these are done one kernel at a time.
_EAGER_STEPS = 3
_REFUSED = re.compile(r"stream is capturing|capturing (blocking )?stream|during (CUDA graph )?capture")  # CUDA's words, and torch's

KeyPath = tuple[Any, ...]  # the keys and numbers that lead to a tensor in what a step takes
Form = tuple[torch.Size, torch.dtype]


class GraphedStep:
    """`compute`, which takes tensors on the GPU and gives a scalar there, recorded in the fourth call and replayed from then on.

    What it takes may be tensors on one device, or lists, tuples and dictionaries of them. The tensors must have the same shapes and types
    in every call. Anything else raises `UserError`, and so does a `compute` that cannot be recorded.

    What else `compute` reads and changes must stay where it is in memory, and no Python number may differ between calls: the graph keeps
    the addresses and the numbers that it was recorded with.
    """

    def __init__(self, compute: Callable[..., Tensor], note_replay: Callable[[], None] = lambda: None) -> None:
        """`note_replay` is called before each replay, which does nothing else of Python's."""
        self._compute = compute
        self._note_replay = note_replay
        self._calls = 0
        self._inputs: dict[KeyPath, Tensor] = {}
        self._replay: Callable[[], None] | None = None
        self._output = torch.empty(0)

    def __call__(self, *inputs: Any) -> Tensor:
        """What `compute(*inputs)` gives and does."""
        given = _find_inputs(inputs)
        self._calls += 1
        if self._calls <= _EAGER_STEPS:
            return self._compute(*inputs)
        if self._replay is None:
            copies = recursively_apply(Tensor.clone, inputs)
            self._inputs = _find_inputs(copies)
            self._replay, self._output = record(self._compute, copies)
        if (forms := _find_forms(given)) != (recorded := _find_forms(self._inputs)):
            path = next(path for path in [*recorded, *forms] if forms.get(path) != recorded.get(path))
            here, was = (_describe(found.get(path)) for found in (forms, recorded))
            raise UserError(
                f"cuda_graph records one shape and type of each tensor in a batch; here one is {here}, and was {was}: leave it out, or "
                "give all batches the same"
            )
        for path, tensor in self._inputs.items():
            tensor.copy_(given[path], non_blocking=True)
        self._note_replay()
        self._replay()
        return self._output.clone()  # the next replay writes over it


def _find_inputs(value: Any) -> dict[KeyPath, Tensor]:
    """The tensors in what a step takes, by their paths: a dictionary may have its keys in another order each time."""
    tensors: dict[KeyPath, Tensor] = {}
    rest: list[tuple[KeyPath, Any]] = [((), value)]
    while rest:
        path, value = rest.pop()
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            rest += [((*path, key), item) for key, item in items]
        elif value is not None and not isinstance(value, range):  # the places of the samples
            raise UserError(f"cuda_graph records tensors alone, and a batch holds a {type(value).__name__}: leave it out")
    if len(devices := {str(tensor.device) for tensor in tensors.values()}) > 1:
        raise UserError(f"cuda_graph records tensors on one device, and a batch holds some on {', '.join(sorted(devices))}: leave it out")
    return tensors


def _find_forms(tensors: dict[KeyPath, Tensor]) -> dict[KeyPath, Form]:
    return {path: (tensor.shape, tensor.dtype) for path, tensor in tensors.items()}


def _describe(form: Form | None) -> str:
    return "missing" if form is None else f"{str(form[1]).removeprefix('torch.')} {list(form[0])}"


def record(compute: Callable[..., Tensor], inputs: tuple[Any, ...]) -> tuple[Callable[[], None], Tensor]:
    """What does `compute(*inputs)` again at each call, and the tensor that holds its output then. Recording computes nothing.

    Raises `UserError` where the GPU refuses to record it, and whatever else `compute` raises.
    """
    graph = torch.cuda.CUDAGraph()
    failure: Exception | None = None
    try:
        # Other threads go on meanwhile: one of torch's gets pinned memory for the batches of workers.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            try:
                output = compute(*inputs)
            except Exception as error:
                failure = error
                raise
    except Exception as error:
        # A recording that has failed cannot be ended either, and CUDA's words for that tell nothing.
        first = error if failure is None else failure
        if not _REFUSED.search(str(first)):
            raise first from None
        raise UserError(
            f"cuda_graph cannot record the step, which may read no values, as .item(), bool() and x[mask] do: leave it out ({first})"
        ) from first
    return graph.replay, output
