"""The pictures of a run, made from its folder alone: `python -m mnist_dist.plots runs/NAME`. Its curves; the rest is its task's."""

if __name__ == "__main__":
    import sys

    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()

    from mnist_dist.program import run_module

    sys.exit(run_module("mnist_dist.plots"))


import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mnist_dist.config import Config
from mnist_dist.console import set_up_logging
from mnist_dist.data import load_data
from mnist_dist.errors import RunError, UserError
from mnist_dist.figures import BLUE, GREY, MUTED, ORANGE, PNG_START, calm, having_default_style, make_figure, render
from mnist_dist.files import read_file, write_atomically
from mnist_dist.options import Parser, path_argument
from mnist_dist.program import print_answer
from mnist_dist.reader import read_on
from mnist_dist.record import CURVES, PICTURE_NAME, PLOTS, Run, pick_measures, read_config, read_named_config, read_run
from mnist_dist.source import BUILT_IN, Unknown, explaining, make_unknown
from mnist_dist.task import Data, Panel, Row, Task, format_measure
from mnist_dist.weights import load_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARISON_FILE = "compare.html"  # of mnist_dist.report, beside the runs
_GENERATOR = b'<meta name="generator" content="mnist_dist">'
_COMPARISON_BYTES_MAX = 64 << 20
_CURVES_MAX = 12  # of one task

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """What a report shows of a run beside its numbers, figures as PNG files; and a sentence for each thing that could not be drawn."""

    panels: list[Panel]
    left_out: list[str]


def list_curves(rows: Sequence[Row], config: Config) -> list[tuple[str, str, str, Callable[[float], str]]]:
    """The curves of a run: the name in its rows, the title, the colour, and how a value is written."""
    split = config.evaluated_split
    first = dict.fromkeys((f"{split}/loss", config.best))
    others = [name for row in rows for name, value in row.items() if name.startswith(f"{split}/") and isinstance(value, int | float)]
    measures = list(first | dict.fromkeys(others))[:_CURVES_MAX]

    def describe(name: str) -> tuple[str, str, str, Callable[[float], str]]:
        words = name.removeprefix(f"{split}/").replace("_", " ")
        return name, f"{config.evaluated_on.capitalize()} {words}", ORANGE, lambda value: format_measure(name, value)

    return [
        ("train/loss", "Training loss", BLUE, "{:.3f}".format),
        *map(describe, measures),
        ("train/learning_rate", "Learning rate", GREY, "{:.2g}".format),
    ]


def draw_curves(rows: Sequence[Row], config: Config) -> "Figure":
    """Training loss, the measures of the task and learning rate over the steps of the rows of metrics.jsonl."""
    curves = list_curves(rows, config)
    lines = -(-len(curves) // 2)
    figure = make_figure(9.2, 3.1 * lines)
    panels: list[Axes] = figure.subplots(lines, 2, sharex=True).flatten().tolist()
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    for axes, (key, title, colour, form) in zip(panels, curves, strict=False):
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, color=colour, linewidth=1.4, marker="o" if len(points) <= 40 else "", markersize=4)
        calm(axes, title)
        if points:
            axes.set_title(f"last {form(values[-1])}", loc="right", fontsize=10, color=MUTED)
        else:
            axes.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=axes.transAxes, color=MUTED)
            axes.set_yticks([])
        if key.endswith("accuracy"):
            _show_percent(axes)
        elif key == "train/learning_rate":
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in panels[len(curves) - 2 : len(curves)]:
        axes.set_xlabel("step", color=MUTED)
        axes.tick_params(labelbottom=True)  # below the panel may be none that shows them
    panels[0].set_xlim(0, max([row["step"] for row in rows], default=1) * 1.02)
    return figure


def _show_percent(axes: "Axes") -> None:
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, -0.04 * top), min(top, 1 + 0.04 * (1 - bottom)))  # of a line at 100 % matplotlib shows 104 %
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def list_compared(runs: Sequence[Run]) -> list[str]:
    """The measures by which runs are compared: the best one of each task, and the loss."""
    return list(dict.fromkeys([*(run.config.task.best for run in runs), "loss"]))


def name_samples(runs: Sequence[Run]) -> str:
    """What the samples of several runs are called: their task's word, where it is one."""
    words = {run.config.task.samples for run in runs}
    return words.pop() if len(words) == 1 else Task.samples


