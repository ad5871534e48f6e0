"""Muon against torch's own optimizers, where they do the same."""

import pytest
import torch

from mnist_dist import muon
from mnist_dist.muon import Muon


def follow(optimizer, parameter, steps=5):
    """`parameter` after some steps down the same hill."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        parameter.grad = torch.randn(parameter.shape, generator=generator) + parameter.detach()
        optimizer.step()
    return parameter.detach()


def make_parameter(*shape):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def orthogonalize(matrices, size=1.0):
    """What becomes of matrices [m, n]."""
    return [result.squeeze(0) for result in muon.orthogonalize([matrix.unsqueeze(0) for matrix in matrices], size)]


def turn(matrix):
    """The nearest matrix with orthonormal rows or columns, of each."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left @ right).to(matrix.dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (150, 140)])
def test_a_matrix_moves_as_with_torchs_muon(monkeypatch, shape, dtype, bound):
    # Each takes polynomials of its own: both get the exact matrix in their place.
    monkeypatch.setattr("mnist_dist.muon.orthogonalize", lambda matrices, size: [turn(matrix) * size for matrix in matrices])
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda matrix, *_: turn(matrix))
    here, there = make_parameter(*shape), make_parameter(*shape)
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    moved = follow(Muon([here], **options, dtype=dtype), here)
    expected = follow(torch.optim.Muon([there], **options, adjust_lr_fn="match_rms_adamw"), there)
    assert float((moved - expected).abs().max()) < bound * float((moved - make_parameter(*shape).detach()).abs().max())


@pytest.mark.parametrize(("shape", "same"), [((128, 300), True), ((300, 12), True), ((129, 130), False)])
def test_a_small_matrix_keeps_all_digits(shape, same):
    exact, rounded = make_parameter(*shape), make_parameter(*shape)
    follow(Muon([exact], lr=0.02, dtype=torch.float32), exact)
    follow(Muon([rounded], lr=0.02, dtype=torch.bfloat16), rounded)
    assert torch.equal(exact, rounded) == same


def test_a_vector_moves_as_with_torchs_adamw():
    here, there = make_parameter(20), make_parameter(20)
    moved = follow(Muon([here], lr=0.02, weight_decay=0.1), here)
    assert torch.allclose(moved, follow(torch.optim.AdamW([there], lr=0.02, betas=(0.9, 0.99), weight_decay=0.1), there), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((64, 9, 3, 3), 64),
        ((256, 40, 3, 3), 64),
        ((300, 40, 3, 3), 75),  # at most four blocks
        ((131, 20, 3, 3), 44),  # which do not come out even
        ((300, 2, 3, 3), 300),  # fewer columns than rows
        ((70, 80, 1, 1), 70),  # no more than a matrix
        ((70, 30, 3), 35),
    ],
)
def test_a_kernel_of_many_channels_moves_a_block_at_a_time(shape, rows):
    kernel = make_parameter(*shape)
    blocks = [torch.nn.Parameter(block.flatten(1)) for block in kernel.detach().clone().split(rows)]
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(2))
    Muon([kernel], lr=0.1).step()
    for block, gradient in zip(blocks, kernel.grad.split(rows), strict=True):
        block.grad = gradient.flatten(1)
        Muon([block], lr=0.1).step()
    assert torch.allclose(kernel.detach().flatten(1), torch.cat(blocks), atol=1e-5)


def test_a_kernel_moves_as_its_matrix_in_any_memory_format():
    matrix, kernel, last = make_parameter(8, 36), make_parameter(8, 4, 3, 3), make_parameter(8, 4, 3, 3)
    with torch.no_grad():
        kernel.copy_(matrix.view_as(kernel))
        last.copy_(matrix.view_as(last))
    last = torch.nn.Parameter(last.detach().to(memory_format=torch.channels_last))
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(8, 36, generator=generator)
    for parameter in (matrix, kernel, last):
        parameter.grad = gradient.view(parameter.shape).clone(memory_format=torch.preserve_format)
        Muon([parameter], lr=0.1, dtype=torch.float32).step()
    assert torch.equal(kernel, last)
    assert torch.allclose(kernel.detach().flatten(1), matrix.detach(), atol=1e-6)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 0.02), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("shape", [(64, 288), (50, 4096), (32, 9), (10, 50), (300, 40), (1, 1), (1, 70)])
def test_a_matrix_becomes_about_its_nearest_orthonormal_one(shape, dtype, slack):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    [result] = orthogonalize([matrix], 0.5)
    assert result.dtype == dtype
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    parts = left.T @ result.double() @ right.T / 0.5
    assert values.min() > 0.01 * values.max()  # else it would not be asked of it
    assert float((parts - torch.eye(len(values))).abs().max()) < 0.27 + slack


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e8])
def test_the_size_of_a_gradient_does_not_matter(scale):
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(orthogonalize([matrix * scale])[0], orthogonalize([matrix])[0], atol=1e-4)


def test_a_gradient_of_zeros_moves_nothing():
    assert orthogonalize([torch.zeros(4, 6)])[0].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 288), (50, 4096)])
def test_small_singular_values_grow_and_do_not_blow_up(shape, dtype):
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(size, shape[0], generator=generator))[0] for size in shape)
    steep = (left * torch.logspace(0, -4, shape[0])) @ right.T
    result = orthogonalize([steep.to(dtype)], 0.5)[0].float()
    assert float(torch.linalg.matrix_norm(result, 2)) < 0.5 * 1.4
    parts = (left.T @ result @ right).diagonal() / 0.5
    assert float(parts[: shape[0] // 2].min()) > 0.6  # down to a hundredth of the largest


def test_a_parameter_without_a_gradient_stays():
    used, unused = make_parameter(4, 4), make_parameter(4)
    optimizer = Muon([used, unused], lr=0.1)
    follow(optimizer, used, steps=1)
    assert torch.equal(unused, make_parameter(4))
    assert unused not in optimizer.state


def test_matrices_together_become_what_each_becomes_alone():
    generator = torch.Generator().manual_seed(5)
    shapes = [(32, 9), (64, 288), (128, 576), (576, 128), (50, 4096), (10, 50), (1, 1)]
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    together = orthogonalize(matrices, 0.1)
    for matrix, result in zip(matrices, together, strict=True):
        assert result.shape == matrix.shape
        assert torch.allclose(result, orthogonalize([matrix], 0.1)[0], atol=1e-6)
