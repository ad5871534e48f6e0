"""The built-in task: one CNN of 593,200 parameters on MNIST, its relatives, or a synthetic set. Imports no torch before it is used."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from mnist_dist.task import Data, Export, Panel, Row, option
from mnist_dist.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mnist_dist.tasks.mnist.augment import Limits

# (training, test) images of each data set. All have 28 x 28 grey pixels, and ten classes.
SIZES = {
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "kmnist": (60_000, 10_000),
    "qmnist": (60_000, 60_000),
    "synthetic": (4_096, 1_024),
}
EMBEDDED = ("mnist", "synthetic")
CLASSES = 10
DIGITS = tuple(str(digit) for digit in range(CLASSES))
_CLASS_NAMES = {
    "fashion_mnist": ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}
_AUGMENTATION = "The augmentation"


class Mnist(Classification):
    """Images uint8 [n, 28, 28] in memory, augmented on the device by random affine maps that are drawn for the whole batch."""

    samples: ClassVar[str] = "images"

    dataset: Literal["mnist", "fashion_mnist", "kmnist", "qmnist", "synthetic"] = option(
        "mnist", "mnist and synthetic come with the package, the others from --data_dir", group="The data"
    )
    download: bool = option(False, "fetch missing files into --data_dir", group="The data", recipe=False)

    label_smoothing: float = option(0.2, "label smoothing of the training loss (fraction)", group="The training", ge=0, lt=1)
    rotation: float = option(8.0, "largest random rotation (degrees)", group=_AUGMENTATION, ge=0, le=180)
    shear: float = option(8.0, "largest random shear (degrees)", group=_AUGMENTATION, ge=0, le=60)
    scale: float = option(0.08, "largest random change of size (fraction)", group=_AUGMENTATION, ge=0, le=0.9)
    shift: float = option(2.0, "largest random shift along each axis (pixels)", group=_AUGMENTATION, ge=0, le=28)

    @model_validator(mode="after")
    def _check_folder(self) -> "Mnist":
        embedded = self.dataset in EMBEDDED
        if embedded and (self.data_dir is not None or self.download):
            raise ValueError(f"data_dir and download have no use with dataset {self.dataset}, which comes with the package: leave them out")
        if not embedded and self.data_dir is None:
            raise ValueError(f"dataset {self.dataset} needs data_dir: the folder with its files (add --download to fetch them)")
        return self

    @property
    def sizes(self) -> tuple[int, int]:  # noqa: D102
        return SIZES[self.dataset]

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the ten classes of the data set."""
        return _CLASS_NAMES.get(self.dataset, DIGITS)

    @property
    def limits(self) -> "Limits":
        """Those of the augmentation."""
        from mnist_dist.tasks.mnist.augment import Limits

        return Limits(self.rotation, self.shear, self.scale, self.shift)

    def load_ahead(self) -> None:  # noqa: D102
        from mnist_dist.tasks.mnist.embedded import load_ahead

        if self.dataset == "mnist":
            load_ahead()

    def load(self) -> Data:  # noqa: D102
        from mnist_dist.tasks.mnist.data import load_dataset

        return Data(*load_dataset(self.dataset, self.data_dir, self.download))

    def find_facts(self, train: Any) -> Row:  # noqa: D102
        from mnist_dist.tasks.mnist.data import measure_pixels

        mean, std = measure_pixels(train.tensors[0])
        return {"dataset": self.dataset, "mean": mean, "std": std}

    def check_facts(self, facts: Mapping[str, Any]) -> None:  # noqa: D102
        missing = [name for name in ("dataset", "mean", "std") if name not in facts]
        if missing:
            raise ValueError(f"does not say its {', '.join(missing)}; expected a file that a run of this package wrote")
        if facts["dataset"] not in [*SIZES]:  # which may be a list, in somebody's file
            raise ValueError(f"says that its dataset is {str(facts['dataset'])[:40]!r}; known: {', '.join(SIZES)}")
        for name in ("mean", "std"):
            value = facts[name]
            if type(value) not in (int, float) or not 0 <= value <= 1 or (name == "std" and value == 0):
                raise ValueError(f"says that its {name} is {str(value)[:40]!r}; expected a number from 0 to 1")

    def build_model(self) -> "nn.Module":  # noqa: D102
        import torch

        from mnist_dist.tasks.mnist.model import CNN

        return CNN().to(memory_format=torch.channels_last)

    def draw(self, seed: int, step: int, size: int) -> "Tensor":
        """Affine matrices float32 [size, 2, 3]."""
        from mnist_dist.tasks.mnist.augment import draw_transforms

        return draw_transforms(self.limits, seed, step, size)

    def make_inputs(self, batch: Any, drawn: Any = None) -> "tuple[Tensor, Tensor]":
        """The model's input float32 [n, 1, 28, 28] and the labels int64 [n]."""
        from mnist_dist.tasks.mnist.augment import make_inputs

        images, labels = batch
        return make_inputs(images, self.facts["mean"], self.facts["std"], drawn), labels

    def picture(self, sample: Any) -> "Tensor":  # noqa: D102
        pixels: Tensor = sample[0]
        return pixels

    def draw_samples(self, data: Data, drawn: Any) -> list[Panel]:  # noqa: D102
        from mnist_dist.tasks.mnist.pictures import tile_samples

        return [Panel("Training images", f"images/{name}", figure=png) for name, png in tile_samples(data.train, drawn).items()]

    def draw_report(self, data: Data, model: "nn.Module | None", batches: Iterable[Any], measures: Row) -> list[Panel]:  # noqa: D102
        from mnist_dist.tasks.mnist.pictures import draw_augmented_sample, draw_data_sample

        return [
            *super().draw_report(data, model, batches, measures),
            Panel("Training images", "data_sample", figure=draw_data_sample(data.train, self.class_names)),
            Panel("Training images", "augmented_sample", figure=draw_augmented_sample(data.train, self.limits)),
        ]

    def export(self, model: "nn.Module", data: Data) -> Export:
        """From pixels to log-probabilities, the normalisation included."""
        from mnist_dist.tasks.mnist.model import Classifier

        images = data.test[:64][0]
        return Export(
            Classifier(model, self.facts["mean"], self.facts["std"]),
            images.unsqueeze(1).float() / 255,
            "pixels",
            "log_probabilities",
            "from 0 to 1, bright on black; normalised inside",
            "float32 [n, 10]; exp gives probabilities",
        )
