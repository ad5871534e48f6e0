"""The pictures of a run, made from its folder alone: `python -m mnist_dist.plots runs/NAME`.

Drawn with matplotlib's objects, never with pyplot: there is no global state, no window and no display.
"""

if __name__ == "__main__":
    from mnist_dist.program import end_on_interrupt

    end_on_interrupt()


import io
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor, nn

from mnist_dist.augment import augment, draw_transforms, make_inputs
from mnist_dist.config import CLASSES, DIGITS, Config
from mnist_dist.console import set_up_logging
from mnist_dist.data import Split, load_dataset
from mnist_dist.errors import RunError, UserError
from mnist_dist.files import write_atomically
from mnist_dist.options import Parser, path_argument
from mnist_dist.program import print_answer
from mnist_dist.record import PLOTS, Row, Run, read_run
from mnist_dist.weights import load_model

_INK, _MUTED, _LINE = "#1f2328", "#656d76", "#d8dee4"
_BLUE, _ORANGE, _GREY = "#0969da", "#bc4c00", "#8c959f"
_ERRORS = LinearSegmentedColormap.from_list("errors", ["#fff1e5", "#ffb77c", "#bc4c00"])
_DIAGONAL = "#e6edf5"
_DPI = 150
_COLUMNS = 10
_SHOWN = 50  # images of one grid
_BATCH = 500

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictions:
    """The most probable class of each image, int64 [n], and its probability, float32 [n], on the CPU."""

    classes: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Drawing:
    """The pictures of a run by the names of their files, and a sentence for each that could not be drawn."""

    figures: dict[str, Figure]
    left_out: list[str]


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, mean: float, std: float) -> Predictions:
    """What `model` makes of `images` uint8 [n, 28, 28], in float32, on the model's device."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    batches = [model(make_inputs(batch.to(device), mean, std)).float().softmax(dim=1).max(dim=1) for batch in torch.split(images, _BATCH)]
    model.train(training)
    return Predictions(torch.cat([batch.indices for batch in batches]).cpu(), torch.cat([batch.values for batch in batches]).cpu())


def find_hardest(labels: Tensor, predictions: Predictions) -> Tensor:
    """Indices int64 [k] of the images whose prediction is wrong, the most confident first."""
    wrong = (predictions.classes != labels).nonzero().flatten()
    return wrong[predictions.probabilities[wrong].argsort(descending=True, stable=True)]


def draw_grid(images: Tensor, captions: Sequence[str], title: str, subtitle: str = "") -> Figure:
    """`images` uint8 [n, 28, 28], or float from 0 to 1, ten in a row, each with a caption of one or more lines below it."""
    side, gap, line = 28, 6, 6.5  # all lengths are in pixels of the data set
    height = side + gap + line * max([caption.count("\n") + bool(caption) for caption in captions], default=0)
    top, rows = 18, -(-len(images) // _COLUMNS)
    width, total = gap + _COLUMNS * (side + gap), top + max(rows * height + gap, line)
    # Four pixels of the picture for each pixel of the data: nothing is interpolated.
    figure = Figure(figsize=(width * 4 / _DPI, total * 4 / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    pixels = images.cpu().numpy()
    for index, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        row, column = divmod(index, _COLUMNS)
        x, y = gap + column * (side + gap), top + row * height
        white = 255 if image.dtype == np.uint8 else 1
        axes.imshow(image, cmap="gray", vmin=0, vmax=white, extent=(x, x + side, y + side, y), interpolation="nearest")
        axes.text(x + side / 2, y + side + 1.5, caption, ha="center", va="top", fontsize=9, color=_INK, linespacing=1.15)
    axes.set(xlim=(0, width), ylim=(total, 0), aspect="auto")
    axes.axis("off")
    axes.text(gap, 7, title, va="center", fontsize=12, fontweight="bold", color=_INK)
    axes.text(gap, 13.5, subtitle, va="center", fontsize=9, color=_MUTED)
    return figure


def draw_data_sample(split: Split, names: Sequence[str] = DIGITS) -> Figure:
    """The first images of each class."""
    places = [(split.labels == label).nonzero().flatten()[: _SHOWN // CLASSES].tolist() for label in range(CLASSES)]
    chosen = [same[row] for row in range(_SHOWN // CLASSES) for same in places if row < len(same)]
    captions = [names[label] for label in split.labels[chosen].tolist()]
    return draw_grid(split.images[chosen], captions, "Training images", f"The first of each class, from {len(split):,}")


def draw_augmented_sample(split: Split, config: Config) -> Figure:
    """Some images of `split`, each followed by variants that the augmentation of `config` draws."""
    originals = split.images[: _SHOWN // _COLUMNS]
    repeated = originals.repeat_interleave(_COLUMNS, dim=0)
    transforms = draw_transforms(config.model_copy(update={"batch_size": len(repeated)}), step=0)
    pixels = augment(repeated, transforms).squeeze(1)
    pixels[::_COLUMNS] = originals.float() / 255
    amounts = f"up to {config.rotation:g}° rotation, {config.shear:g}° shear, {config.scale:.0%} size, {config.shift:g} pixels shift"
    captions = ["original" if index % _COLUMNS == 0 else "" for index in range(len(repeated))]
    return draw_grid(pixels, captions, "Augmentation", f"Each row: an image, then what training may see of it: {amounts}")


def draw_correct(split: Split, predictions: Predictions, names: Sequence[str] = DIGITS) -> Figure:
    """The first images of `split` whose prediction is right."""
    right = (predictions.classes == split.labels).nonzero().flatten()
    text = f"{len(right):,} of {len(split):,}, of which the first: label and its probability"
    text = text if len(right) else f"None: all {len(split):,} are wrong."
    return _draw_predictions(split, predictions, right, names, "Right predictions", text)


def draw_incorrect(split: Split, predictions: Predictions, names: Sequence[str] = DIGITS) -> Figure:
    """The images of `split` whose prediction is wrong, the most confident first; a sentence where there are none."""
    wrong = find_hardest(split.labels, predictions)
    shown = f"of which the {_SHOWN} most confident" if len(wrong) > _SHOWN else "the most confident first"
    text = f"{len(wrong):,} of {len(split):,}, {shown}: true label → prediction and its probability"
    text = text if len(wrong) else f"None: all {len(split):,} are right."
    return _draw_predictions(split, predictions, wrong, names, "Wrong predictions", text)


def _draw_predictions(split: Split, predictions: Predictions, indices: Tensor, names: Sequence[str], title: str, subtitle: str) -> Figure:
    chosen = indices[:_SHOWN]
    arrow = "\n→ " if max(map(len, names)) > 3 else " → "
    values = (split.labels[chosen], predictions.classes[chosen], predictions.probabilities[chosen])
    captions = [
        f"{names[true]}{'' if true == predicted else arrow + names[predicted]}\n{probability:.1%}"
        for true, predicted, probability in zip(*(value.tolist() for value in values), strict=True)
    ]
    return draw_grid(split.images[chosen], captions, title, subtitle)


def draw_curves(rows: Sequence[Row], config: Config) -> Figure:
    """Losses, accuracy and learning rate over the steps of the rows of metrics.jsonl."""
    split, evaluated_on = config.evaluated_split, config.evaluated_on
    figure = Figure(figsize=(9.2, 6.2), dpi=_DPI, layout=_make_layout())
    panels: list[Axes] = figure.subplots(2, 2, sharex=True).flatten().tolist()
    curves = [
        ("train/loss", "Training loss", _BLUE, "{:.3f}"),
        (f"{split}/loss", f"{evaluated_on.capitalize()} loss", _ORANGE, "{:.4f}"),
        (f"{split}/accuracy", f"{evaluated_on.capitalize()} accuracy", _ORANGE, "{:.2%}"),
        ("train/learning_rate", "Learning rate", _GREY, "{:.2g}"),
    ]
    for axes, (key, title, colour, form) in zip(panels, curves, strict=True):
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, color=colour, linewidth=1.4, marker="o" if len(points) <= 40 else "", markersize=4)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
        _calm(axes)
        if points:
            axes.set_title(f"last {form.format(values[-1])}", loc="right", fontsize=10, color=_MUTED)
        else:
            axes.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=axes.transAxes, color=_MUTED)
            axes.set_yticks([])
    panels[3].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[2].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    for axes in panels[2:]:
        axes.set_xlabel("step", color=_MUTED)
    panels[0].set_xlim(0, max([row["step"] for row in rows], default=1) * 1.02)
    return figure


def draw_comparison(names: Sequence[str], runs: Sequence[Run]) -> Figure:
    """Training loss, and loss and accuracy on the evaluated images, of several runs over each other, each by its own epochs."""
    figure = Figure(figsize=(9.2, 9.0), dpi=_DPI, layout=_make_layout())
    panels: list[Axes] = figure.subplots(3, 1, sharex=True).tolist()
    kinds = [("Training loss", "train/loss"), ("Loss on the evaluated images", "loss"), ("Accuracy on the evaluated images", "accuracy")]
    for axes, (title, key) in zip(panels, kinds, strict=True):
        for number, (name, run) in enumerate(zip(names, runs, strict=True)):
            where = key if "/" in key else f"{run.config.evaluated_split}/{key}"
            points = [(row.get("epoch", 0), row[where]) for row in run.rows if isinstance(row.get(where), int | float)]
            if points:
                marker = "o" if len(points) <= 40 else ""
                axes.plot(*zip(*points, strict=True), color=f"C{number % 10}", linewidth=1.2, marker=marker, markersize=3, label=name)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
        _calm(axes)
    panels[-1].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    panels[-1].set_xlabel("epoch", color=_MUTED)
    if panels[0].lines:
        panels[0].legend(loc="upper right", fontsize=9, frameon=False)
    return figure


def _make_layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)  # inches


def _calm(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(color=_LINE, labelcolor=_MUTED, labelsize=9)
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str] = DIGITS) -> Figure:
    """The counts `confusion[true][predicted]`. Errors alone are coloured by their number, so that the diagonal does not drown them."""
    counts = np.array(confusion)
    errors = counts * ~np.eye(CLASSES, dtype=bool)
    shades = errors / max(1, errors.max())
    colours = _ERRORS(shades)
    colours[errors == 0] = to_rgba("white")
    colours[range(CLASSES), range(CLASSES)] = to_rgba(_DIAGONAL)
    figure = Figure(figsize=(7.2, 7.6), dpi=_DPI, layout=_make_layout())
    axes = figure.add_subplot()
    axes.imshow(colours)
    for (true, predicted), count in np.ndenumerate(counts):
        colour = "white" if shades[true, predicted] > 0.7 else _INK
        axes.text(predicted, true, f"{count:,}" if count else "", ha="center", va="center", fontsize=10, color=colour)
    places, edges = range(CLASSES), np.arange(CLASSES + 1) - 0.5
    axes.set_xticks(places, names, rotation=45 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(places, names)
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color=_LINE, linewidth=0.8)
    axes.tick_params(which="both", length=0, labelcolor=_INK, labelsize=10)
    axes.spines[:].set_color(_LINE)
    axes.set_xlabel("predicted", color=_MUTED)
    axes.set_ylabel("true", color=_MUTED)
    axes.set_title("Confusion matrix", loc="left", fontsize=12, fontweight="bold", color=_INK)
    axes.set_title(f"{errors.sum():,} of {counts.sum():,} wrong", loc="right", fontsize=10, color=_MUTED)
    return figure


def draw_run(run: Run, device: torch.device | str = "cpu") -> Drawing:
    """Draw all pictures that the run and its data set allow, with the predictions computed on `device`.

    Raises `UserError` for a finished run whose weights are missing or damaged.
    """
    figures: dict[str, Figure] = {}
    left_out = []
    if run.rows:
        figures["curves"] = draw_curves(run.rows, run.config)
    else:
        left_out.append("curves: metrics.jsonl has no rows yet")
    trained = None
    if run.result is not None:
        figures["confusion_matrix"] = draw_confusion(run.result[f"{run.config.evaluated_split}/confusion_matrix"], run.config.class_names)
        trained = load_model(run.path)
    else:
        left_out.append("confusion_matrix, correct_classification, incorrect_classification: the run is not finished")
    try:
        # Whoever looks at a run did not ask to fetch anything.
        data = load_dataset(run.config.model_copy(update={"download": False}))
    except UserError as error:
        return Drawing(figures, [*left_out, f"all pictures of images: {error}"])
    figures["data_sample"] = draw_data_sample(data.train, run.config.class_names)
    figures["augmented_sample"] = draw_augmented_sample(data.train, run.config)
    if trained is not None:
        model = trained.model.to(device).to(memory_format=torch.channels_last)  # this format takes a third less time on a CPU
        predictions = predict(model, data.evaluated.images, trained.mean, trained.std)
        figures["correct_classification"] = draw_correct(data.evaluated, predictions, run.config.class_names)
        figures["incorrect_classification"] = draw_incorrect(data.evaluated, predictions, run.config.class_names)
    return Drawing(figures, left_out)


def render(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save_figures(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each figure to `folder`/NAME.png, atomically. Raises `RunError` where that fails."""
    paths = []
    try:
        folder.mkdir(exist_ok=True)
        for name, figure in figures.items():
            paths.append(folder / f"{name}.png")
            write_atomically(paths[-1], render(figure))
    except OSError as error:
        raise RunError(f"the pictures cannot be written to {folder}: {error.strerror or error}") from error
    return paths


