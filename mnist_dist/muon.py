"""Muon: momentum, with each kernel's update made orthogonal.

After Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024, kellerjordan.github.io/posts/muon), with the step size
of Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982, 2025). torch.optim.Muon takes matrices only; here a convolution's
kernel [out, in, height, width] counts as the matrix [out, height * width * in], and what has one dimension is left to AdamW.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# An odd polynomial of degree five that takes every singular value between 0 and 1 close to 1 within five rounds (Jordan et al.).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# A typical entry of an AdamW update is about 0.2 to 0.4 of the learning rate; this brings Muon's to the same size (Liu et al.), so that one
# learning rate serves kernels of every shape, and the biases.
_UPDATE_SIZE = 0.2
_BETAS = (0.9, 0.99)
_EPSILON = 1e-8
# Matrices with at most so many rows are padded to this: one product of several is as quick as that of one.
_SMALL = 64


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two dimensions or more, AdamW for the others; weight decay is decoupled in both.

    `dtype` is that of the orthogonalisation; the parameters and all of the state keep their own. Every rank computes the same update from
    the same gradient, so nothing more is exchanged than with SGD.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float | Tensor,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype = dtype  # not part of the state: it follows from the machine, as the precision of the model does

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is not called."""
        # All parameters at once: most are so small that on a GPU it takes longer to launch an operation than to do it.
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                    if parameter.ndim < 2:
                        # A tensor, as a CUDA graph would keep a number that it was recorded with.
                        state |= {"square_average": torch.zeros_like(parameter), "updates": parameter.new_zeros(())}
            kept = 1 - group["lr"] * group["weight_decay"]
            matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
            vectors = [parameter for parameter in parameters if parameter.ndim < 2]
            for update, chosen in ((self._update_matrices, matrices), (self._update_vectors, vectors)):
                if chosen:
                    torch._foreach_mul_(chosen, kept)
                    update(chosen, group)

    def _update_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """By Muon."""
        gradients, averages = _find_gradients(parameters), self._find("average", parameters)
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        # Nesterov's look ahead. The channels go last, as they lie in memory: a copy each way would cost as much as a product. The order of
        # its columns does not matter to what becomes of a matrix.
        ahead = [each.movedim(1, -1) for each in torch._foreach_lerp(gradients, averages, group["momentum"])]
        updates = orthogonalize([each.flatten(1).to(self._dtype) for each in ahead], group["lr"])
        for parameter, update, shaped in zip(parameters, updates, ahead, strict=True):
            size = _UPDATE_SIZE * max(update.shape) ** 0.5
            parameter.sub_(update.view(shaped.shape).movedim(-1, 1), alpha=size)

    def _update_vectors(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """By AdamW, but for its weight decay."""
        gradients, averages = _find_gradients(parameters), self._find("average", parameters)
        squares, updates = self._find("square_average", parameters), self._find("updates", parameters)
        torch._foreach_add_(updates, 1)
        torch._foreach_lerp_(averages, gradients, 1 - _BETAS[0])
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - _BETAS[1])
        means, roots = (
            torch._foreach_div(values, torch._foreach_add(torch._foreach_neg(torch._foreach_pow(beta, updates)), 1))
            for values, beta in zip((averages, squares), _BETAS, strict=True)
        )
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, _EPSILON)
        torch._foreach_div_(means, roots)
        torch._foreach_mul_(means, group["lr"])
        torch._foreach_sub_(parameters, means)

    def _find(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        return [self.state[parameter][name] for parameter in parameters]


def _find_gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def orthogonalize(matrices: Sequence[Tensor], size: float | Tensor = 1.0) -> list[Tensor]:
    """Of each matrix [m, n] about the nearest with orthonormal rows (columns, where m > n), times `size`, in its dtype.

    By Newton-Schulz iteration: the singular values end between about 0.7 and 1.2 times `size`, which is close enough for an update, and
    takes matrix products alone. Those of matrices with as many rows are done together, and so are those of all small ones.
    """
    wide = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    batches: dict[int, list[int]] = {}
    for place, x in enumerate(wide):
        batches.setdefault(max(len(x), _SMALL), []).append(place)
    for side, places in batches.items():
        xs = [wide[place] for place in places]
        grams = _multiply_by_own(xs, side)
        norms = grams.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True).unsqueeze(-1).sqrt() + 1e-7
        # Five rounds, in two groups: five at once would blow up the rounding of x @ x.T, which hides small singular values, hundredfold.
        xs = _multiply(_find_factors(grams / norms.square(), rounds=2) / norms, xs)
        xs = _multiply(_find_factors(_multiply_by_own(xs, side), rounds=3) * size, xs)
        for place, x in zip(places, xs, strict=True):
            wide[place] = x
    return [x.T if matrix.shape[0] > matrix.shape[1] else x for x, matrix in zip(wide, matrices, strict=True)]


def _multiply_by_own(xs: Sequence[Tensor], side: int) -> Tensor:
    """The product x @ x.T of each, as one tensor [len(xs), side, side], with zeros where x has fewer rows: they stay so."""
    grams = xs[0].new_zeros(len(xs), side, side)
    for gram, x in zip(grams, xs, strict=True):
        gram[: len(x), : len(x)] = x @ x.T
    return grams


def _multiply(factors: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    return [factor[: len(x), : len(x)] @ x for factor, x in zip(factors, xs, strict=True)]


def _find_factors(grams: Tensor, rounds: int) -> Tensor:
    """What some rounds together multiply each x by, from its x @ x.T alone: these products are small where x is wide."""
    whole = factors = _find_factors_of_one(grams)
    for _ in range(rounds - 1):
        grams = factors @ grams @ factors
        factors = _find_factors_of_one(grams)
        whole = factors @ whole
    return whole


def _find_factors_of_one(grams: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    factors = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
    factors.diagonal(dim1=1, dim2=2).add_(a)
    return factors
