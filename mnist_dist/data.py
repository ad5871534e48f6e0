"""The data: embedded MNIST, torchvision's relatives, a synthetic set; the sampler and the loader.

A data set is one uint8 tensor on the device, so a batch is one gather: there are no worker processes to seed, feed or restore.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from mnist_dist.config import CLASSES, DATASET_SIZES, Config
from mnist_dist.errors import UserError
from mnist_dist.files import read_file
from mnist_dist.randomness import derive_seed, make_generator

_FILE_BYTES_MAX = 64 << 20  # the largest has 47 MB
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_QMNIST = ("qmnist-train-images-idx3-ubyte", "qmnist-train-labels-idx2-int", "qmnist-test-images-idx3-ubyte", "qmnist-test-labels-idx2-int")
# The name that torchvision gives the class and the folder of a data set, and its files: images and labels to train on, then to test on.
_FILES = {"fashion_mnist": ("FashionMNIST", _IDX), "kmnist": ("KMNIST", _IDX), "qmnist": ("QMNIST", _QMNIST)}


class Share(NamedTuple):
    """What one rank trains on in one step: int64 `indices` [batch_size / world_size] into the training split."""

    step: int
    indices: Tensor


class Batch(NamedTuple):
    """A share with its images uint8 [n, 28, 28] and labels int64 [n] on the device."""

    step: int
    indices: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Split:
    """Images uint8 [n, 28, 28] and their labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, share: "Share") -> "Batch":
        """A DataLoader calls this once for each batch."""
        where = share.indices.to(self.images.device, non_blocking=True)
        # Whole images are copied; by images[where] it would be a pixel at a time, which on a CPU takes six times as long.
        return Batch(share.step, share.indices, self.images.index_select(0, where), self.labels.index_select(0, where))

    def first(self, size: int | None) -> "Split":
        """The first `size` images; all where it is None."""
        return Split(self.images[:size], self.labels[:size])

    def to(self, device: torch.device) -> "Split":
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """The splits of a data set, and the mean and standard deviation of the pixels of `train` on the scale 0 to 1.

    `holdout` is the part of the training images that `Config.holdout` sets apart, or None.
    """

    train: Split
    test: Split
    holdout: Split | None
    mean: float
    std: float

    @property
    def evaluated(self) -> Split:
        """The images on which a run is evaluated."""
        return self.test if self.holdout is None else self.holdout

    def fingerprint(self) -> str:
        """A short hash of the training split, by which a checkpoint knows the data it was trained on."""
        digest = hashlib.sha256(self.train.images.cpu().numpy().tobytes())
        digest.update(self.train.labels.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device) -> "Dataset":
        """The same data on `device`."""
        holdout = None if self.holdout is None else self.holdout.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), holdout=holdout)


def load_dataset(config: Config) -> Dataset:
    """The data set of `config`, on the CPU. Raises `UserError` for a missing or damaged file."""
    if config.dataset == "mnist":
        train, test = _load_embedded_mnist()
    elif config.dataset == "synthetic":
        train, test = (_make_synthetic(size, part) for size, part in zip(DATASET_SIZES["synthetic"], ("train", "test"), strict=True))
    else:
        assert config.data_dir is not None, "Config checks this"
        train, test = _load_files(config.dataset, Path(config.data_dir), config.download)
    for split, part, size in zip((train, test), ("training", "test"), DATASET_SIZES[config.dataset], strict=True):
        if (
            split.images.shape != (size, 28, 28)
            or split.images.dtype != torch.uint8
            or split.labels.shape != (size,)
            or not _are_labels(split.labels)
        ):
            raise UserError(
                f"the {part} files of {config.dataset} hold images {list(split.images.shape)} and labels {list(split.labels.shape)}; "
                f"expected [{size}, 28, 28], and as many labels from 0 to {CLASSES - 1}"
            )
    train, holdout = _hold_out(train.first(config.train_size), config.holdout)
    return Dataset(train, test.first(config.test_size), holdout, *_measure(train.images))


