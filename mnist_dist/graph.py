"""A training step as a CUDA graph: its hundreds of small kernels are launched at once, where launching each takes longer than it runs."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from mnist_dist.errors import UserError

# Libraries choose their kernels, and optimizers make their state, in the first steps: these are done one kernel at a time.
_EAGER_STEPS = 3


class GraphedStep:
    """`compute`, which takes tensors on the GPU and gives a scalar there, recorded in the fourth call and replayed from then on.

    What it takes may be tensors on one device, or lists, tuples and dictionaries of them. The tensors must have the same shapes in every
    call. Anything else raises `UserError`.

    What else `compute` reads and changes must stay where it is in memory, and no Python number may differ between calls: the graph keeps
    the addresses and the numbers that it was recorded with.
    """

    def __init__(self, compute: Callable[..., Tensor], note_replay: Callable[[], None] = lambda: None) -> None:
        """`note_replay` is called before each replay, which does nothing else of Python's."""
        self._compute = compute
        self._note_replay = note_replay
        self._calls = 0
        self._inputs: Any = ()
        self._replay: Callable[[], None] | None = None
        self._output = torch.empty(0)

    def __call__(self, *inputs: Any) -> Tensor:
        """What `compute(*inputs)` gives and does."""
        given = _list_inputs(inputs)
        self._calls += 1
        if self._calls <= _EAGER_STEPS:
            return self._compute(*inputs)
        if self._replay is None:
            self._inputs = recursively_apply(Tensor.clone, inputs)
            self._replay, self._output = record(self._compute, self._inputs)
        for kept, now in itertools.zip_longest(_list_inputs(self._inputs), given):
            if kept is None or now is None or kept.shape != now.shape:
                here, was = ("missing" if tensor is None else list(tensor.shape) for tensor in (now, kept))
                raise UserError(
                    f"cuda_graph records one shape of each tensor in a batch; here it is {here}, and was {was}: leave it out, or give all "
                    "batches the same shapes"
                )
            kept.copy_(now, non_blocking=True)
        self._note_replay()
        self._replay()
        return self._output.clone()  # the next replay writes over it


def _list_inputs(value: Any) -> list[Tensor]:
    tensors, rest = [], [value]
    while rest:
        value = rest.pop()
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, dict | list | tuple):
            rest += value.values() if isinstance(value, dict) else value
        elif value is not None and not isinstance(value, range):  # the places of the samples
            raise UserError(f"cuda_graph records tensors alone, and a batch holds a {type(value).__name__}: leave it out")
    if len(devices := {str(tensor.device) for tensor in tensors}) > 1:
        raise UserError(f"cuda_graph records tensors on one device, and a batch holds some on {', '.join(sorted(devices))}: leave it out")
    return tensors


def record(compute: Callable[..., Tensor], inputs: tuple[Any, ...]) -> tuple[Callable[[], None], Tensor]:
    """What does `compute(*inputs)` again at each call, and the tensor that holds its output then. Recording computes nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compute(*inputs)
    return graph.replay, output
