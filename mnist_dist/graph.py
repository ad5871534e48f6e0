"""A training step as a CUDA graph: its hundreds of small kernels are launched at once, where launching each takes longer than it runs."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from mnist_dist.data import list_tensors
from mnist_dist.errors import UserError

# Libraries choose their kernels, and optimizers make their state, in the first steps: these are done one kernel at a time.
_EAGER_STEPS = 3


class GraphedStep:
    """`compute`, which takes tensors on the GPU and gives a scalar there, recorded in the fourth call and replayed from then on.

    What it takes may be tensors, or lists, tuples and dictionaries of them, or None.

    The tensors must have the same shapes in every call, else `UserError` is raised. What else `compute` reads and changes must stay where
    it is in memory, and no Python number may differ between calls: the graph keeps the addresses and the numbers that it was recorded
    with.
    """

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self._compute = compute
        self._calls = 0
        self._inputs: Any = ()
        self._replay: Callable[[], None] | None = None
        self._output = torch.empty(0)

    def __call__(self, *inputs: Any) -> Tensor:
        """What `compute(*inputs)` gives and does."""
        self._calls += 1
        if self._calls <= _EAGER_STEPS:
            return self._compute(*inputs)
        if self._replay is None:
            self._inputs = recursively_apply(Tensor.clone, inputs)
            self._replay, self._output = record(self._compute, self._inputs)
        for kept, given in zip(list_tensors(self._inputs), list_tensors(inputs), strict=True):
            if kept.shape != given.shape:
                raise UserError(
                    f"cuda_graph records one shape of each tensor in a batch; here it is {list(given.shape)}, and was {list(kept.shape)}: "
                    "leave it out, or give all batches the same shapes"
                )
            kept.copy_(given, non_blocking=True)
        self._replay()
        return self._output.clone()  # the next replay writes over it


def record(compute: Callable[..., Tensor], inputs: tuple[Any, ...]) -> tuple[Callable[[], None], Tensor]:
    """What does `compute(*inputs)` again at each call, and the tensor that holds its output then. Recording computes nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compute(*inputs)
    return graph.replay, output
