"""The optimizer, and the learning rate as a function of the step (no scheduler object: Accelerate's would step once for each process)."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mnist_dist.config import Config
from mnist_dist.muon import Muon


def learning_rate_at(config: Config, step: int) -> float:
    """Learning rate of the step that follows `step` done steps."""
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "step":
        return config.learning_rate * (1.0 if 4 * step < 3 * config.total_steps else 0.1)
    # One cycle after Smith & Topin, "Super-Convergence" (2018): up, then down to zero, along a line as there or, in the form that became
    # common, along a half cosine. Measured at the middle of the step, so that neither the first nor the last one is lost to a rate of zero.
    progress = (step + 0.5) / config.total_steps
    if progress < config.warmup:
        return config.learning_rate * progress / config.warmup
    descent = (progress - config.warmup) / (1 - config.warmup)
    left = 1 - descent if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * descent))
    return config.learning_rate * left


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Let the next step have `learning_rate`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def _leave_out_compiler(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """`kind` with the methods that its own ones wrap.

    The wrappers import torch's compiler, which no step uses: a start would wait 0.8 s for it.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step")
    bare = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), bare | {"step": torch.no_grad()(bare["step"])})


_MUON, _SGD, _ADAMW = map(_leave_out_compiler, (Muon, torch.optim.SGD, torch.optim.AdamW))


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: Config, precision: str, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """The optimizer of `config`; SGD and AdamW in their fused form, one kernel for all parameters. `precision` is fp32 or bf16.

    With `config.cuda_graph` its learning rate is a tensor on `device`, which a graph reads anew at each step.
    """
    parameters = list(parameters)
    rate: Any = torch.tensor(config.learning_rate, device=device) if config.cuda_graph else config.learning_rate
    if config.optimizer == "muon":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return _MUON(parameters, rate, config.momentum, config.weight_decay, dtype)
    if config.optimizer == "sgd":
        return _SGD(
            parameters,
            rate,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return _ADAMW(parameters, rate, (config.momentum, 0.999), weight_decay=config.weight_decay, fused=True, capturable=config.cuda_graph)


def describe_state(parameters: Iterable[nn.Parameter], config: Config) -> dict[str, list[int]]:
    """The shape of each tensor that the optimizer of `config` keeps once it has made a step, by the parameter's index and its own name."""
    shapes: dict[str, list[int]] = {}
    for index, parameter in enumerate(parameters):
        if not parameter.requires_grad:  # a frozen one is never stepped
            continue
        like_parameter, single = {
            "muon": (["average"], []) if parameter.ndim >= 2 else (["average", "square_average"], ["updates"]),
            "sgd": (["momentum_buffer"] if config.momentum else [], []),
            "adamw": (["exp_avg", "exp_avg_sq"], ["step"]),
        }[config.optimizer]
        shapes |= {f"{index}/{name}": list(parameter.shape) for name in like_parameter} | {f"{index}/{name}": [] for name in single}
    return shapes
