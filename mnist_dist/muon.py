"""Muon: momentum, with each kernel's update made orthogonal.

After Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024, kellerjordan.github.io/posts/muon), with the step size
of Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982, 2025). torch.optim.Muon takes matrices only; here a convolution's
kernel [out, in, height, width] counts as the matrix [out, height * width * in], and what has one dimension is left to AdamW.
"""

from collections.abc import Iterable
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

    # torch's own versions of the next two import its compiler when they are first called, and a start would wait for that: 0.8 s.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own or the usual ones."""
        self.param_groups.append({**self.defaults, **param_group, "params": list(param_group["params"])})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set them to zero."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none or parameter.grad is None:
                    parameter.grad = None
                else:
                    parameter.grad.detach_().zero_()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, is_matrix = self.state[parameter], parameter.ndim >= 2
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                    if not is_matrix:
                        # A tensor, as a CUDA graph would keep a number that it was recorded with.
                        state |= {"square_average": torch.zeros_like(parameter), "updates": parameter.new_zeros(())}
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if is_matrix:
                    parameter.sub_(self._muon_update(parameter.grad, state, group))
                else:
                    parameter.sub_(_adam_update(parameter.grad, state).mul_(group["lr"]))

    def _muon_update(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        average = state["average"].lerp_(gradient, 1 - group["momentum"])
        # Nesterov's look ahead. The channels go last, as they lie in memory: a copy each way would cost as much as a product. The order of
        # its columns does not matter to what becomes of a matrix.
        ahead = gradient.lerp(average, group["momentum"]).movedim(1, -1)
        size = group["lr"] * _UPDATE_SIZE * max(len(gradient), gradient[0].numel()) ** 0.5
        return orthogonalize(ahead.flatten(1).to(self._dtype), size).view(ahead.shape).movedim(-1, 1)


def _adam_update(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    state["updates"] += 1
    average = state["average"].lerp_(gradient, 1 - _BETAS[0])
    square = state["square_average"].lerp_(gradient.square(), 1 - _BETAS[1])
    bias, square_bias = (1 - beta ** state["updates"] for beta in _BETAS)
    return average.div(bias).div_(square.div(square_bias).sqrt_().add_(_EPSILON))


def orthogonalize(matrix: Tensor, size: float | Tensor = 1.0) -> Tensor:
    """About the nearest matrix to `matrix` [m, n] with orthonormal rows (columns, where m > n), times `size`, in its dtype.

    By Newton-Schulz iteration: the singular values end between about 0.7 and 1.2 times `size`, which is close enough for an update, and
    takes matrix products alone.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    gram = x @ x.T
    norm = gram.diagonal().sum().sqrt() + 1e-7
    # Five rounds, in two groups: five at once would blow up the rounding of x @ x.T, which hides small singular values, hundredfold.
    x = (_find_factor(gram / norm.square(), rounds=2) / norm) @ x
    x = (_find_factor(x @ x.T, rounds=3) * size) @ x
    return x.T if is_tall else x


def _find_factor(gram: Tensor, rounds: int) -> Tensor:
    """What some rounds together multiply x by, from `gram` = x @ x.T alone: its products are small where x is wide."""
    whole = factor = _find_factor_of_one(gram)
    for _ in range(rounds - 1):
        gram = factor @ gram @ factor
        factor = _find_factor_of_one(gram)
        whole = factor @ whole
    return whole


def _find_factor_of_one(gram: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor
