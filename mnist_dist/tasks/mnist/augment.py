"""Random affine augmentation of a batch, on the device.

The parameters of a step are drawn for the whole global batch and then sliced, so that a sample gets the same augmentation wherever it is
computed.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_dist.randomness import make_generator

# Drawing takes some thirty small operations, whether for one step or for many; one at a time they would be a hundredth of a training step.
STEPS_AT_ONCE = 64


class Limits(NamedTuple):
    """The largest random rotation and shear (degrees), change of size (fraction) and shift along each axis (pixels)."""

    rotation: float
    shear: float
    scale: float
    shift: float


def draw_transforms(limits: Limits, seed: int, step: int, size: int) -> Tensor:
    """Affine matrices float32 [size, 2, 3] for the samples of `step`, a function of (seed, step). Not to be written over.

    Each maps the coordinates of an output pixel, from -1 to 1, to those of the input, as `torch.nn.functional.affine_grid` wants them.
    """
    block, place = divmod(step, STEPS_AT_ONCE)
    return _draw_block(limits, seed, block, size)[place]


@functools.lru_cache(maxsize=1)
def _draw_block(limits: Limits, seed: int, block: int, size: int) -> Tensor:
    """The transforms [STEPS_AT_ONCE, size, 2, 3] of the steps from `block * STEPS_AT_ONCE` on."""
    steps = range(block * STEPS_AT_ONCE, (block + 1) * STEPS_AT_ONCE)
    generators = (make_generator(seed, "augmentation", step) for step in steps)
    uniform = 2 * torch.stack([torch.rand(5, size, generator=generator) for generator in generators], dim=1) - 1
    shift_units = limits.shift * 2 / 28  # the 28 pixels span 2 units
    most = torch.tensor([math.radians(limits.rotation), math.radians(limits.shear), limits.scale, shift_units, shift_units])
    angle, shear_angle, growth, shift_x, shift_y = uniform * most[:, None, None]
    scale, shear = 1 / (1 + growth), torch.tan(shear_angle)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    # rotation * scale * [[1, shear], [0, 1]], and the shift
    entries = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
    return torch.stack(entries, dim=-1).view(STEPS_AT_ONCE, size, 2, 3)


def augment(images: Tensor, transforms: Tensor) -> Tensor:
    """Apply `transforms` [n, 2, 3] to `images` uint8 [n, 28, 28]; float32 [n, 1, 28, 28] from 0 to 1, black where nothing was."""
    return F.grid_sample(_scale(images), _make_grid(transforms), mode="bilinear", padding_mode="zeros", align_corners=False)


def _scale(images: Tensor) -> Tensor:
    """A copy in float32 [n, 1, 28, 28] from 0 to 1, which may be written over."""
    return images.unsqueeze(1).to(torch.float32, copy=True).div_(255)


def _make_grid(transforms: Tensor) -> Tensor:
    """What `torch.nn.functional.affine_grid` gives, as one sum instead of a matrix product: a tenth of its time on a CPU."""
    centres = _centre_pixels(transforms.device)
    along_x = transforms[:, :, 0, None] * centres
    along_y = transforms[:, :, 1, None] * centres + transforms[:, :, 2, None]
    return along_x.transpose(1, 2)[:, None] + along_y.transpose(1, 2)[:, :, None]


@functools.cache
def _centre_pixels(device: torch.device) -> Tensor:
    """The coordinate, from -1 to 1, of the middle of each pixel of a row."""
    return (2 * torch.arange(28, device=device) + 1) / 28 - 1


def make_inputs(images: Tensor, mean: float, std: float, transforms: Tensor | None = None) -> Tensor:
    """The model's input float32 [n, 1, 28, 28] for `images` uint8 [n, 28, 28]: augmented if `transforms` are given, then normalised."""
    pixels = _scale(images) if transforms is None else augment(images, transforms)
    return pixels.sub_(mean).div_(std)