def draw_plots(run_dir: Path, device: torch.device | str = "cpu") -> list[Path]:
    """Draw all pictures of a run into its folder `plots`; their paths. What an unfinished run cannot show yet is left out with a warning.

    Raises `UserError` where `run_dir` is no run folder, is damaged or allows no picture, `RunError` where they cannot be written.
    """
    run = read_run(run_dir)
    drawing = draw_run(run, device)
    if not drawing.figures:
        raise UserError("\n".join(f"left out {sentence}" for sentence in drawing.left_out))
    for sentence in drawing.left_out:
        _log.warning("left out %s", sentence)
    return save_figures(drawing.figures, run.path / PLOTS)


def draw_all(run_dirs: Sequence[Path]) -> list[Path]:
    """`draw_plots` of several runs."""
    return [path for run_dir in run_dirs for path in draw_plots(run_dir)]


def print_written(program: str, description: str, arguments: Sequence[str] | None, write: Callable[[list[Path]], list[Path]]) -> int:
    """The program that does `write` on the run folders of its command line and prints the files; its exit status: 0, or as of an error."""

    def work() -> int:
        parser = Parser(program, description)
        parser.add_argument("run_dirs", nargs="+", type=path_argument, metavar="RUN_DIR", help="folder of a run, such as runs/mnist")
        run_dirs = [Path(name) for name in parser.parse_args(arguments).run_dirs]
        set_up_logging(rank=0, world_size=1)
        for path in write(run_dirs):
            print(path)
        return 0

    return print_answer(work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 drawn, 2 a user's mistake, 1 the rest."""
    return print_written("mnist_dist.plots", "Draw the pictures of runs into their folders.", arguments, draw_all)


if __name__ == "__main__":
    sys.exit(main())