def draw_comparison(names: Sequence[str], runs: Sequence[Run]) -> "Figure":
    """Training loss, and the compared measures of the evaluated samples, of several runs over each other, each by its own epochs."""
    on = f"on the evaluated {name_samples(runs)}"
    kinds = [("Training loss", "train/loss"), *((f"{key.replace('_', ' ').capitalize()} {on}", key) for key in list_compared(runs))]
    figure = make_figure(9.2, 3.0 * len(kinds))
    panels: list[Axes] = figure.subplots(len(kinds), 1, sharex=True).tolist()
    for axes, (title, key) in zip(panels, kinds, strict=True):
        for number, run in enumerate(runs):
            where = key if "/" in key else f"{run.config.evaluated_split}/{key}"
            points = [(row.get("epoch", 0), row[where]) for row in run.rows if isinstance(row.get(where), int | float)]
            if points:
                marker = "o" if len(points) <= 40 else ""
                label = str(number)  # not the name: matplotlib leaves out one that begins with "_"
                axes.plot(*zip(*points, strict=True), color=f"C{number % 10}", linewidth=1.2, marker=marker, markersize=3, label=label)
        calm(axes, title)
        if key.endswith("accuracy"):
            _show_percent(axes)
    panels[-1].set_xlabel("epoch", color=MUTED)
    if panels[0].lines:
        legend = panels[0].legend(loc="upper right", fontsize=9, frameon=False)
        for text in legend.get_texts():
            text.set(text=names[int(text.get_text())], parse_math=False)
    return figure


@having_default_style()
def draw_run(run: Run, device: torch.device | str = "cpu", data: Data | None = None) -> Drawing:
    """Draw all that the run and its data allow, with the model on `device`; `data` may be at hand.

    Raises `UserError` for a finished run whose weights are missing or damaged.
    """
    config, panels, left_out = run.config, [], []
    if run.rows:
        panels += _render([Panel("Curves", CURVES, figure=draw_curves(run.rows, config), caption=_describe_curves(config))])
    else:
        left_out.append("curves: metrics.jsonl has no rows yet")
    if isinstance(config.task, Unknown):
        return Drawing(panels, [*left_out, f"what task {config.task.name[:200]} itself draws: {config.task.why}"])
    model: nn.Module | None = None
    measures: Row = {}
    if run.result is not None:
        trained = load_model(run.path, None if config.task.name == BUILT_IN else config.task.name)
        model, config = trained.model.to(device), config.with_facts(trained.task.facts)
        measures = pick_measures(run.result, config.evaluated_split)
        try:
            with explaining(config.task.name, "in draw_measures"):
                panels += _render(config.task.draw_measures(measures, config.evaluated_on))
        except UserError as error:
            left_out.append(f"what the task draws of its measures: {error}")
    else:
        left_out.append("what the model makes of its samples: the run is not finished")
    try:
        if data is None:
            found, data = load_data(config.without_download().replace(workers=0))
            config = found.with_facts(config.task.facts or found.task.facts)
        with explaining(config.task.name, "in draw_report"), torch.inference_mode():
            panels += _render(config.task.draw_report(data, model, read_on(data.evaluated, config, torch.device(device)), measures))
    except (UserError, RunError) as error:
        left_out.append(f"what the task draws of its data: {error}")
    return Drawing(panels, left_out)


def _render(panels: Sequence[Panel]) -> list[Panel]:
    """The panels with the files of their figures: a figure that is rendered again is laid out a little otherwise. Raises `UserError`."""
    rendered = [panel if panel.figure is None else replace(panel, figure=render(panel.figure)) for panel in panels]
    for panel in rendered:
        if panel.figure is not None and not PICTURE_NAME.fullmatch(f"{panel.name}.png"):
            raise UserError(f"a panel is called {panel.name!r:.80}; allowed: small letters, digits, _ and -")
        if panel.figure is not None and not panel.figure.startswith(PNG_START):
            raise UserError(f"the figure of panel {panel.name} is neither matplotlib's nor the bytes of a PNG file")
    return rendered


