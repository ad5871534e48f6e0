"""Small pictures for the trackers while the training goes on: some training images, and images that were taken for what they are not.

Made with Pillow alone, in milliseconds: the figures of `mnist_dist.plots` wait for matplotlib, and for the end of the run.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mnist_dist import evaluation, tracking
from mnist_dist.augment import augment
from mnist_dist.data import Split

_ROWS, _COLUMNS, _ZOOM = 5, 10, 3


def save_samples(split: Split, transforms: Tensor, folder: Path) -> dict[str, Path]:
    """Write the first images of `split`, as they are and as `transforms` [n, 2, 3] make them; the files by name. Raises OSError."""
    count = min(_ROWS * _COLUMNS, len(split), len(transforms))
    plain = split.images[:count]
    augmented = augment(plain, transforms[:count].to(plain.device)).mul(255).round().to(torch.uint8)[:, 0]
    return {
        "training_images": _save(_tile(plain.cpu()), folder / "training_images.png"),
        "training_images_augmented": _save(_tile(augmented.cpu()), folder / "training_images_augmented.png"),
    }


def save_mistakes(split: Split, mistakes: Sequence[evaluation.Mistake], name: str, folder: Path) -> list[tracking.Mistake]:
    """Write the images of `mistakes` in `split`, which is called `name`, and describe each as trackers take it. Raises OSError."""
    found = []
    for place, probabilities in mistakes:
        path = folder / f"{name}-{place}.png"
        if not path.exists():  # the same image may be wrong in many evaluations
            _save(split.images[place].cpu(), path)
        found.append(tracking.Mistake(path, int(split.labels[place]), probabilities))
    return found


def _tile(images: Tensor) -> Tensor:
    """uint8 [n, height, width] as one picture, ten images in a row."""
    _, height, width = images.shape
    rows = -(-len(images) // _COLUMNS)
    padded = torch.zeros(rows * _COLUMNS, height, width, dtype=torch.uint8)
    padded[: len(images)] = images
    return padded.view(rows, _COLUMNS, height, width).transpose(1, 2).reshape(rows * height, _COLUMNS * width)


def _save(pixels: Tensor, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.numpy())
    image.resize((image.width * _ZOOM, image.height * _ZOOM), Image.Resampling.NEAREST).save(path)
    return path
