"""The stock way to train on MNIST: torchvision's data set and per-sample transforms in a DataLoader, float32, NCHW.

Written here to be compared with, and written to be good: pictures are turned as PIL images, which is quicker than as tensors.
"""

import lzma
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from mnist_dist.tasks.mnist.augment import Limits
from mnist_dist.tasks.mnist.model import CNN

MEAN, STD = 0.1307, 0.3081


def write_files(folder: Path) -> None:
    """Write the embedded MNIST to `folder` in the form in which torchvision keeps it."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (resources.files("mnist_dist.tasks.mnist") / "files").iterdir():
        if file.name.endswith(".xz"):
            (raw / file.name.removesuffix(".xz")).write_bytes(lzma.decompress(file.read_bytes()))


def make_augmentation(limits: Limits) -> transforms.RandomAffine:
    """The loop's augmentation in torchvision's words: the same ranges."""
    return transforms.RandomAffine(
        degrees=limits.rotation,
        translate=(limits.shift / 28, limits.shift / 28),
        scale=(1 - limits.scale, 1 + limits.scale),
        shear=limits.shear,
    )


def make_course_augmentation() -> transforms.Compose:
    """What the course does to its training images: one in ten is its enlarged centre, and all are turned."""
    centre = transforms.RandomApply([transforms.CenterCrop(22), transforms.Resize(28)], p=0.1)
    return transforms.Compose([centre, transforms.RandomRotation(15)])


def make_loader(
    folder: Path, *, train: bool, batch_size: int, workers: int = 0, augmentation: Any = None, size: int | None = None
) -> DataLoader[Any]:
    """Batches of images float32 [n, 1, 28, 28] and labels int64 [n], shuffled if of the training set; of the first `size` images."""
    steps = [transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))]
    transform = transforms.Compose(steps if augmentation is None else [augmentation, *steps])
    dataset: Any = datasets.MNIST(str(folder), train=train, transform=transform)
    if size is not None:
        dataset = Subset(dataset, range(min(size, len(dataset))))
    pin = torch.cuda.is_available()
    return DataLoader(dataset, batch_size=batch_size, shuffle=train, num_workers=workers, pin_memory=pin)


def train_batch(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One training step."""
    device = next(model.parameters()).device
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@torch.no_grad()
def measure_accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """Part of the images that are right (fraction)."""
    device = next(model.parameters()).device
    model.eval()
    right = images_seen = 0
    for images, labels in loader:
        right += int((model(images.to(device)).argmax(dim=1) == labels.to(device)).sum())
        images_seen += len(labels)
    model.train()
    return right / images_seen


def build_course(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """The CNN with the course's recipe: model, optimizer, scheduler that steps once an epoch."""
    model = CNN().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.1)
