"""Figures of classifiers: grids of samples with captions, right and wrong predictions, the confusion matrix."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from torch import Tensor, nn

from mnist_dist.figures import COLUMNS, DPI, INK, LINE, MUTED, SHOWN, make_figure

_ERRORS = LinearSegmentedColormap.from_list("errors", ["#fff1e5", "#ffb77c", "#bc4c00"])
_DIAGONAL = "#e6edf5"

_CAPTION_LETTERS, _LABEL_LETTERS = 10, 24  # of the name of a class: what a picture is wide, and what leaves room for the matrix

Read = Callable[[int], Tensor]


@dataclass(frozen=True)
class Predictions:
    """The label and the most probable class of each sample, int64 [n], and the latter's probability, float32 [n], on the CPU."""

    labels: Tensor
    classes: Tensor
    probabilities: Tensor

    @classmethod
    @torch.inference_mode()
    def collect(cls, task: Any, model: nn.Module, batches: Iterable[Any]) -> "Predictions":
        """What `model` makes of the samples in `batches`."""
        training = model.training
        model.eval()
        labels, found = [], []
        for batch in batches:
            inputs, wanted = task.make_inputs(batch)
            labels.append(wanted.cpu())
            found.append([value.cpu() for value in model(inputs).float().softmax(dim=1).max(dim=1)])
        model.train(training)
        probabilities, classes = (torch.cat(values) for values in zip(*found, strict=True))
        return cls(torch.cat(labels), classes, probabilities)

    def find_hardest(self) -> Tensor:
        """Indices int64 [k] of the samples whose prediction is wrong, the most confident first."""
        wrong = (self.classes != self.labels).nonzero().flatten()
        return wrong[self.probabilities[wrong].argsort(descending=True, stable=True)]


def draw_grid(images: Sequence[Tensor] | Tensor, captions: Sequence[str], title: str, subtitle: str = "") -> Figure:
    """`images`, each uint8 [height, width] or [height, width, 3], or float from 0 to 1, ten in a row, with captions of any lines below."""
    # All lengths are in units of which a picture is 28 wide.
    side, gap, line = 28, 6, 6.5
    height = side + gap + line * max([caption.count("\n") + bool(caption) for caption in captions], default=0)
    top, rows = 18, -(-len(images) // COLUMNS)
    width, total = gap + COLUMNS * (side + gap), top + max(rows * height + gap, line)
    # Four pixels of the figure for each unit: a picture of 28 x 28 is not interpolated.
    figure = Figure(figsize=(width * 4 / DPI, total * 4 / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(index, COLUMNS)
        x, y = gap + column * (side + gap), top + row * height
        pixels = image.cpu().numpy()
        tall, wide = (side * length / max(pixels.shape[:2]) for length in pixels.shape[:2])
        left, upper = x + (side - wide) / 2, y + (side - tall) / 2
        white = 255 if pixels.dtype == np.uint8 else 1
        extent = (left, left + wide, upper + tall, upper)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=white, extent=extent, interpolation="nearest")
        place = (x + side / 2, y + side + 1.5)
        axes.text(*place, caption, ha="center", va="top", fontsize=9, color=INK, linespacing=1.15, parse_math=False)
    axes.set(xlim=(0, width), ylim=(total, 0), aspect="auto")
    axes.axis("off")
    axes.text(gap, 7, title, va="center", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    axes.text(gap, 13.5, subtitle, va="center", fontsize=9, color=MUTED, parse_math=False)
    return figure


def draw_correct(read: Read, predictions: Predictions, names: Sequence[str]) -> Figure:
    """The first samples whose prediction is right; `read` gives the picture of the sample at a place."""
    right = (predictions.classes == predictions.labels).nonzero().flatten()
    text = f"{len(right):,} of {len(predictions.labels):,}, of which the first: label and its probability"
    text = text if len(right) else f"None: all {len(predictions.labels):,} are wrong."
    return _draw_predictions(read, predictions, right, names, "Right predictions", text)


def draw_incorrect(read: Read, predictions: Predictions, names: Sequence[str]) -> Figure:
    """The samples whose prediction is wrong, the most confident first; a sentence where there are none."""
    wrong = predictions.find_hardest()
    shown = f"of which the {SHOWN} most confident" if len(wrong) > SHOWN else "the most confident first"
    text = f"{len(wrong):,} of {len(predictions.labels):,}, {shown}: true label → prediction and its probability"
    text = text if len(wrong) else f"None: all {len(predictions.labels):,} are right."
    return _draw_predictions(read, predictions, wrong, names, "Wrong predictions", text)


def _draw_predictions(read: Read, predictions: Predictions, indices: Tensor, names: Sequence[str], title: str, subtitle: str) -> Figure:
    chosen, names = indices[:SHOWN], _shorten(names, _CAPTION_LETTERS)
    arrow = "\n→ " if max(map(len, names)) > 3 else " → "
    values = (predictions.labels[chosen], predictions.classes[chosen], predictions.probabilities[chosen])
    captions = [
        f"{names[true]}{'' if true == predicted else arrow + names[predicted]}\n{probability:.1%}"
        for true, predicted, probability in zip(*(value.tolist() for value in values), strict=True)
    ]
    return draw_grid([read(place) for place in chosen.tolist()], captions, title, subtitle)


def _shorten(names: Sequence[str], most: int) -> list[str]:
    # In the middle: names are often alike but for their ends.
    return [name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}" for name in names]


def draw_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """The counts `confusion[true][predicted]`. Errors alone are coloured by their number, so that the diagonal does not drown them."""
    counts, classes, names = np.array(confusion), len(names), _shorten(names, _LABEL_LETTERS)
    errors = counts * ~np.eye(classes, dtype=bool)
    shades = errors / max(1, errors.max())
    colours = _ERRORS(shades)
    colours[errors == 0] = to_rgba("white")
    colours[range(classes), range(classes)] = to_rgba(_DIAGONAL)
    side = max(7.2, 0.55 * classes + 1)
    figure = make_figure(side, side + 0.4)
    axes = figure.add_subplot()
    axes.imshow(colours)
    for (true, predicted), count in np.ndenumerate(counts):
        colour = "white" if shades[true, predicted] > 0.7 else INK
        axes.text(predicted, true, f"{count:,}" if count else "", ha="center", va="center", fontsize=10, color=colour)
    places, edges = range(classes), np.arange(classes + 1) - 0.5
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    axes.set_xticks(places, names, parse_math=False, **turned)
    axes.set_yticks(places, names, parse_math=False)
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color=LINE, linewidth=0.8)
    axes.tick_params(which="both", length=0, labelcolor=INK, labelsize=10)
    axes.spines[:].set_color(LINE)
    axes.set_xlabel("predicted", color=MUTED)
    axes.set_ylabel("true", color=MUTED)
    axes.set_title("Confusion matrix", loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_title(f"{errors.sum():,} of {counts.sum():,} wrong", loc="right", fontsize=10, color=MUTED)
    return figure
