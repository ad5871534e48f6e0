"""Sums along one tree: the same bits on any number of processes."""

import hashlib
import os
from dataclasses import dataclass

import pytest
import torch
from processes import run_ranks

from mnist_dist.config import configure
from mnist_dist.distributed import join_group
from mnist_dist.exchange import Flat, TreeSum, find_subtrees, split_shards, split_tree
from mnist_dist.world import find_world


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8, 12, 13])
def test_every_rank_has_whole_subtrees_that_make_up_the_tree(shards):
    for world in range(1, shards + 1):
        ranges = [split_shards(shards, rank, world) for rank in range(world)]
        assert [first for first, _ in ranges] + [shards] == [0] + [end for _, end in ranges]
        sizes = [end - first for first, end in ranges]
        assert max(sizes) - min(sizes) <= 1
        nodes = [node for mine in ranges for node in find_subtrees(mine, (0, shards))]
        assert [part for node in nodes for part in range(*node)] == list(range(shards))
    assert split_tree((0, 8)) == ((0, 4), (4, 8))
    assert split_tree((0, 5)) == ((0, 4), (4, 5))


@dataclass(frozen=True)
class AddUp:
    """Ranks that add up vectors whose sum depends on the order in which it is done."""

    shards: int
    length: int

    def __call__(self):
        with join_group(find_world(os.environ), configure(precision="fp32", threads=1, device="cpu")) as group:
            asked = []

            def compute(shard):
                asked.append(shard)
                generator = torch.Generator().manual_seed(shard)
                large = torch.randn(self.length, generator=generator) * 10.0 ** torch.randint(-4, 4, (self.length,), generator=generator)
                return large, large[:1].double()

            tree = TreeSum(self.shards, group)
            total, first = tree(compute)
            assert first.dtype == torch.float64
            assert float(first) == pytest.approx(float(total[0]), rel=1e-4)
            third = torch.tensor([1 / 3])
            assert torch.equal(tree.repeat(third), tree(lambda _: [third.clone()])[0])
            assert asked == list(range(*split_shards(self.shards, group.rank, group.size)))
            digests = group.gather(hashlib.sha256(total.numpy().tobytes()).hexdigest())
            assert len(set(digests)) == 1
            if group.is_main:
                print("digest", digests[0])
        return 0


@pytest.mark.parametrize(("shards", "length", "worlds"), [(8, 1003, (1, 2, 3, 4, 5, 8)), (6, 1, (1, 4, 6))])
def test_a_sum_along_the_tree_has_the_same_bits_in_any_world(tmp_path, shards, length, worlds):
    found = set()
    for world in worlds:
        text = run_ranks(tmp_path / str(world), AddUp(shards, length), world)
        found.add(next(line for line in text.splitlines() if line.startswith("digest")))
    assert len(found) == 1
    # The plain sum in another order has other bits, or this test could not fail.
    values = [torch.randn(1003, generator=torch.Generator().manual_seed(shard)) for shard in range(8)]
    assert not torch.equal(sum(values), sum(reversed(values)))


def test_a_flat_vector_keeps_the_layout_of_each_tensor():
    tensors = [torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(5), torch.randn(())]
    gaps = torch.randn(3, 5)[:, :2]  # a slice: its strides would reach into its neighbours
    tensors += [gaps, torch.randn(4)]
    flat = Flat(tensors, extra=1)
    packed = flat.pack(tensors, [torch.tensor(7.0)])
    assert packed[-1] == 7
    for view, tensor in zip(flat.views(packed), tensors, strict=True):
        assert torch.equal(view, tensor)
        assert view.stride() == tensor.stride() or tensor is gaps
