"""Random affine augmentation of a batch, on the device.

The parameters of a step are drawn for the whole global batch and then sliced, so that a sample gets the same augmentation wherever it is
computed.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_dist.config import Config
from mnist_dist.randomness import make_generator


def draw_transforms(config: Config, step: int) -> Tensor:
    """Affine matrices float32 [batch_size, 2, 3] for all samples of `step`, a function of (seed, step).

    Each maps the coordinates of an output pixel, from -1 to 1, to those of the input, as `torch.nn.functional.affine_grid` wants them.
    """
    uniform = 2 * torch.rand(5, config.batch_size, generator=make_generator(config.seed, "augmentation", step)) - 1
    angle = uniform[0] * math.radians(config.rotation)
    shear = torch.tan(uniform[1] * math.radians(config.shear))
    scale = 1 / (1 + uniform[2] * config.scale)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    shift = uniform[3:] * (config.shift * 2 / 28)  # the 28 pixels span 2 units
    # rotation * scale * [[1, shear], [0, 1]]
    rows = [torch.stack([cos, shear * cos - sin, shift[0]], dim=1), torch.stack([sin, shear * sin + cos, shift[1]], dim=1)]
    return torch.stack(rows, dim=1)


def augment(images: Tensor, transforms: Tensor) -> Tensor:
    """Apply `transforms` [n, 2, 3] to `images` uint8 [n, 28, 28]; float32 [n, 1, 28, 28] from 0 to 1, black where nothing was."""
    return F.grid_sample(_scale(images), _make_grid(transforms), mode="bilinear", padding_mode="zeros", align_corners=False)


def _scale(images: Tensor) -> Tensor:
    """A copy in float32 [n, 1, 28, 28] from 0 to 1, which may be written over."""
    return images.unsqueeze(1).to(torch.float32, copy=True).div_(255)


def _make_grid(transforms: Tensor) -> Tensor:
    """What `torch.nn.functional.affine_grid` gives, as one sum instead of a matrix product: a tenth of its time on a CPU."""
    centres = (2 * torch.arange(28, device=transforms.device) + 1) / 28 - 1
    along_x = transforms[:, :, 0, None] * centres
    along_y = transforms[:, :, 1, None] * centres + transforms[:, :, 2, None]
    return along_x.transpose(1, 2)[:, None] + along_y.transpose(1, 2)[:, :, None]


def make_inputs(images: Tensor, mean: float, std: float, transforms: Tensor | None = None) -> Tensor:
    """The model's input float32 [n, 1, 28, 28] for `images` uint8 [n, 28, 28]: augmented if `transforms` are given, then normalised."""
    pixels = _scale(images) if transforms is None else augment(images, transforms)
    return pixels.sub_(mean).div_(std)
