"""What all classifiers share: loss, confusion matrix, table of classes, right and wrong examples. Imports no torch before it is used."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mnist_dist.errors import UserError
from mnist_dist.record import is_count
from mnist_dist.task import Data, Evaluation, Panel, Row, Tally, Task, option

if TYPE_CHECKING:
    from torch import Tensor, nn

_MATRIX_MAX = 30  # classes of a confusion matrix that a person can read
_KEPT_MAX = 100  # classes of one that is kept; of more, what each class was most often taken for


class Classification(Task):
    """One class for each sample. A batch is (inputs, labels int64 [n]), unless `make_inputs` says otherwise."""

    best: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    in_rows: ClassVar[Sequence[str] | None] = ("loss", "accuracy", "class_accuracy")

    model_config = Task.model_config | {"ignored_types": (tuple, list)}  # so that `class_names = ("a", "b")` needs no annotation

    label_smoothing: float = option(0.1, "label smoothing of the training loss (fraction)", group="The training", ge=0, lt=1)

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes; label i is the i-th. Unless a task says otherwise, those that its data set knew: its `classes`."""
        names = self.facts.get("classes")
        return names if isinstance(names, list) else ()

    def find_facts(self, train: Any) -> Row:
        """The names of the classes, if the data set has to know them, as those of torchvision do."""
        if type(self).class_names is not Classification.class_names:
            return {}
        while not hasattr(train, "classes") and hasattr(train, "dataset"):  # a Subset of it
            train = train.dataset
        names = getattr(train, "classes", None)
        if not names:
            raise UserError(f"task {self.name}: its training data have no attribute `classes`; write the property class_names")
        return {"classes": [str(name) for name in names]}

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError unless the names of the classes, where they are a fact, are words."""
        names = facts.get("classes")
        if type(self).class_names is Classification.class_names and not (
            isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"says that its classes are {str(names)[:40]!r}; expected a list of names")

    def make_inputs(self, batch: Any, drawn: Any = None) -> "tuple[Any, Tensor]":
        """The model's input and the labels int64 [n] of a batch: augmented, if `drawn` are its rows of `draw`."""
        inputs, labels = batch
        return inputs, labels

    def picture(self, sample: Any) -> "Tensor | None":
        """A sample of a split as a picture, uint8 [height, width] or [height, width, 3]; None where it is none."""
        import torch

        image = sample[0]
        if not isinstance(image, torch.Tensor) or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] not in (1, 3)):
            return None
        image = image.detach().float().cpu()
        low, high = image.min(), image.max()
        pixels = ((image - low) / (high - low).clamp(min=1e-6) * 255).round().to(torch.uint8)
        return pixels if pixels.ndim == 2 else pixels[0] if len(pixels) == 1 else pixels.movedim(0, 2)

    # What the training asks.

    def losses(self, model: "nn.Module", batch: Any, drawn: Any) -> "Tensor":
        """Cross-entropy of each sample."""
        from torch.nn.functional import cross_entropy

        inputs, labels = self.make_inputs(batch, drawn)
        return cross_entropy(self._classify(model, inputs), labels, reduction="none", label_smoothing=self.label_smoothing)

    def _classify(self, model: "nn.Module", inputs: Any) -> "Tensor":
        logits: Tensor = model(inputs)
        if not self.class_names:
            raise UserError(
                f"task {self.name}: there are no class names; write the property class_names, or let find_facts return them, too: "
                "{**super().find_facts(train), ...}"
            )
        if logits.shape[1:2] != (len(self.class_names),):
            raise UserError(
                f"task {self.name}: the model gives numbers of shape {list(logits.shape)}, and there are {len(self.class_names)} "
                "classes; expected one number for each class of each sample"
            )
        return logits

    def tally(self, model: "nn.Module", batch: Any) -> Tally:
        """The number of samples, the sum of their cross-entropy, the confusion matrix; wrong predictions by their confidence."""
        import torch
        from torch.nn.functional import cross_entropy

        inputs, labels = self.make_inputs(batch)
        logits = self._classify(model, inputs).float()
        classes = len(self.class_names)
        predicted = logits.argmax(dim=1)
        probabilities = logits.softmax(dim=1)
        loss = cross_entropy(logits, labels, reduction="sum").double()
        # Whole numbers are added exactly, in whatever order a GPU adds them.
        confusion = torch.zeros(classes * classes, dtype=torch.float64, device=logits.device)
        confusion.index_add_(0, labels * classes + predicted, torch.ones(len(labels), dtype=torch.float64, device=logits.device))
        count = loss.new_full((), len(labels))
        scores = torch.where(predicted == labels, -1.0, probabilities.amax(dim=1))
        return Tally(torch.cat([torch.stack([count, loss]), confusion]), scores, probabilities)

    def measure(self, sums: "Tensor") -> Row:
        """Mean cross-entropy, and what follows from the confusion matrix."""
        count, loss = sums[:2].tolist()
        classes = len(self.class_names)
        confusion = sums[2:].round().long().view(classes, classes)
        right, counts = confusion.diagonal().tolist(), confusion.sum(dim=1).tolist()
        errors = round(count) - sum(right)
        measures = {
            "accuracy": 1 - errors / count,
            "errors": errors,
            self.samples: round(count),
            "loss": loss / count,
            "class_accuracy": [mine / all_ if all_ else None for mine, all_ in zip(right, counts, strict=True)],
        }
        if classes <= _KEPT_MAX:
            return measures | {"confusion_matrix": confusion.tolist()}
        others = confusion.clone().fill_diagonal_(-1).max(dim=1)
        taken_for = zip(counts, right, others.indices.tolist(), others.values.tolist(), strict=True)
        return measures | {"classes": [[all_, all_ - mine, other, times] for all_, mine, other, times in taken_for]}

    def check_measures(self, measures: Row) -> str | None:  # noqa: D102
        classes = len(self.class_names)
        accuracy, kept = measures.get("accuracy"), "confusion_matrix" if classes <= _KEPT_MAX else "classes"
        if not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
            return "accuracy"
        for name in ("errors", self.samples):
            if not is_count(measures.get(name)):
                return name
        rows = measures[kept] if isinstance(measures.get(kept), list) else []
        width = classes if kept == "confusion_matrix" else 4
        if len(rows) != classes or not all(isinstance(row, list) and len(row) == width and all(map(is_count, row)) for row in rows):
            return kept
        if kept == "classes" and not all(row[1] <= row[0] and row[2] < classes for row in rows):
            return kept
        return None

    def _count_classes(self, measures: Row) -> list[Sequence[int]]:
        """Of each class: its samples, the wrong ones among them, the class that it was most often taken for, and how often."""
        if "classes" in measures:
            return list(measures["classes"])
        rows: list[Sequence[int]] = []
        for label, counts in enumerate(measures["confusion_matrix"]):
            other = max((index for index in range(len(counts)) if index != label), key=counts.__getitem__, default=label)
            rows.append((sum(counts), sum(counts) - counts[label], other, counts[other]))
        return rows

    # What people see.

    def describe(self, measures: Row) -> str:  # noqa: D102
        return f"accuracy {measures['accuracy']:.2%} ({measures['errors']} of {measures[self.samples]} wrong)"

    def tabulate(self, measures: Row) -> tuple[Sequence[str], Sequence[Sequence[object]]]:  # noqa: D102
        names, confusion = self.class_names, measures.get("confusion_matrix")
        shown = range(len(names)) if confusion is not None and len(names) <= _MATRIX_MAX else range(0)
        rows: list[Sequence[object]] = []
        for label, (count, wrong, _, _) in enumerate(self._count_classes(measures)):
            part = f"{1 - wrong / count:.2%}" if count else "-"
            cells = (confusion[label][other] or "." for other in shown) if confusion is not None else ()
            rows.append((names[label], *cells, count, wrong, part))
        return ("class", *(f"as {names[label]}" for label in shown), self.samples, "wrong", "accuracy"), rows

    def draw_evaluation(self, data: Data, evaluation: Evaluation) -> list[Panel]:  # noqa: D102
        from mnist_dist.figures import render_pixels

        names = self.class_names
        rows = []
        for place, probabilities in evaluation.examples:
            sample: Any = data.evaluated[place]
            pixels = self.picture(sample)
            shown = place if pixels is None else render_pixels(pixels)
            predicted = max(range(len(probabilities)), key=probabilities.__getitem__)
            # Of very many classes, the probability of the one that was predicted.
            columns = probabilities if len(names) <= _KEPT_MAX else [probabilities[predicted]]
            rows.append((shown, names[int(sample[1])], names[predicted], *columns))
        named = [f"probability/{name}" for name in names] if len(names) <= _KEPT_MAX else ["probability"]
        panels = [Panel("Predictions", "predictions/wrong", table=(("image", "label", "predicted", *named), rows))]
        if "confusion_matrix" in evaluation.measures:
            panels.append(Panel("Predictions", "predictions/confusion_matrix", matrix=(names, evaluation.measures["confusion_matrix"])))
        return panels

    def draw_measures(self, measures: Row, on: str) -> list[Panel]:  # noqa: D102
        title = f"{on.capitalize()} {self.samples} by class"
        table = Panel(title, "classes", table=self._make_class_table(measures))
        if len(self.class_names) > _MATRIX_MAX:
            return [table]
        from mnist_dist.tasks.figures import draw_confusion

        return [Panel(title, "confusion_matrix", figure=draw_confusion(measures["confusion_matrix"], self.class_names)), table]

    def draw_report(self, data: Data, model: "nn.Module | None", batches: Iterable[Any], measures: Row) -> list[Panel]:  # noqa: D102
        return [] if model is None else self._draw_predictions(data, model, batches)

    def _make_class_table(self, measures: Row) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
        rows = []
        for label, (count, wrong, other, times) in enumerate(self._count_classes(measures)):
            taken_for = f"{self.class_names[other]} ({times})" if wrong else "none"
            part = f"{1 - wrong / count:.2%}" if count else f"no {self.samples}"
            rows.append((self.class_names[label], count, wrong, part, taken_for))
        return ("class", self.samples, "wrong", "accuracy", "most often taken for (times)"), rows

    def _draw_predictions(self, data: Data, model: "nn.Module", batches: Iterable[Any]) -> list[Panel]:
        from mnist_dist.tasks.figures import Predictions, draw_correct, draw_incorrect

        split: Any = data.evaluated
        predictions = Predictions.collect(self, model, batches)
        if not len(split) or self.picture(split[0]) is None:
            return []
        caption = "Computed again in float32: where two classes are nearly equal, the count may differ from the run's own."
        names = self.class_names

        def read(place: int) -> Any:
            return self.picture(split[place])

        return [
            Panel("Predictions", "incorrect_classification", figure=draw_incorrect(read, predictions, names), caption=caption),
            Panel("Predictions", "correct_classification", figure=draw_correct(read, predictions, names)),
        ]
