"""What is trained: the contract between the training and a task. Imports no torch.

A task is one class in one file. Its fields are options; its methods say what the data are, what the model is, and what it gets wrong. The
rest (order, ranks, checkpoints, records, reports) is the same for every task. `python -m mnist_dist.train --task my_task.py` trains it, and
`python -m mnist_dist.check --task my_task.py` shows in seconds whether it keeps the promises.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import PrivateAttr, ValidationError

from mnist_dist import options
from mnist_dist.options import Options

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

Row = dict[str, Any]

_EXPORTED = 64  # samples on which an exported model is compared with the model itself


def option(
    default: Any, description: str = "", *, group: str = "The task", recipe: bool = True, folder: bool = False, **limits: Any
) -> Any:
    """A field of a task with a description for --help and limits such as `ge=1`. A bare `width: int = 32` is an option, too.

    `recipe=False`: it says where or how to run, not what is trained, and may differ between two starts of one run.
    """
    return options.option(group, default, description, recipe=recipe, folder=folder, **limits)


@dataclass(frozen=True)
class Data:
    """What a task trains on and is tested on.

    Each is a `torch.utils.data.TensorDataset`, which is kept on the device and read by one gather a batch, or any other map-style
    `Dataset`, which a DataLoader reads, with `--workers N` in processes of its own. Random transforms in it need no care: before each
    sample the generators of torch, numpy and random are seeded by (seed, step, its place in the batch).
    """

    train: "Dataset[Any]"
    test: "Dataset[Any]"
    holdout: "Dataset[Any] | None" = None  # what --holdout sets apart of `train`: the training's own work

    @property
    def evaluated(self) -> "Dataset[Any]":
        """The samples on which a run is evaluated."""
        return self.test if self.holdout is None else self.holdout


class Tally(NamedTuple):
    """What a model gets right and wrong in one batch of n samples.

    `sums`: float64 [k], sums over the samples, their number first. They are added up over all batches and ranks.
    `scores`: float [n], how much each sample is worth showing; the highest of the whole split are, and none that is below zero.
    `outputs`: [n, ...], what to show of each.
    """

    sums: "Tensor"
    scores: "Tensor | None" = None
    outputs: "Tensor | None" = None


class Example(NamedTuple):
    """A sample that an evaluation found worth showing: its place in the split, and its row of `Tally.outputs` as a list."""

    place: int
    output: Any


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a split: the measures, the examples with the highest scores, and the `sums` that the measures were made of."""

    samples: int
    measures: Row
    examples: Sequence[Example] = ()
    sums: Sequence[float] = ()

    def name_values(self, split: str, *names: str) -> Row:
        """The measures (or those called `names`) under the names that files give them: `test/loss` where `split` is `test`."""
        return {f"{split}/{name}": self.measures[name] for name in names or self.measures}


@dataclass(frozen=True)
class Panel:
    """A figure or a table of a task, in the section `title` of the report of a run, or on W&B.

    `name` is that of the figure's file in plots/, or of the panel on W&B, such as `predictions/wrong`. One of these is given:
    `figure`, one of matplotlib, or the bytes of a PNG file; `table`, a header and its rows, in which such bytes may stand, too; `matrix`,
    the names of classes and how often each (row) was taken for each (column).
    """

    title: str
    name: str
    figure: Any = None
    table: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None
    matrix: tuple[Sequence[str], Sequence[Sequence[int]]] | None = None
    caption: str = ""


class Export(NamedTuple):
    """A module of one tensor, whose first dimension is the sample's; an input for it, [n, ...] with n at least 2; and what both are."""

    module: "nn.Module"
    example: "Tensor"
    input_name: str = "inputs"
    output_name: str = "outputs"
    input_is: str = ""
    output_is: str = ""


def format_measure(name: str, value: float) -> str:
    """A measure as a person reads it: an accuracy as percent."""
    if name.endswith("accuracy"):
        return f"{value:.2%}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e9 else f"{value:.4g}"


def shorten_name(name: str) -> str:
    """The name of a task without its folder or package."""
    return Path(name).stem if name.endswith(".py") else name.rpartition(".")[2]


