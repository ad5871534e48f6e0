"""Measures the training between two rows of the record, without waiting for the device in between."""

import math
import resource
import time

import torch
from torch import Tensor

from mnist_dist.config import Config
from mnist_dist.distributed import Group
from mnist_dist.errors import NotFiniteError
from mnist_dist.state import TrainingState
from mnist_dist.task import Row

_ADVICE = "the run stops here and keeps its last checkpoint (a lower learning_rate or more warmup may help)"


class Meter:
    """Collects the loss of each step; reads them all at once, on all ranks together."""

    def __init__(self, config: Config, group: Group, step: int, compare_ranks: bool) -> None:
        self.config = config
        self.group = group
        self._compares = compare_ranks
        self._losses: list[Tensor] = []
        self._step = step  # steps done at the last reading
        self._since_s = time.perf_counter()
        self._begun_s = 0.0
        self._forward_s = 0.0

    def begin_step(self) -> None:
        """Note that a step begins."""
        self._begun_s = time.perf_counter()

    def note_forward(self) -> None:
        """Note that this rank's forward pass of the step is done: what comes after it waits for the other ranks."""
        self._forward_s += time.perf_counter() - self._begun_s

    def add(self, loss: Tensor) -> None:
        """Note the loss of one step: a scalar on the device, whose mean over the ranks is the global batch's."""
        self._losses.append(loss)

    def check(self, state: TrainingState) -> float:
        """The mean loss over the global batch of the last step, NaN if there was none since the last reading; forgets what it has read.

        Raises `NotFiniteError` on all ranks if any loss since the last reading was not finite, and as `check_weights` does; then the state
        is not to be saved.
        """
        if not self._losses:
            return math.nan
        losses = self.group.gather_rows(torch.stack(self._losses))  # [world_size, steps]
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            state.unsettle()
            rank, index = min(bad.tolist(), key=lambda place: (place[1], place[0]))
            where = "" if self.config.shards else f" on rank {rank}"  # with shards each rank has the loss of all
            step = self._step + index + 1
            advice = _ADVICE if step > 1 else "no step was made before, so it is a sample's: `python -m mnist_dist.check` looks at some"
            raise NotFiniteError(f"the loss is {losses[rank, index].item()} at step {step}{where}; {advice}")
        if self._compares:
            state.check_weights()
        self._step += len(self._losses)
        self._losses.clear()
        return losses[:, -1].double().mean().item()

    def read(self, state: TrainingState, learning_rate: float) -> Row:
        """The row of the step just done. Raises `NotFiniteError` as `check` does."""
        steps = len(self._losses)
        loss = self.check(state)
        assert self._step == state.step
        elapsed_s = time.perf_counter() - self._since_s
        health = {"health/step_s": round(elapsed_s / steps, 6), "health/memory_gb": round(self._measure_memory_gb(), 3)}
        if self.group.size > 1 and self.group.device.type == "cpu":  # a GPU runs behind the clock of its host
            forward_s = self.group.gather_rows(torch.tensor(self._forward_s, dtype=torch.float64))
            slowest = int(forward_s.argmax())
            health |= {"health/slowest_rank": slowest, "health/slowest_to_median": round(float(forward_s[slowest] / forward_s.median()), 3)}
        self.reset_clock()
        gradient_norm = state.gradient_norm()
        if not math.isfinite(gradient_norm):
            raise NotFiniteError(f"the gradient norm is {gradient_norm} at step {state.step}; {_ADVICE}")
        return {
            "step": state.step,
            "epoch": round(state.step / self.config.steps_per_epoch, 4),
            "train/loss": loss,
            "train/learning_rate": learning_rate,
            "train/gradient_norm": gradient_norm,
            "train/images_per_s": round(steps * self.config.batch_size / elapsed_s, 1),
            **health,
        }

    def _measure_memory_gb(self) -> float:
        """The most memory that rank zero's process, or its GPU, has had in use so far."""
        if self.group.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts kB

    def reset_clock(self) -> None:
        """Count the time from now on, as after an evaluation."""
        self._since_s = time.perf_counter()
        self._forward_s = 0.0
