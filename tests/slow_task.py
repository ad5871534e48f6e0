"""A task whose steps take a while without computing, so that a fault finds the run amid them and other tests have the cores."""

import os
import time
from typing import Any

from torch import Tensor

from mnist_dist.task import option
from mnist_dist.tasks.mnist import Mnist


class SlowDigits(Mnist):
    pause_s: float = option(0.1, recipe=False)
    until: str = option("", recipe=False)  # a file: once it exists, no step waits

    def make_inputs(self, batch: Any, drawn: Any = None) -> tuple[Tensor, Tensor]:
        if drawn is not None and not os.path.exists(self.until):  # a step of the training, no evaluation
            time.sleep(self.pause_s)
        return super().make_inputs(batch, drawn)
