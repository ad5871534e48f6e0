"""Exact evaluation over any number of processes."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_dist.augment import make_inputs
from mnist_dist.config import CLASSES
from mnist_dist.data import Split
from mnist_dist.distributed import Group
from mnist_dist.errors import RunError

_BATCH = 500
_MISTAKES = 100


class Mistake(NamedTuple):
    """A wrong prediction: the image's place in its split, and the probability of each class."""

    place: int
    probabilities: list[float]


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a split.

    `confusion_matrix[i][j]`: images of class i that were taken for class j. `mistakes`: wrong predictions, at most 100, the most confident
    first.
    """

    loss: float
    confusion_matrix: list[list[int]]
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(map(sum, self.confusion_matrix))

    @property
    def errors(self) -> int:
        """Number of wrong predictions."""
        return self.images - sum(self.confusion_matrix[i][i] for i in range(len(self.confusion_matrix)))

    @property
    def accuracy(self) -> float:
        """Part of the images that are right (fraction)."""
        return 1 - self.errors / self.images

    @property
    def class_accuracy(self) -> list[float | None]:
        """Part of the images of each class that are right (fraction); None for a class without images."""
        return [row[label] / sum(row) if any(row) else None for label, row in enumerate(self.confusion_matrix)]

    def name_values(self, split: str, *names: str) -> dict[str, Any]:
        """The attributes called `names`, under the names that files give them: `test/loss` where `split` is `test`."""
        return {f"{split}/{name}": getattr(self, name) for name in names}


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, mean: float, std: float, group: Group) -> Evaluation:
    """Mean cross-entropy and confusion matrix of `model` on `split`.

    Each rank takes a disjoint slice; sums are reduced once and divided once. Raises `RunError` unless exactly the split was counted.
    """
    model = group.accelerator.unwrap_model(model)  # DDP's own forward would expect all ranks to have as many batches
    training = model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=group.device)
    confusion = torch.zeros(CLASSES * CLASSES, dtype=torch.float64, device=group.device)
    probabilities, wrong = [torch.empty(0, CLASSES, device=group.device)], [torch.empty(0, dtype=torch.bool, device=group.device)]
    mine = torch.arange(len(split), device=split.labels.device)[group.rank :: group.size]
    for indices in torch.split(mine, _BATCH):
        images, labels = split.images[indices], split.labels[indices]
        logits = model(make_inputs(images, mean, std)).float()
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        predicted = logits.argmax(dim=1)
        confusion += _count(labels * CLASSES + predicted)
        probabilities.append(logits.softmax(dim=1))
        wrong.append(predicted != labels)
    model.train(training)
    sums = group.sum(torch.cat([loss_sum.reshape(1), confusion])).tolist()  # float64 is exact for counts
    counts = [round(count) for count in sums[1:]]
    if sum(counts) != len(split):
        raise RunError(f"the evaluation counted {sum(counts)} images, but the split has {len(split)}: its ranks do not share it rightly")
    if not math.isfinite(sums[0]):
        raise RunError(f"the loss of the evaluation is {sums[0]}: the weights or their outputs are not finite numbers")
    # Only now, so that no batch waits for the device.
    mistaken = torch.cat(wrong).nonzero().flatten()
    mistakes = list(map(Mistake, mine[mistaken.to(mine.device)].tolist(), torch.cat(probabilities)[mistaken].tolist()))
    mistakes = [mistake for part in group.gather(_most_confident(mistakes)) for mistake in part]
    confusion_matrix = [counts[i : i + CLASSES] for i in range(0, CLASSES**2, CLASSES)]
    return Evaluation(sums[0] / len(split), confusion_matrix, _most_confident(mistakes))


def _most_confident(mistakes: list[Mistake]) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: (-max(mistake.probabilities), mistake.place))[:_MISTAKES]


def _count(cells: Tensor) -> Tensor:
    # A comparison and a sum, not bincount: bincount on CUDA is not deterministic and waits for the device.
    return (cells.unsqueeze(1) == torch.arange(CLASSES**2, device=cells.device)).sum(dim=0).double()
