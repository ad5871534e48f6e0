"""Images per second of stock transforms read by the training's loader, beside the same data set in a plain DataLoader.

`python -m benchmarks.loader`; how to read it: benchmarks/README.md. The training seeds torch, numpy and random before each sample, which is
all that it adds. Both read the same MNIST images, as large as asked for, through torchvision's transforms, in turn, with as many workers.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from benchmarks import common
from benchmarks.common import Row
from mnist_dist.batches import StepSampler
from mnist_dist.config import make_config
from mnist_dist.distributed import join_group
from mnist_dist.program import run_program
from mnist_dist.reader import Reader
from mnist_dist.task import Data
from mnist_dist.tasks.classification import Classification
from mnist_dist.tasks.mnist import DIGITS
from mnist_dist.tasks.mnist.data import load_dataset
from mnist_dist.world import World

_WARM_UP_BATCHES = 6  # the queues of the workers must be full
_PICTURES = 6_000


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Digits as Pillow's images of `pixels` x `pixels`, through the transforms that people use."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, pixels: int) -> None:
        self.pictures = [to_pil_image(image.unsqueeze(0)).resize((pixels, pixels)) for image in images]
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomAffine(8, translate=(0.07, 0.07), scale=(0.92, 1.08), shear=8),
                transforms.ToTensor(),
                transforms.Normalize(0.1307, 0.3081),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


class PictureTask(Classification):
    """The task that has them."""

    name: ClassVar[str] = "pictures"
    class_names: ClassVar[Sequence[str]] = DIGITS
    pixels: int = 28

    def load(self) -> Data:  # noqa: D102
        train, _ = load_dataset("mnist", None, download=False)
        images, labels = train[:_PICTURES]
        pictures = Pictures(images, labels, self.pixels)
        return Data(pictures, pictures)

    def build_model(self) -> nn.Module:  # noqa: D102
        return nn.Sequential(nn.Flatten(), nn.Linear(self.pixels**2, 10))


def _repeat(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _time(batches: Iterator[Any], count: int) -> float:
    start = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    return (time.perf_counter() - start) / count


def measure_workers(options: argparse.Namespace, pixels: int, workers: int) -> list[Row]:
    """Seconds an image of both, in each round."""
    values = {"pixels": pixels, "steps": 10**6, "batch_size": options.batch_size, "workers": workers, "device": "cpu"}
    config = make_config(values, task=PictureTask)
    data = config.task.load()
    config = config.with_sizes((_PICTURES, _PICTURES))
    rounds = []
    with join_group(World(), config) as group:
        sampler = StepSampler(data.train, config, 0, 1, 0)
        persistent = {"persistent_workers": True} if workers else {}
        plain = DataLoader(data.train, batch_size=options.batch_size, shuffle=True, num_workers=workers, drop_last=True, **persistent)  # type: ignore[arg-type]
        with Reader(data.train, config, group, "training", sampler) as reader:
            ways = {"training": iter(reader), "plain": _repeat(plain)}
            for batches in ways.values():
                _time(batches, _WARM_UP_BATCHES)
            for number in range(options.rounds):
                row: Row = {}
                for name, batches in list(ways.items())[:: 1 if number % 2 else -1]:
                    # What a worker has read while the other way had its turn does not count.
                    _time(batches, 2 * max(1, workers))
                    row[name] = _time(batches, options.batches) / options.batch_size
                rounds.append(row)
    return rounds


def measure(options: argparse.Namespace) -> Row:
    """One row of results."""
    found: dict[str, dict[str, list[Row]]] = {}
    for pixels, workers in itertools.product(options.pixels, options.workers):
        rounds = found.setdefault(str(pixels), {})[str(workers)] = measure_workers(options, pixels, workers)
        common.tell(f"{pixels} pixels, {workers} workers: {_compare(rounds)} of a plain DataLoader")
    settings = {name: getattr(options, name) for name in ("rounds", "batches", "batch_size", "pixels", "workers")}
    return {"benchmark": "loader", "settings": settings, "rounds": found, "machine": common.describe_machine(), **common.describe_origin()}


def _compare(rounds: Sequence[Row]) -> str:
    return common.compare([row["plain"] for row in rounds], [row["training"] for row in rounds])


def format_row(row: Row) -> str:
    """The table of a row."""
    # Older rows have images of 28 pixels alone.
    sizes = row["rounds"] if "pixels" in row["settings"] else {"28": row["rounds"]}
    lines = []
    for pixels, of_workers in sizes.items():
        for workers, rounds in of_workers.items():
            rates = {name: statistics.median(1 / one[name] for one in rounds) for name in ("plain", "training")}
            lines.append([pixels, workers, f"{rates['plain']:,.0f}", f"{rates['training']:,.0f}", _compare(rounds)])
    header = ["pixels", "workers", "plain DataLoader, images/s", "the training's loader", "ratio"]
    return f"{common.describe_rows([row])}\n\n{common.format_table(header, lines)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    parser = common.make_parser("loader", "Images per second of stock transforms through the training's loader.")
    parser.add_argument("--rounds", type=common.positive, default=9, help="rounds of one turn each")
    parser.add_argument("--batches", type=common.positive, default=60, help="batches of a turn")
    parser.add_argument("--batch_size", type=common.positive, default=64, help="images of a batch")
    parser.add_argument("--pixels", type=common.positive, nargs="+", default=[28, 224], help="sizes of an image")
    parser.add_argument("--workers", type=common.whole, nargs="+", default=[0, 1, 2], help="numbers of workers")
    options = parser.parse_args(arguments)
    return common.measure_or_show(options, lambda: measure(options), format_row)


if __name__ == "__main__":
    sys.exit(run_program(main))
