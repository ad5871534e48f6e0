"""A task whose samples are random, read from a data set that is not in memory, and that fails where a test wants it to."""

import os
import random
import signal
import time
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mnist_dist.task import Data, Tally, option
from mnist_dist.tasks.classification import Classification


class Noisy(Dataset):
    def __init__(self, task: "NoisyTask", count: int) -> None:
        self.task = task
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.task.fault_at and torch.utils.data.get_worker_info() is not None:
            if self.task.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            while self.task.fault == "hangs":
                time.sleep(1)
        if index == self.task.fault_at and self.task.fault == "raises":
            raise ValueError("this picture is torn")
        if index == self.task.fault_at and self.task.fault == "exits":
            raise SystemExit(3)
        if self.task.slow_s:
            time.sleep(self.task.slow_s)
        # A draw from each of the three generators, and a sum that several threads would round in another way.
        noise = torch.rand(1, 8, 8) + random.random() + float(np.random.rand()) + torch.rand(70_000).sum() * 3e-5
        return 0.3 * noise + index % 3, index % 3


STEPS: list[int] = []


def is_last() -> bool:
    return os.environ.get("RANK", "0") == os.environ.get("LAST", "0")


class NoisyTask(Classification):
    class_names = ("low", "middle", "high")

    fault: Literal["none", "dies", "hangs", "raises", "exits", "in tally", "in losses", "killed in losses"] = option("none", recipe=False)
    fault_at: int = option(-1, recipe=False)
    slow_s: float = option(0.0, recipe=False)
    dropout: float = 0.0
    norm: bool = False

    def load(self) -> Data:
        return Data(Noisy(self, 100), Noisy(self, 31))

    def draw(self, seed: int, step: int, size: int) -> None:
        """Nothing; it notes the step that comes."""
        STEPS.append(step)

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor], drawn: Tensor | None) -> Tensor:
        """Those of a classifier; the last rank fails in the step after `fault_at`, once the model has computed."""
        found = super().losses(model, batch, drawn)
        if model.training and self.fault.endswith("in losses") and is_last() and STEPS[-1] == self.fault_at:
            if self.fault == "in losses":
                raise ValueError("these samples are odd")
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def tally(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tally:
        """That of a classifier; the last rank fails in the evaluations after step `fault_at`, and after later ones."""
        if self.fault == "in tally" and STEPS[-1] + 1 >= self.fault_at and is_last():
            raise ValueError("these weights are odd")
        return super().tally(model, batch)

    def build_model(self) -> nn.Module:
        norm = nn.BatchNorm1d(16) if self.norm else nn.Identity()
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), norm, nn.ReLU(), nn.Dropout(self.dropout), nn.Linear(16, 3))
