"""The state of a training: all that a checkpoint must hold, and nothing that depends on the world."""

import time
from typing import Any

import torch
from torch import nn

from mnist_dist import checkpoint
from mnist_dist.config import Config
from mnist_dist.distributed import Group
from mnist_dist.model import build_model
from mnist_dist.optimization import build_optimizer
from mnist_dist.record import check_same


class TrainingState:
    """The model as Accelerate prepared it, its optimizer, the steps done, and the time they took."""

    def __init__(self, config: Config, fingerprint: str, group: Group) -> None:
        self.config = config
        self.fingerprint = fingerprint
        self.bare_model: nn.Module = build_model(config.seed).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.bare_model.parameters(), config, group.precision, group.device)
        # The optimizer is used bare: Accelerate's wrapper would scale and accumulate gradients, which is not wanted here, and looks for
        # an optional package on the disk twice in each step, which takes longer than a batch takes to augment.
        self.model, _ = group.accelerator.prepare(self.bare_model, self.optimizer)
        self.step = 0
        self._start_s = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, those of earlier starts included."""
        return time.perf_counter() - self._start_s

    def gradient_norm(self) -> float:
        """The 2-norm of the last step's gradient of the global batch, the same on every rank."""
        gradients = [parameter.grad for parameter in self.bare_model.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def is_finite(self) -> bool:
        """Whether every parameter is a finite number."""
        return all(bool(parameter.isfinite().all()) for parameter in self.bare_model.parameters())

    def encode(self) -> bytes:
        """The state as the bytes of a checkpoint."""
        return checkpoint.encode(
            {
                "step": self.step,
                "recipe": self.config.recipe(),
                "data": self.fingerprint,
                "elapsed_s": self.elapsed_s,
                "model": self.bare_model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def restore(self, content: bytes) -> None:
        """Take over the state in a checkpoint's bytes. Raises `UserError` for one of another recipe, model or data set."""
        state = checkpoint.decode(content)
        check_same(state["recipe"], self.config.recipe(), "the checkpoint is of another run; use another run_dir, or the same options:")
        check_same(
            _shapes(state["model"]), _shapes(self.bare_model.state_dict()), "the checkpoint is of another model; use another run_dir:"
        )
        check_same(
            {"data": state["data"]},
            {"data": self.fingerprint},
            "the checkpoint was trained on other data; use another run_dir, or the same data:",
        )
        self.bare_model.load_state_dict(state["model"])
        # Its settings follow from the config and the machine; those in the checkpoint may be of another machine.
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
        self.step = state["step"]
        self._start_s = time.perf_counter() - state["elapsed_s"]


def _shapes(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
