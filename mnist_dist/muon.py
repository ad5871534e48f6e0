"""Muon: momentum, with each kernel's update made orthogonal.

After Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024, kellerjordan.github.io/posts/muon), with the step size
of Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982, 2025). torch.optim.Muon takes matrices only; here a convolution's
kernel [out, in, height, width] counts as the matrix [out, height * width * in], whose rows are taken in at most four blocks where they are
more than 64. What has one dimension is left to AdamW.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Odd polynomials of degree five, one after the other. They take singular values between 0.01 and 1 close to 1, and multiply smaller ones by
# up to 78 (Amsel et al., "The Polar Express", arXiv 2505.16932, 2025). Each is the best for its interval made 1 % wider: rounding may push
# values out, and there a polynomial shoots up.
_ROUNDS = ((8.0172, -22.941, 16.6113), (3.6183, -2.6587, 0.5137), (2.6797, -1.9654, 0.4401))
# A typical entry of an AdamW update is about 0.2 to 0.4 of the learning rate; this brings Muon's to the same size (Liu et al.), so that one
# learning rate serves kernels of every shape, and the biases.
_UPDATE_SIZE = 0.2
_BETAS = (0.9, 0.99)
_EPSILON = 1e-8
# Matrices with at most so many rows are padded to this: one product of several is as quick as that of one.
_SMALL = 64
# A kernel with more rows is cut into at most so many blocks: the work grows with the rows that are made orthogonal to each other. Each
# block takes full steps along what all have in common, so many blocks would want a lower rate. The layers of a transformer learned worse
# in blocks, and stay whole.
_BLOCKS = 4
# Matrices with at most so many rows, or columns, keep all of their digits: they need fewer products then, and each is quick anyway.
_EXACT = 128


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two dimensions or more, AdamW for the others; weight decay is decoupled in both.

    `dtype` is that of the orthogonalisation of blocks with more than 128 rows and columns; smaller ones, the parameters and all of the
    state keep their own. Every rank computes the same update from the same gradient, so nothing more is exchanged than with SGD.
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
                        updates = torch.zeros((), dtype=torch.float32, device=parameter.device)
                        state |= {"square_average": torch.zeros_like(parameter), "updates": updates}
            if matrices := [parameter for parameter in parameters if parameter.ndim >= 2]:
                self._update_matrices(matrices, group)
            if vectors := [parameter for parameter in parameters if parameter.ndim < 2]:
                self._update_vectors(vectors, group)

    def _update_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """By Muon."""
        gradients, averages = _find_gradients(parameters), self._find("average", parameters)
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        # Nesterov's look ahead. The channels go last, as they lie in memory: a copy each way would cost as much as a product. The order of
        # its columns does not matter to what becomes of a matrix.
        ahead = [each.movedim(1, -1) for each in torch._foreach_lerp(gradients, averages, group["momentum"])]
        updates = orthogonalize([self._make_blocks(each) for each in ahead], group["lr"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for parameter, update, shaped in zip(parameters, updates, ahead, strict=True):
            size = _UPDATE_SIZE * max(update.shape[1:]) ** 0.5
            rows = update.flatten(0, 1)[: len(parameter)]
            parameter.sub_(rows.view(shaped.shape).movedim(-1, 1), alpha=size)

    def _make_blocks(self, kernel: Tensor) -> Tensor:
        """The rows of a kernel, or a matrix, in blocks [count, rows, columns], in the dtype of their orthogonalisation.

        Where they do not come out even, the last block ends in rows of zeros, which stay zeros.
        """
        matrix = kernel.flatten(1)
        is_cut = len(matrix) <= matrix.shape[1] and kernel.shape[-1] < matrix.shape[1]  # of more than one position
        count = min(math.ceil(len(matrix) / _SMALL), _BLOCKS) if is_cut else 1
        rows = math.ceil(len(matrix) / count)
        if missing := count * rows - len(matrix):
            matrix = nn.functional.pad(matrix, (0, 0, 0, missing))
        if min(rows, matrix.shape[1]) > _EXACT:
            matrix = matrix.to(self._dtype)
        return matrix.view(count, rows, matrix.shape[1])

    def _update_vectors(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """By AdamW."""
        adamw(
            parameters,
            _find_gradients(parameters),
            self._find("average", parameters),
            self._find("square_average", parameters),
            [],
            self._find("updates", parameters),
            fused=True,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=_EPSILON,
            maximize=False,
        )

    def _find(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        return [self.state[parameter][name] for parameter in parameters]


def _find_gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.inference_mode()  # autograd's record of so many small operations would cost a twentieth of the time
def orthogonalize(matrices: Sequence[Tensor], size: float | Tensor = 1.0) -> list[Tensor]:
    """Of each matrix in tensors [count, m, n] about the nearest with orthonormal rows (columns, where m > n), times `size`, in its dtype.

    By Newton-Schulz iteration: all but small singular values end between about 0.7 and 1.3 times `size`. That is close enough for an
    update, and takes matrix products alone. Those of matrices with as many rows are done together, and so are those of all small ones.
    """
    wide = [each.mT if each.shape[1] > each.shape[2] else each for each in matrices]
    batches: dict[int, list[int]] = {}
    for place, x in enumerate(wide):
        batches.setdefault(max(x.shape[1], _SMALL), []).append(place)
    for side, places in batches.items():
        xs = [wide[place] for place in places]
        grams = _multiply_by_own(xs, side)
        scales: Tensor | float = _normalize(grams)
        factors = _find_factors(grams, _ROUNDS[0])
        rounds: Sequence[tuple[float, float, float]] = _ROUNDS[1:]
        # With all rounds at once x is in two products only. Where numbers have few digits, those of x @ x.T hide small singular values: the
        # first round lifts them, and x @ x.T is made anew.
        if torch.finfo(grams.dtype).bits <= 16:
            xs = _multiply(factors * scales, xs)
            grams, scales = _multiply_by_own(xs, side), 1.0
            factors, rounds = _find_factors(grams, rounds[0]), rounds[1:]
        whole = factors
        for coefficients in rounds:
            grams = factors.bmm(grams).bmm(factors)
            factors = _find_factors(grams, coefficients)
            whole = factors.bmm(whole)
        for place, x in zip(places, _multiply(whole * (scales * size), xs), strict=True):
            wide[place] = x
    return [x.mT if each.shape[1] > each.shape[2] else x for x, each in zip(wide, matrices, strict=True)]


def _multiply_by_own(xs: Sequence[Tensor], side: int) -> Tensor:
    """The product x @ x.T of each matrix, as one tensor [matrices, side, side], with zeros where x has fewer rows: they stay so."""
    grams = xs[0].new_zeros(sum(map(len, xs)), side, side)
    for gram, x in zip(_split(grams, xs), xs, strict=True):
        torch.bmm(x, x.mT, out=gram)
    return grams


def _multiply(factors: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    return [factor.bmm(x) for factor, x in zip(_split(factors, xs), xs, strict=True)]


def _split(squares: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """Of `squares` [matrices, side, side] what belongs to each of `xs`, without the padding."""
    return [own[:, : x.shape[1], : x.shape[1]] for own, x in zip(torch.split(squares, [*map(len, xs)]), xs, strict=True)]


def _normalize(grams: Tensor) -> Tensor:
    """Divide each x @ x.T, in place, so that no singular value of x is above 1; return what x is to be multiplied by for that.

    (x @ x.T)^2 has a norm whose fourth root is a closer bound than the norm of x. Divided by the one, n equal singular values become
    n^(-1/8), and n^(-1/2) by the other. An x of a norm below about 1e-7 becomes smaller, and zeros stay.
    """
    norms = torch.linalg.vector_norm(grams, dim=(1, 2), keepdim=True).clamp_(min=1e-14)
    grams.div_(norms)  # or the squares of small ones would be zero
    bounds = torch.linalg.vector_norm(grams.bmm(grams), dim=(1, 2), keepdim=True).sqrt_().clamp_(min=1e-7)
    grams.div_(bounds)
    return norms.mul_(bounds).rsqrt_()


def _find_factors(grams: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """What a round multiplies each x by, from its x @ x.T alone: products that are small where x is wide."""
    a, b, c = coefficients
    factors = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
    factors.diagonal(dim1=1, dim2=2).add_(a)
    return factors