def _describe_curves(config: Config) -> str:
    smoothing = getattr(config.task, "label_smoothing", None)
    if smoothing is None:
        return ""
    return (
        f"The training loss is of {config.task.samples} as they are trained on, augmented where the task does so"
        + (f", and has label smoothing {smoothing:g}" if smoothing else "")
        + f"; the {config.evaluated_on} loss is not: compare each with itself alone."
    )


def save_drawing(run: Run, drawing: Drawing) -> list[Path]:
    """Write each figure to NAME.png in the folder `plots` of a run, atomically, and warn of what is left out. Raises `RunError`."""
    for sentence in drawing.left_out:
        _log.warning("left out %s", sentence)
    folder, paths = run.path / PLOTS, list[Path]()
    try:
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():  # of a run from somebody else, it may lead to one's own pictures
            raise RunError(f"the pictures cannot be written to {folder}: it is a link to {folder.resolve()}; expected a folder")
        for panel in drawing.panels:
            if panel.figure is not None:
                paths.append(folder / f"{panel.name}.png")
                write_atomically(paths[-1], render(panel.figure))
    except OSError as error:
        raise RunError(f"the pictures cannot be written to {folder}: {error.strerror or error}") from error
    return paths


def draw_plots(run_dir: Path, task: str | None = None, data_dir: str | None = None) -> list[Path]:
    """Draw all pictures of a run into its folder `plots`; their paths. What an unfinished run cannot show yet is left out with a warning.

    Raises `UserError` where `run_dir` is no run folder, is damaged or allows no picture, `RunError` where they cannot be written.
    """
    run = open_run(run_dir, task, data_dir)
    drawing = draw_run(run)
    if not any(panel.figure is not None for panel in drawing.panels):
        raise UserError("\n".join(f"left out {sentence}" for sentence in drawing.left_out))
    return save_drawing(run, drawing)


def open_run(run_dir: Path, task: str | None = None, data_dir: str | None = None) -> Run:
    """The run in a folder, its task the one that the user names, or may have named before; `data_dir` is where its data are now.

    A run can be looked at when the code of its task is gone, or has changed: what it draws is left out then. Raises `UserError`.
    """
    run = read_run(run_dir)  # what is damaged is named first
    try:
        config = read_named_config(run_dir, task)
    except UserError as error:
        if task is not None:
            raise
        config = read_config(run_dir, make_unknown(run.config.task.name, str(error)))
    return read_run(run_dir, config if data_dir is None or isinstance(config.task, Unknown) else config.replace(data_dir=data_dir))


def draw_all(run_dirs: Sequence[Path], task: str | None = None, data_dir: str | None = None) -> list[Path]:
    """`draw_plots` of several runs."""
    return [path for run_dir in run_dirs for path in draw_plots(run_dir, task, data_dir)]


def is_comparison(path: Path) -> bool:
    """Whether a page about several runs that `mnist_dist.report` wrote lies at `path`. Raises OSError."""
    return path.name == COMPARISON_FILE and os.path.isfile(path) and _GENERATOR in read_file(path, _COMPARISON_BYTES_MAX)[:500]


Writer = Callable[[list[Path], str | None, str | None], list[Path]]


def print_written(program: str, description: str, arguments: Sequence[str] | None, write: Writer) -> int:
    """The program that does `write` on the run folders of its command line and prints the files; its exit status: 0, or as of an error."""

    def work() -> int:
        parser = Parser(program, description)
        parser.add_argument("run_dirs", nargs="+", type=path_argument, metavar="RUN_DIR", help="folder of a run, such as runs/mnist")
        parser.add_argument("--task", metavar="NAME", help="the code of the runs' task (default: theirs, where you have trained it before)")
        parser.add_argument("--data_dir", metavar="DIR", type=path_argument, help="folder with the runs' data (default: theirs)")
        options = parser.parse_args(arguments)
        set_up_logging(rank=0, world_size=1)
        paths = [Path(name) for name in options.run_dirs]
        runs = [path for path in paths if not is_comparison(path)]  # of `runs/*`, where one lies from the last time
        for path in write(runs or paths, options.task, options.data_dir):
            print(path)
        return 0

    return print_answer(work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 drawn, 2 a user's mistake, 1 the rest."""
    return print_written("mnist_dist.plots", "Draw the pictures of runs into their folders.", arguments, draw_all)
