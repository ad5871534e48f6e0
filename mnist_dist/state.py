"""The state of a training: all that a checkpoint must hold, and nothing that depends on the world."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnist_dist import checkpoint
from mnist_dist.config import Config
from mnist_dist.distributed import Group
from mnist_dist.errors import RunError, UserError
from mnist_dist.model import build_model
from mnist_dist.optimization import build_optimizer, describe_state
from mnist_dist.record import check_same, find_step


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

    def settle(self, inputs: Tensor) -> None:
        """Let DDP lay out its buckets for good, by a backward pass on some `inputs` of the model whose gradients are dropped.

        DDP lays them out anew after the first backward pass of every start, in the order in which the gradients came. Where a number lies
        decides in which order three ranks or more add it up, so without this the first step of each start would round differently.
        """
        if self.model is not self.bare_model:
            self.model(inputs).sum().backward()
            self.optimizer.zero_grad()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, those of earlier starts included."""
        return time.perf_counter() - self._start_s

    def gradient_norm(self) -> float:
        """The 2-norm of the last step's gradient of the global batch, the same on every rank."""
        gradients = [parameter.grad for parameter in self.bare_model.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def count_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.bare_model.parameters() if parameter.requires_grad)

    def is_finite(self) -> bool:
        """Whether every parameter is a finite number."""
        return all(bool(parameter.isfinite().all()) for parameter in self.bare_model.parameters())

    def encode(self, rows: Sequence[int]) -> bytes:
        """The state as the bytes of a checkpoint, which also promises that metrics.jsonl has a row for each step of `rows`."""
        return checkpoint.encode(
            {
                "step": self.step,
                "recipe": self.config.recipe(),
                "data": self.fingerprint,
                "elapsed_s": self.elapsed_s,
                "rows": torch.tensor(rows, dtype=torch.int64),
                "model": self.bare_model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def restore(self, saved: checkpoint.Saved) -> list[int]:
        """Take over the state of a checkpoint; the steps of the rows that metrics.jsonl must have.

        Raises `UserError` for a checkpoint of another recipe, model or data set, `RunError` for one that this program cannot have written.
        """
        try:
            return self._restore(checkpoint.decode(saved.content), find_step(saved.path))
        except (UserError, RunError) as error:
            raise type(error)(f"checkpoint {saved.path}: {error}") from error

    def _restore(self, state: dict[str, Any], named_step: int) -> list[int]:
        model, optimizer = _read_field(state, "model", dict), _read_field(state, "optimizer", dict)
        slots = {
            f"{index!r}/{name}": value
            for index, tensors in _read_field(optimizer, "state", dict).items()
            for name, value in (tensors if isinstance(tensors, dict) else {"": None}).items()
        }
        step, elapsed_s = _read_field(state, "step", int), _read_field(state, "elapsed_s", float)
        rows = state.get("rows", torch.tensor([], dtype=torch.int64))
        # Options that came later had no say in an older run: their defaults do what it did.
        stored = _read_field(state, "recipe", dict)
        if not all(isinstance(name, str) and isinstance(value, str | int | float | None) for name, value in stored.items()):
            raise RunError("it is damaged: its recipe is not a list of options")
        recipe = Config.model_construct(**stored).recipe() | {name: stored[name] for name in stored if name not in Config.model_fields}
        check_same(recipe, self.config.recipe(), "it is of another run; use another run_dir, or the same options:")
        check_same(_shapes(model), _shapes(self.bare_model.state_dict()), "it is of another model; use another run_dir:")
        check_same(
            {"data": _read_field(state, "data", str)},
            {"data": self.fingerprint},
            "it was trained on other data; use another run_dir, or the same data:",
        )
        expected = describe_state(self.bare_model.parameters(), self.config)
        check_same(_shapes(slots), expected, "it is damaged, its optimizer's state is not complete:")
        for name, tensor in [*model.items(), *slots.items()]:
            if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise RunError(f"it is damaged: {name} holds values that are not finite float32 numbers")
        if step != named_step or not 1 <= step <= self.config.total_steps:
            raise RunError(f"it is damaged: its step is {step}, its name says {named_step}, and the run has {self.config.total_steps}")
        if not 0 <= elapsed_s < math.inf:
            raise RunError(f"it is damaged: its elapsed_s is {elapsed_s}")
        if not isinstance(rows, Tensor) or rows.is_meta or rows.layout != torch.strided or rows.dtype != torch.int64 or rows.ndim != 1:
            raise RunError("it is damaged: its rows are not a list of steps")
        if len(rows) > step or (len(rows) and (rows[0] < 1 or rows[-1] > step or bool((rows.diff() <= 0).any()))):
            raise RunError(f"it is damaged: its rows are not rising steps from 1 to {step}")
        self.bare_model.load_state_dict(model)
        # Its settings follow from the config and the machine; those in the checkpoint may be of another machine.
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer["state"], "param_groups": settings})
        self.step = step
        self._start_s = time.perf_counter() - elapsed_s
        return [int(row) for row in rows.tolist()]


def _read_field(state: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
        raise RunError(f"it is damaged: its {name} is missing or not of the kind {kind.__name__}")
    return state[name]


def _shapes(tensors: dict[str, Any]) -> dict[str, Any]:
    return {str(name)[:80]: list(tensor.shape) if isinstance(tensor, Tensor) else "no tensor" for name, tensor in tensors.items()}