class Task(Options):
    """What is trained. Immutable: its fields are options, and `facts` what `find_facts` found."""

    samples: ClassVar[str] = "samples"  # what they are called in messages
    best: ClassVar[str] = "loss"  # the measure by which runs are compared
    higher_is_better: ClassVar[bool] = False
    in_rows: ClassVar[Sequence[str] | None] = None  # the measures that rows of metrics.jsonl have; None: all
    name: ClassVar[str] = ""  # by which it was found
    source: ClassVar[str] = ""  # its files as they were loaded, and the beginning of the SHA-256 of each

    data_dir: str | None = option(None, "folder with the data", group="The data", recipe=False, folder=True)

    _facts: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts of the data that the weights are trained on."""
        return self._facts

    @property
    def short_name(self) -> str:
        """The name without its folder or package, as it stands in the recipe of a run."""
        return shorten_name(self.name)

    def with_facts(self, facts: Mapping[str, Any]) -> "Task":
        """The same task, with the facts of some data or weights."""
        task = self.model_copy()
        for name in vars(task).keys() - type(task).model_fields.keys():  # what a cached_property has kept may be of other facts
            del vars(task)[name]
        task._facts = dict(facts)
        return task

    if not TYPE_CHECKING:  # or mypy would allow every attribute

        def __setattr__(self, name: str, value: Any) -> None:
            # pydantic keeps what has a private name; where weights are read without data, it would be missing.
            if name.startswith("_") and name not in self.__private_attributes__:
                frozen = {"type": "frozen_instance", "loc": (name,), "input": value}
                raise ValidationError.from_exception_data(type(self).__name__, [frozen])
            super().__setattr__(name, value)

    # What every task has.

    @property
    def sizes(self) -> tuple[int, int] | None:
        """How many samples there are to train on and to test on, where that is known before they are loaded."""
        return None

    def load(self) -> Data:
        """Load the data; on the CPU."""
        raise NotImplementedError

    def build_model(self) -> "nn.Module":
        """A model with its initial weights. Called under a seeded generator; the same on every rank."""
        raise NotImplementedError

    def losses(self, model: "nn.Module", batch: Any, drawn: Any) -> "Tensor":
        """One loss per sample, [n], not their mean: the loop divides by the whole batch, wherever its samples are computed.

        `batch` is on the device: the tensors of a `TensorDataset`, else what `collate` made. `drawn`: the rows of `draw` for its samples;
        None in an evaluation.
        """
        raise NotImplementedError

    # What a task may have.

    def load_ahead(self) -> None:
        """Begin, in a thread, what `load` will wait for. A training calls this before torch is imported, which takes a second."""

    def tally(self, model: "nn.Module", batch: Any) -> Tally:
        """Count what `model`, in evaluation mode, gets right and wrong in a batch of a test split; by default its losses."""
        import torch

        losses = self.losses(model, batch, None).double()
        return Tally(torch.stack([losses.new_full((), len(losses)), losses.sum()]))

    def measure(self, sums: "Tensor") -> Row:
        """The measures (numbers, or lists of numbers) that the `sums` float64 [k] of a whole split mean; `loss` and `best` among them.

        Any other may be None or NaN where it has no value, such as a precision where nothing was found.
        """
        return {"loss": float(sums[1] / sums[0])}

    def draw(self, seed: int, step: int, size: int) -> "Tensor | None":
        """Random numbers for the whole batch of `step`, on the CPU: row i of `size` rows is sample i's. A function of (seed, step)."""
        return None

    def find_facts(self, train: "Dataset[Any]") -> Row:
        """Plain values that belong to the weights, such as a mean or a vocabulary, found in what is trained on; see `facts`."""
        return {}

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError where the facts in somebody's file of weights cannot be right."""

    def collate(self, samples: list[Any]) -> Any:
        """A batch of the samples of a `Dataset` (no `TensorDataset`) that are computed at once; by default as torch makes it."""
        from torch.utils.data import default_collate

        return default_collate(samples)

    def check_measures(self, measures: Row) -> str | None:
        """The name of a measure, read back from a file, that cannot be right; None where all can."""
        return None

    def describe(self, measures: Row) -> str:
        """An evaluation in a few words."""
        return f"{self.best} {format_measure(self.best, measures[self.best])}"

    def tabulate(self, measures: Row) -> tuple[Sequence[str], Sequence[Sequence[object]]] | None:
        """What the `measures` of an evaluation say in more detail, as a header and rows for a terminal."""
        return None

    def draw_samples(self, data: Data, drawn: Any) -> list[Panel]:
        """What is trained on, for the trackers, at the start of a run: `drawn` is what its first step draws. Takes milliseconds."""
        return []

    def draw_evaluation(self, data: Data, evaluation: Evaluation) -> list[Panel]:
        """What an evaluation of `data.evaluated` found, for the trackers. Takes milliseconds."""
        return []

    def draw_measures(self, measures: Row, on: str) -> list[Panel]:
        """What the report shows of the `measures` of the finished run's evaluation, `on` its `test` or `held-out` samples; without data."""
        return []

    def draw_report(self, data: Data, model: "nn.Module | None", batches: Iterable[Any], measures: Row) -> list[Panel]:
        """What the report shows beside the curves: of the data, and of what `model` (None while the run goes on) does with them.

        `batches`: the samples of `data.evaluated` in their order, on the model's device. `measures`: of the finished run's evaluation.
        """
        return []

    def export(self, model: "nn.Module", data: Data) -> Export:
        """What `mnist_dist.export` writes: by default the model itself, called with the first tensor of a batch."""
        split: Any = data.test
        batch = self.collate([split[place] for place in range(min(_EXPORTED, len(split)))])
        example = batch[0] if isinstance(batch, tuple | list) else batch
        return Export(model, example)
