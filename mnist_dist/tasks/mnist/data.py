"""MNIST and its relatives: the embedded files, those of torchvision's data sets in a folder, a synthetic set. Each is one uint8 tensor."""

import gzip
import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from mnist_dist.errors import UserError
from mnist_dist.files import read_file
from mnist_dist.randomness import make_generator
from mnist_dist.tasks.mnist import CLASSES, SIZES
from mnist_dist.tasks.mnist.embedded import read_files

Split = tuple[Tensor, Tensor]  # images uint8 [n, 28, 28] and labels int64 [n]

_FILE_BYTES_MAX = 64 << 20  # the largest has 47 MB
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_QMNIST = ("qmnist-train-images-idx3-ubyte", "qmnist-train-labels-idx2-int", "qmnist-test-images-idx3-ubyte", "qmnist-test-labels-idx2-int")
# The name that torchvision gives the class and the folder of a data set, and its files: images and labels to train on, then to test on.
_FILES = {"fashion_mnist": ("FashionMNIST", _IDX), "kmnist": ("KMNIST", _IDX), "qmnist": ("QMNIST", _QMNIST)}


def load_dataset(name: str, data_dir: str | None, download: bool) -> tuple[TensorDataset, TensorDataset]:
    """The images uint8 [n, 28, 28] and labels int64 [n] of the data set `name`, to train on and to test on.

    Raises `UserError` for a missing or damaged file.
    """
    if name == "mnist":
        train, test = _load_embedded_mnist()
    elif name == "synthetic":
        train, test = (_make_synthetic(size, part) for size, part in zip(SIZES["synthetic"], ("train", "test"), strict=True))
    else:
        assert data_dir is not None, "Mnist checks this"
        train, test = _load_files(name, Path(data_dir), download)
    for (images, labels), part, size in zip((train, test), ("training", "test"), SIZES[name], strict=True):
        if images.shape != (size, 28, 28) or images.dtype != torch.uint8 or labels.shape != (size,) or not _are_labels(labels):
            raise UserError(
                f"the {part} files of {name} hold images {list(images.shape)} and labels {list(labels.shape)}; "
                f"expected [{size}, 28, 28], and as many labels from 0 to {CLASSES - 1}"
            )
    return TensorDataset(*train), TensorDataset(*test)


def _are_labels(labels: Tensor) -> bool:
    return bool(labels.min() >= 0) and bool(labels.max() < CLASSES)


def measure_pixels(images: Tensor) -> tuple[float, float]:
    """The mean and the standard deviation of pixels uint8, on the scale 0 to 1."""
    # From the counts of the 256 pixel values: exact in integers, so the same on every machine.
    counts = torch.bincount(images.reshape(-1), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / counts.sum()
    return round(mean.item(), 6), round(max(variance.item(), 1e-6) ** 0.5, 6)


def _load_embedded_mnist() -> tuple[Split, Split]:
    tensors = {
        # idx: a magic number and the sizes, four bytes each
        name: torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=16 if "images" in name else 8)
        for name, raw in read_files().items()
    }
    train, test = (
        (tensors[f"{part}-images-idx3-ubyte"].reshape(-1, 28, 28), tensors[f"{part}-labels-idx1-ubyte"].long())
        for part in ("train", "t10k")
    )
    return train, test


def _load_files(name: str, folder: Path, download: bool) -> tuple[Split, Split]:
    """The splits in the idx files of one of torchvision's data sets, compressed or not, in `folder` or where torchvision keeps them."""
    kind, names = _FILES[name]
    places = (folder, folder / kind / "raw", folder / kind)
    if download and any(_find_file(places, file) is None for file in names):
        _download(name, kind, folder)
    found = [_find_file(places, file) for file in names]
    missing = [file for file, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise UserError(
            f"{name} lacks {', '.join(missing)} (or the same with .gz) in {places[0]} and in {places[1]}: "
            "copy the files there, or add --download to fetch them"
        )
    try:
        tensors = [_read_idx(path) for path in found if path is not None]
    except UserError as error:
        raise UserError(f"{error}; copy {name} again, or remove the file and add --download to fetch it") from error
    # QMNIST's labels are rows of eight numbers, of which the first is the class.
    train, test = ((images, labels.reshape(len(labels), -1)[:, 0].contiguous()) for images, labels in (tensors[:2], tensors[2:]))
    return train, test


def _find_file(places: Sequence[Path], name: str) -> Path | None:
    candidates = [place / file for place in places for file in (name, f"{name}.gz")]
    return next((path for path in candidates if os.path.lexists(path)), None)


def _download(name: str, kind: str, folder: Path) -> None:
    # Imported here: torchvision costs seconds, and only a download needs it.
    from filelock import FileLock
    from torchvision import datasets

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All processes that share the folder come here; the first one fetches, the others then find the files.
        with FileLock(folder / f".{name}.lock"):
            for train in (True, False):
                getattr(datasets, kind)(str(folder), train=train, download=True)
    except Exception as error:  # torchvision raises many kinds
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UserError(f"the files of {name} cannot be fetched into {folder}: check the network and the folder ({reason})") from error


def _read_idx(path: Path) -> Tensor:
    """The numbers in a file of MNIST's own format: uint8 images [n, height, width] or int64 labels [n] or [n, columns]."""
    try:
        content = read_file(path, _FILE_BYTES_MAX)
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(_FILE_BYTES_MAX + 1)
        # Two zeros, the type, the number of dimensions; then each dimension, then the numbers, of four bytes or one, the highest first.
        dtype: Any = {8: "u1", 12: ">i4"}[content[2]]
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, offset=4).tolist()
        values = np.frombuffer(content, dtype, offset=4 + 4 * dimensions).reshape(shape)
        if dimensions not in (1, 2, 3) or not values.size or (dimensions == 3 and dtype != "u1"):
            raise ValueError(f"it holds numbers of type {dtype} in {dimensions} dimensions of sizes {shape}")
    except (OSError, EOFError, ValueError, LookupError, zlib.error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
        raise UserError(f"the data file {path} cannot be read or is damaged: {reason}") from error
    return torch.from_numpy(values.copy()) if dimensions == 3 else torch.from_numpy(values.astype(np.int64))


def _make_synthetic(size: int, part: str) -> Split:
    # Each class is a blocky pattern of its own under noise: learnt in a few dozen steps, but not at once.
    patterns = torch.rand(CLASSES, 1, 7, 7, generator=make_generator(0, "synthetic patterns"))
    patterns = torch.nn.functional.interpolate(patterns, size=(28, 28), mode="nearest")[:, 0]
    generator = make_generator(0, f"synthetic {part}")
    labels = torch.randint(CLASSES, (size,), generator=generator)
    noise = torch.rand(size, 28, 28, generator=generator)
    return ((0.4 * patterns[labels] + 0.6 * noise) * 255).to(torch.uint8), labels
