"""Neither pictures nor classes: the next 12 values of a noisy wave from the last 48, with measures and a figure of its own.

python -m mnist_dist.train --task examples/forecast.py
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from mnist_dist.figures import calm, make_figure
from mnist_dist.task import Data, Panel, Row, Tally, Task, option


class Forecast(Task):
    """A batch is (past float32 [n, 48], future float32 [n, 12])."""

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
        first, second, last = nn.Linear(48, self.width), nn.Linear(self.width, self.width), nn.Linear(self.width, 12)
        return nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)

    def losses(self, model: nn.Module, batch: Any, drawn: Any) -> Tensor:
        past, future = batch
        return (model(past) - future).square().mean(dim=1)

    def tally(self, model: nn.Module, batch: Any) -> Tally:
        past, future = (part.double() for part in batch)
        errors, naive = model(batch[0]) - future, past[:, -1:] - future
        one = torch.ones(len(past), 1, dtype=torch.float64, device=past.device)
        return Tally(torch.cat([one, errors.square().mean(1, True), naive.abs().mean(1, True), errors.abs()], dim=1).sum(dim=0))

    def measure(self, sums: Tensor) -> Row:
        """`skill`: 1 for a perfect forecast, 0 for one that is no better than to repeat the last value."""
        loss, naive, *by_step = (sums[1:] / sums[0]).tolist()
        error = sum(by_step) / len(by_step)
        return {"loss": loss, "absolute_error": error, "skill": 1 - error / naive, "error_by_step": by_step}

    def draw_report(self, data: Data, model: nn.Module | None, batches: Any, measures: Row) -> list[Panel]:
        figure = make_figure(9.2, 3.5)
        axes = figure.subplots()
        for number, (past, future) in enumerate(zip(*(tensor[:3] for tensor in next(iter(batches))), strict=True)):
            axes.plot(torch.cat([past, future]).cpu() + 4 * number, color="C7", label="" if number else "the series")
            if model is not None:
                axes.plot(range(48, 60), model(past).cpu() + 4 * number, color="C1", label="" if number else "forecast")
        calm(axes)
        axes.legend()
        return [Panel("Forecasts", "forecasts", figure=figure)]
