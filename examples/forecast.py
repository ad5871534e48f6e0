"""Neither pictures nor classes: the next 12 values of a noisy wave from the last 48, with measures and a figure of its own.

python -m mnist_dist.train --task examples/forecast.py
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from mnist_dist.figures import make_figure
from mnist_dist.task import Data, Panel, Row, Tally, Task, option


class Forecast(Task):
    """A batch is (past float32 [n, 48], future float32 [n, 12]): what `load` has put into its `TensorDataset`."""

    samples = "series"
    best = "absolute_error"

    noise: float = option(0.1, "standard deviation of the noise in the waves", ge=0)
    width: int = option(128, "size of the hidden layers", ge=1)

    def load(self) -> Data:
        return Data(self._make_waves(8192, seed=1), self._make_waves(1024, seed=2))

    def _make_waves(self, count: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        period, phase, noise = (torch.rand(count, size, generator=generator) for size in (1, 1, 60))
        waves = torch.sin(6.28 * (torch.arange(60) / (8 + 32 * period) + phase)) + self.noise * (noise - 0.5) * 12**0.5
        return TensorDataset(waves[:, :48], waves[:, 48:])

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(48, self.width), nn.GELU(), nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, 12))

    def losses(self, model: nn.Module, batch: Any, drawn: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean(dim=1)

    def tally(self, model: nn.Module, batch: Any) -> Tally:
        past, future = batch
        errors, naive = (model(past) - future).double(), (past[:, -1:] - future).double()
        means = [torch.ones_like(naive), errors.square(), naive.abs()]
        return Tally(torch.stack([*(values.mean(dim=1) for values in means), *errors.abs().T]).sum(dim=1))

    def measure(self, sums: Tensor) -> Row:
        """`skill`: 1 for a perfect forecast, 0 for one that is no better than to repeat the last value."""
        loss, naive, *by_step = (sums[1:] / sums[0]).tolist()
        error = sum(by_step) / len(by_step)
        return {"loss": loss, "absolute_error": error, "skill": 1 - error / naive, "error_by_step": by_step}

    def draw_report(self, data: Data, model: nn.Module | None, batches: Any, measures: Row) -> list[Panel]:
        figure = make_figure(9.2, 3.5)
        axes = figure.subplots()
        for height, (past, future) in enumerate(zip(*(tensor[:3] for tensor in next(iter(batches))), strict=True)):
            axes.plot(torch.cat([past, future]).cpu() + 4 * height, color="C7")
            if model is not None:
                axes.plot(range(48, 60), model(past).cpu() + 4 * height, color="C1")
        return [Panel("Forecasts", "forecasts", figure=figure, caption="Grey: three series of the test data. Orange: the forecasts.")]
