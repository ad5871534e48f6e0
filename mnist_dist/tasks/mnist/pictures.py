"""Pictures of the training images: as they are, and as the augmentation changes them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnist_dist.figures import COLUMNS, SHOWN, render_pixels
from mnist_dist.tasks.mnist import CLASSES
from mnist_dist.tasks.mnist.augment import Limits, augment, draw_transforms

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tile_samples(train: Any, transforms: Tensor) -> dict[str, bytes]:
    """PNG files of the first images of `train`, as they are and as `transforms` [n, 2, 3] make them, by their names."""
    count = min(SHOWN, len(train), len(transforms))
    plain = train.tensors[0][:count]
    augmented = augment(plain, transforms[:count].to(plain.device)).mul(255).round().to(torch.uint8)[:, 0]
    return {
        "training_images": render_pixels(_tile(plain.cpu())),
        "training_images_augmented": render_pixels(_tile(augmented.cpu())),
    }


def _tile(images: Tensor) -> Tensor:
    """uint8 [n, height, width] as one picture, ten images in a row."""
    _, height, width = images.shape
    rows = -(-len(images) // COLUMNS)
    padded = torch.zeros(rows * COLUMNS, height, width, dtype=torch.uint8)
    padded[: len(images)] = images
    return padded.view(rows, COLUMNS, height, width).transpose(1, 2).reshape(rows * height, COLUMNS * width)


def draw_data_sample(train: Any, names: Sequence[str]) -> "Figure":
    """The first images of each class."""
    from mnist_dist.tasks.figures import draw_grid  # matplotlib takes time to import

    images, labels = train.tensors
    places = [(labels == label).nonzero().flatten()[: SHOWN // CLASSES].tolist() for label in range(CLASSES)]
    chosen = [same[row] for row in range(SHOWN // CLASSES) for same in places if row < len(same)]
    captions = [names[label] for label in labels[chosen].tolist()]
    return draw_grid(images[chosen], captions, "Training images", f"The first of each class, from {len(train):,}")


def draw_augmented_sample(train: Any, limits: Limits) -> "Figure":
    """Some images of `train`, each followed by variants that the augmentation draws."""
    from mnist_dist.tasks.figures import draw_grid

    originals = train.tensors[0][: SHOWN // COLUMNS]
    repeated = originals.repeat_interleave(COLUMNS, dim=0)
    transforms = draw_transforms(limits, 0, 0, len(repeated))
    pixels = augment(repeated, transforms.to(repeated.device)).squeeze(1)
    pixels[::COLUMNS] = originals.float() / 255
    amounts = f"up to {limits.rotation:g}° rotation, {limits.shear:g}° shear, {limits.scale:.0%} size, {limits.shift:g} pixels shift"
    captions = ["original" if index % COLUMNS == 0 else "" for index in range(len(repeated))]
    return draw_grid(pixels, captions, "Augmentation", f"Each row: an image, then what training may see of it: {amounts}")
