"""Sums that are the same bits on any number of processes.

A global batch is cut into fixed parts, the shards, and what each gives (gradients, losses, statistics) is added up along one fixed binary
tree. A process computes the parts in a range of its own and adds up what it can: the largest subtrees within that range. Then each process
gets one segment of all of these, adds it up along the rest of the tree, and hands the total to all. So each number is added up by one
process, in an order that does not depend on how many there are; as much is sent as by a ring.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from mnist_dist.distributed import Group, all_gather

Range = tuple[int, int]  # of shards: from the first to before the last


def split_shards(shards: int, rank: int, world_size: int) -> Range:
    """The shards that a rank computes: a range, by at most one longer than that of another rank."""
    return shards * rank // world_size, shards * (rank + 1) // world_size


def split_tree(node: Range) -> tuple[Range, Range]:
    """The two halves of a subtree; the left one is the largest full binary tree that is not all of it."""
    first, end = node
    middle = first + (1 << ((end - first - 1).bit_length() - 1))
    return (first, middle), (middle, end)


def find_subtrees(mine: Range, node: Range) -> Iterator[Range]:
    """The largest subtrees of `node` within the range `mine`, from left to right."""
    if mine[0] <= node[0] and node[1] <= mine[1]:
        yield node
    elif mine[0] < node[1] and node[0] < mine[1]:
        for half in split_tree(node):
            yield from find_subtrees(mine, half)


def add_up(node: Range, find: Callable[[Range], Sequence[Tensor] | None]) -> Sequence[Tensor]:
    """The sums over a subtree, along the tree; `find` knows some subtrees' sums, each of which may be written over."""
    found = find(node)
    if found is None:
        left, right = split_tree(node)
        found = [one.add_(other) for one, other in zip(add_up(left, find), add_up(right, find), strict=True)]
    return found


def add_shards(node: Range, compute: Callable[[int], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The sums of what `compute` gives for each shard of a subtree, in their order."""
    return add_up(node, lambda part: compute(part[0]) if part[1] - part[0] == 1 else None)


class TreeSum:
    """Adds up some vectors of numbers for each shard, over all processes of a group."""

    def __init__(self, shards: int, group: Group) -> None:
        self.shards = shards
        self.group = group
        self.mine = split_shards(shards, group.rank, group.size)
        self.subtrees = [list(find_subtrees(split_shards(shards, rank, group.size), (0, shards))) for rank in range(group.size)]

    def __call__(self, compute: Callable[[int], Sequence[Tensor]]) -> Sequence[Tensor]:
        """The sums of `compute(shard)`, each float [n] on the device, over all shards; this process computes its own, in their order."""
        sums = [add_shards(node, compute) for node in self.subtrees[self.group.rank]]
        return sums[0] if self.group.size == 1 else [self._exchange(vectors) for vectors in zip(*sums, strict=True)]

    def repeat(self, vector: Tensor) -> Tensor:
        """The sum of a vector that is the same for all shards."""
        return add_shards((0, self.shards), lambda _: [vector.clone()])[0]

    def _exchange(self, sums: Sequence[Tensor]) -> Tensor:
        size, length = self.group.size, len(sums[0])
        segment = -(-length // size)
        padded = torch.zeros(len(sums), size, segment, dtype=sums[0].dtype, device=sums[0].device)
        for row, values in zip(padded, sums, strict=True):
            row.view(-1)[:length] = values
        sent = padded.transpose(0, 1).contiguous()  # segment by segment, each for one rank
        counts = [len(subtrees) * segment for subtrees in self.subtrees]
        received = torch.empty(sum(counts), dtype=sent.dtype, device=sent.device)
        dist.all_to_all_single(received, sent.view(-1), counts, [len(sums) * segment] * size)
        nodes = [node for subtrees in self.subtrees for node in subtrees]
        known = {node: [values] for node, values in zip(nodes, received.view(-1, segment), strict=True)}
        total = torch.empty(size * segment, dtype=sent.dtype, device=sent.device)
        all_gather(total, add_up((0, self.shards), known.get)[0])
        return total[:length]


class Flat:
    """Some tensors as one vector, in the memory layout of each."""

    def __init__(self, tensors: Sequence[Tensor], extra: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.tensors, self.dtype = list(tensors), dtype
        self.length = sum(tensor.numel() for tensor in self.tensors) + extra

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a vector, each shaped and laid out as the tensor that it stands for."""
        views, start = [], 0
        for tensor in self.tensors:
            part = flat[start : start + tensor.numel()]
            # One with gaps in its memory, such as a slice, has no such layout here. Fused optimizers take all others as they lie.
            is_dense = torch.empty_like(tensor).stride() == tensor.stride()
            views.append(part.as_strided(tensor.shape, tensor.stride(), part.storage_offset()) if is_dense else part.view(tensor.shape))
            start += tensor.numel()
        return views

    def pack(self, values: Sequence[Tensor], extra: Sequence[Tensor] = ()) -> Tensor:
        """A new vector of `values`, which are shaped as the tensors, and of `extra` numbers behind them."""
        flat = torch.empty(self.length, dtype=self.dtype, device=values[0].device)
        for view, value in zip(self.views(flat), values, strict=True):
            view.copy_(value)
        for place, number in enumerate(extra, start=self.length - len(extra)):
            flat[place] = number
        return flat