def _hold_out(split: Split, count: int) -> tuple[Split, Split | None]:
    """`split` without `count` of its images, evenly spread and the same for every seed, and those images."""
    if not count:
        return split, None
    held = torch.zeros(len(split), dtype=torch.bool)
    held[torch.arange(count) * len(split) // count] = True
    return Split(split.images[~held], split.labels[~held]), Split(split.images[held], split.labels[held])


def _are_labels(labels: Tensor) -> bool:
    return bool(labels.min() >= 0) and bool(labels.max() < CLASSES)


def _measure(images: Tensor) -> tuple[float, float]:
    # From the counts of the 256 pixel values: exact in integers, so the same on every machine.
    counts = torch.bincount(images.reshape(-1), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / counts.sum()
    return round(mean.item(), 6), round(max(variance.item(), 1e-6) ** 0.5, 6)


def _load_embedded_mnist(folder: Any = None) -> tuple[Split, Split]:
    folder = folder or resources.files("mnist_dist") / "mnist"
    checksums = json.loads((folder / "checksums.json").read_text())

    def read(name: str) -> Tensor:
        file = folder / f"{name}.xz"
        try:
            raw = lzma.decompress(file.read_bytes())
        except (OSError, lzma.LZMAError, EOFError) as error:
            raise UserError(f"the data file {file} is missing or damaged ({error}): install the package again") from error
        if hashlib.sha256(raw).hexdigest() != checksums[name]:
            raise UserError(f"the data file {file} is damaged (its checksum differs): install the package again")
        header = 16 if "images" in name else 8  # idx: a magic number and the sizes, four bytes each
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=header)

    with ThreadPoolExecutor(2) as threads:  # lzma releases the interpreter lock
        tensors = dict(zip(checksums, threads.map(read, checksums), strict=True))
    train, test = (
        Split(tensors[f"{part}-images-idx3-ubyte"].reshape(-1, 28, 28), tensors[f"{part}-labels-idx1-ubyte"].long())
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
    train, test = (Split(images, labels.reshape(len(labels), -1)[:, 0].contiguous()) for images, labels in (tensors[:2], tensors[2:]))
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
    return Split(((0.4 * patterns[labels] + 0.6 * noise) * 255).to(torch.uint8), labels)


class StepSampler(DistributedSampler[Any]):
    """Yields this rank's `Share` of each step, from any start step.

    Over all ranks, step k of an epoch trains on `permutation[k*B : (k+1)*B]`, where B is the global batch size and the permutation is a
    function of (seed, epoch): the batch does not depend on the number of ranks. What is left of an epoch after its last whole batch is
    left out, the same in every world.
    """

    def __init__(self, split: Split, config: Config, rank: int, world_size: int, start_step: int) -> None:
        assert config.batch_size % world_size == 0, "Config.check_world checks this"
        super().__init__(split, num_replicas=world_size, rank=rank, shuffle=True, drop_last=True)  # type: ignore[arg-type]
        self.config = config
        self.start_step = start_step
        self.local_batch_size = config.batch_size // world_size

    def __len__(self) -> int:
        return self.config.total_steps - self.start_step

    def __iter__(self) -> Iterator[Share]:
        indices, shuffled_epoch = torch.empty(0), -1
        for step in range(self.start_step, self.config.total_steps):
            epoch, batch = divmod(step, self.config.steps_per_epoch)
            if epoch != shuffled_epoch:
                # DistributedSampler shuffles by seed + epoch. The hash replaces that sum; the rest (this rank's share) is its own work.
                self.seed, self.epoch = derive_seed(self.config.seed, "order", epoch) >> 1, 0
                indices, shuffled_epoch = torch.tensor(list(super().__iter__())), epoch
            yield Share(step, indices[batch * self.local_batch_size : (batch + 1) * self.local_batch_size])

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: Accelerate calls this with its own count of epochs, but here the epoch follows from the step."""


def make_loader(split: Split, config: Config, accelerator: Accelerator, start_step: int) -> DataLoader[Any]:
    """A loader of `Batch`es for the steps from `start_step` to the end of the run.

    Accelerate wraps it as for one process, because the sampler has already taken this rank's share: `accelerator.prepare` would
    shard it a second time, and half of the images would never be seen.
    """
    sampler = StepSampler(split, config, accelerator.process_index, accelerator.num_processes, start_step)
    loader: DataLoader[Any] = DataLoader(split, batch_sampler=sampler, collate_fn=_keep)  # type: ignore[arg-type]
    # A batch is gathered where the split is, on the device.
    return prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)


def _keep(batch: Any) -> Any:
    return batch
