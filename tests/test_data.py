import gzip
import itertools
import json
import lzma
import multiprocessing
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mnist_dist.batches import StepSampler
from mnist_dist.config import configure
from mnist_dist.data import find_other_facts, fingerprint, load_data
from mnist_dist.distributed import join_group
from mnist_dist.errors import UserError
from mnist_dist.randomness import read_generators, seed_generators
from mnist_dist.reader import Reader
from mnist_dist.samples import encode_tensor
from mnist_dist.tasks.mnist import Mnist, data, embedded
from mnist_dist.tasks.mnist.augment import Limits, _make_grid, augment, draw_transforms, make_inputs
from mnist_dist.tasks.mnist.data import measure_pixels
from mnist_dist.world import World

EMBEDDED = Path(data.__file__).parent / "files"


def load(**values):
    """The images and labels of the built-in task with some options: of what is trained on, and of what is tested on."""
    _, loaded = load_data(configure(**values))
    return loaded.train.tensors, loaded.test.tensors


def fingerprint_of(config):
    config, loaded = load_data(config)
    return fingerprint(loaded.train, config.task)


def draw(config, step):
    return config.task.draw(config.seed, step, config.batch_size)


@pytest.fixture(scope="module")
def mnist():
    return load()


def test_mnist_is_whole_and_quick_to_load(mnist):
    start = time.process_time()  # its own, whatever else the machine has to do
    load()
    assert time.process_time() - start < 5
    (images, labels), (_, test_labels) = mnist
    assert images.shape == (60_000, 28, 28)
    assert images.dtype == torch.uint8
    assert test_labels.dtype == torch.int64
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert [round(value, 4) for value in measure_pixels(images)] == [0.1307, 0.3081]
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_a_config_knows_the_pixels_that_it_is_trained_on():
    facts = [load_data(configure(dataset="synthetic", train_size=size))[0].task.facts for size in (100, 100, 200)]
    assert facts[0] == facts[1] != facts[2]
    assert facts[0]["dataset"] == "synthetic"


def test_the_package_keeps_mnist_small_and_states_its_licence():
    assert sum(path.stat().st_size for path in EMBEDDED.glob("*.xz")) < 10_000_000
    assert "Attribution-ShareAlike 3.0" in " ".join((EMBEDDED / "LICENSE").read_text().split())


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "other data"])
def test_a_damaged_embedded_file_is_refused(tmp_path, damage):
    shutil.copytree(EMBEDDED, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "t10k-labels-idx1-ubyte.xz"
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[:1000])
    elif damage == "missing":
        file.unlink()
    else:  # whole as a file, but not MNIST
        raw = bytearray(lzma.decompress(content))
        raw[100] ^= 1
        file.write_bytes(lzma.compress(raw))
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.xz is .*install the package again"):
        embedded.read_files(tmp_path)


@pytest.mark.slow
def test_the_embedded_files_are_unpacked_before_torch_is_there():
    code = "import sys; from mnist_dist.tasks.mnist import Mnist, embedded; Mnist().load_ahead(); Mnist(dataset='synthetic').load_ahead()\n"
    code += "assert 'torch' not in sys.modules; assert [len(begun) for begun in embedded._ahead] == [4]"
    subprocess.run([sys.executable, "-c", code], check=True)
    embedded.load_ahead()
    ahead, later = embedded.read_files(), embedded.read_files()
    assert ahead == later
    assert not embedded._ahead


def test_the_packing_script_makes_what_the_package_holds(tmp_path):
    from mnist_dist.tasks.mnist.files import pack

    tiny = {name: struct.pack(">II", 0x801, 3) + bytes([1, 2, index]) for index, name in enumerate(pack.NAMES)}
    for name, raw in tiny.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
    pack.pack(tmp_path, tmp_path)
    assert {name: lzma.decompress((tmp_path / f"{name}.xz").read_bytes()) for name in tiny} == tiny
    assert set(json.loads((tmp_path / "checksums.json").read_text())) == set(json.loads((EMBEDDED / "checksums.json").read_text()))


def test_subsets_and_the_synthetic_set():
    small = configure(dataset="synthetic", train_size=100, test_size=7)
    _, loaded = load_data(small)
    assert (len(loaded.train), len(loaded.test)) == (100, 7)
    whole, _ = load(dataset="synthetic")
    assert torch.equal(whole[0][:100], loaded.train.tensors[0])
    assert fingerprint_of(configure(dataset="synthetic")) != fingerprint_of(small)
    assert fingerprint_of(small) == fingerprint_of(configure(dataset="synthetic", train_size=100))


# Files of torchvision's data sets, made here: nothing can be fetched in a test.


def write_idx_files(folder, train=60_000, test=10_000, mark=0):
    folder.mkdir(parents=True, exist_ok=True)
    for part, size in (("train", train), ("t10k", test)):
        images = struct.pack(">IIII", 0x803, size, 28, 28) + bytes([mark]) * (size * 784)
        labels = struct.pack(">II", 0x801, size) + bytes(i % 10 for i in range(size))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)


@pytest.mark.parametrize(("name", "folder"), [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_files_of_torchvision_data_sets_are_used(tmp_path, name, folder):
    write_idx_files(tmp_path / folder / "raw", mark=7)
    (images, _), (test_images, test_labels) = load(dataset=name, data_dir=str(tmp_path))
    assert images.shape == (60_000, 28, 28)
    assert int(test_images[0, 0, 0]) == 7
    assert test_labels[:12].tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize("folder", ["", "FashionMNIST", "FashionMNIST/raw"])
@pytest.mark.parametrize("compressed", [True, False])
def test_files_are_found_as_people_have_them(tmp_path, folder, compressed):
    """In the folder itself, as distributions have them, or in torchvision's; compressed, as they are published, or not."""
    write_idx_files(tmp_path / folder, mark=3)
    for path in (tmp_path / folder).glob("*-ubyte") if compressed else []:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    (images, labels), _ = load(dataset="fashion_mnist", data_dir=str(tmp_path))
    assert int(images[5, 3, 3]) == 3
    assert labels.dtype == torch.int64
    (tmp_path / folder / ("t10k-labels-idx1-ubyte" + ".gz" * compressed)).unlink()
    with pytest.raises(UserError) as error:
        load(dataset="fashion_mnist", data_dir=str(tmp_path))
    assert f"fashion_mnist lacks t10k-labels-idx1-ubyte (or the same with .gz) in {tmp_path} and in {tmp_path}/FashionMNIST/raw" in str(
        error.value
    )


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("bomb", marks=pytest.mark.slow),
        "cut",
        "other bytes",
        "fifo",
        "other type",
        "floats",
        "no dimensions",
        "no images",
        "wide numbers",
    ],
)
def test_a_compressed_file_that_is_not_right_is_named_in_time(tmp_path, fault):
    write_idx_files(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    content = file.read_bytes()
    file.unlink()
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    damage = {
        "bomb": lambda: gzip.compress(bytes(1 << 30), 1),
        "cut": lambda: gzip.compress(content, 1)[:-100],
        "other bytes": lambda: b"PK" + gzip.compress(content, 1),
        "other type": lambda: gzip.compress(b"\0\0\x0b\3" + content[4:], 1),
        "floats": lambda: gzip.compress(b"\0\0\x0d\3" + content[4:], 1),
        "no dimensions": lambda: b"\0\0\x08\0\1",
        "no images": lambda: b"\0\0\x08\3" + bytes(12),
        "wide numbers": lambda: b"\0\0\x0c\3" + b"\0\0\0\1" * 4,
    }
    if fault == "fifo":
        os.mkfifo(packed)
    else:
        packed.write_bytes(damage[fault]())
    start = time.process_time()
    with pytest.raises(UserError, match=str(packed)):
        load(dataset="fashion_mnist", data_dir=str(tmp_path))
    assert time.process_time() - start < 5


def test_qmnist_takes_the_label_of_its_eight_numbers(tmp_path):
    folder = tmp_path / "QMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        images = struct.pack(">IIII", 0x803, 60_000, 28, 28) + bytes(60_000 * 784)
        rows = b"".join(struct.pack(">8i", i % 10, *[99] * 7) for i in range(60_000))
        (folder / f"qmnist-{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"qmnist-{part}-labels-idx2-int").write_bytes(struct.pack(">III", 0xC02, 60_000, 8) + rows)
    (_, labels), (test_images, _) = load(dataset="qmnist", data_dir=str(tmp_path))
    assert test_images.shape == (60_000, 28, 28)
    assert labels[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("fault", ["missing", "truncated", "wrong size", "garbage"])
def test_a_missing_or_damaged_torchvision_file_says_what_to_do(tmp_path, fault):
    raw = tmp_path / "FashionMNIST" / "raw"
    if fault != "missing":
        write_idx_files(raw, **({"test": 9} if fault == "wrong size" else {}))
    file = raw / "train-images-idx3-ubyte"
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif fault == "garbage":
        file.write_bytes(b"no idx file")
    with pytest.raises(UserError) as error:
        load(dataset="fashion_mnist", data_dir=str(tmp_path))
    message = str(error.value)
    assert "fashion_mnist" in message
    assert ("expected [10000, 28, 28]" if fault == "wrong size" else "--download") in message
    assert "\n" not in message


def _download(folder):
    from torchvision import datasets

    class Fetched(datasets.FashionMNIST):
        def download(self):
            if not self._check_exists():
                with (folder / "downloads").open("a") as file:
                    file.write("x")
                time.sleep(0.3)
                write_idx_files(folder / "FashionMNIST" / "raw")

    Fetched.__name__ = "FashionMNIST"
    datasets.FashionMNIST = Fetched
    load(dataset="fashion_mnist", data_dir=str(folder), download=True)


def test_only_one_process_downloads(tmp_path):
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_download, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "downloads").read_text() == "x"


# The order of the training images.


def shares(config, world_size, start_step=0):
    config, loaded = load_data(config)
    return [list(StepSampler(loaded.train, config, rank, world_size, start_step)) for rank in range(world_size)]


def synthetic(**values):
    return configure(dataset="synthetic", train_size=50, batch_size=12, **values)


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_the_global_batch_does_not_depend_on_the_world(world_size):
    config = synthetic(steps=10)
    alone = [share.indices for share in shares(config, 1)[0]]
    ranks = shares(config, world_size)
    for step, batch in enumerate(alone):
        assert all(rank[step].step == step for rank in ranks)
        # Rank r holds every world_size-th index of the batch, as DistributedSampler deals them.
        for r, rank in enumerate(ranks):
            assert torch.equal(rank[step].indices, batch[r::world_size])


def test_no_index_is_seen_twice_in_an_epoch_and_what_is_left_out_is_the_same_in_every_world():
    config = synthetic(epochs=3)
    seen = {}
    for world_size in (1, 2, 4):
        ranks = shares(config, world_size)
        for epoch in range(3):
            steps = range(epoch * 4, epoch * 4 + 4)
            indices = torch.cat([rank[step].indices for rank in ranks for step in steps]).tolist()
            assert len(indices) == len(set(indices)) == 48
            assert set(indices) == seen.setdefault(epoch, set(indices))
    assert len({frozenset(epoch) for epoch in seen.values()}) == 3  # another two are left out each time


def test_the_order_starts_at_any_step():
    config = synthetic(steps=11)
    whole = shares(config, 2)
    for start in range(12):
        part = shares(config, 2, start)
        for rank in range(2):
            assert [share.step for share in part[rank]] == list(range(start, 11))
            assert all(torch.equal(a.indices, b.indices) for a, b in zip(part[rank], whole[rank][start:], strict=True))


def test_the_order_follows_from_the_seed_and_no_epoch_repeats_another_seeds():
    first = [share.indices.tolist() for share in shares(synthetic(epochs=3), 1)[0]]
    other = [share.indices.tolist() for share in shares(synthetic(epochs=3, seed=1), 1)[0]]
    assert not any(batch in first for batch in other)


def test_the_loader_gives_the_samplers_shares_through_accelerate():
    config, loaded = load_data(synthetic(steps=9))
    with join_group(World(), config) as group:
        sampler = StepSampler(loaded.train, config, group.rank, group.size, 4)
        with Reader(loaded.train, config, group, "training", sampler) as reader:
            batches = list(reader)
    expected = shares(config, 1, 4)[0]
    assert [batch.step for batch in batches] == list(range(4, 9))
    for batch, share in zip(batches, expected, strict=True):
        assert torch.equal(batch.indices, share.indices)
        [micro_batch] = batch.micro_batches
        for own, whole in zip(micro_batch.samples, loaded.train.tensors, strict=True):
            assert torch.equal(own, whole[share.indices])


# Augmentation.


def test_each_sample_gets_the_same_augmentation_in_every_world():
    config = synthetic()
    images = load_data(config)[1].train.tensors[0][:12]
    transforms = draw(config, 5)
    whole = make_inputs(images, 0.1, 0.3, transforms)
    for world_size in (2, 4):
        for rank in range(world_size):
            mine = slice(rank, None, world_size)
            assert torch.equal(make_inputs(images[mine], 0.1, 0.3, draw(config, 5)[mine]), whole[mine])
    later = [draw(config, step) for step in (6, 69, 500)]
    assert not any(torch.equal(other, transforms) for other in later)
    assert torch.equal(draw(config, 5), transforms)  # whatever was drawn before
    assert not torch.equal(draw(synthetic(seed=1), 5), transforms)


def test_the_transforms_stay_within_the_options():
    config = configure(rotation=0, shear=0, scale=0.1, shift=0, batch_size=1000)
    scales = 1 / draw(config, 0)[:, 0, 0]
    assert 0.9 <= scales.min() < 0.91
    assert 1.09 < scales.max() <= 1.1001
    config = configure(rotation=10, shear=0, scale=0, shift=3, batch_size=1000)
    transforms = draw(config, 0)
    degrees = torch.rad2deg(torch.atan2(transforms[:, 1, 0], transforms[:, 0, 0]))
    assert 9.8 < degrees.abs().max() <= 10.001
    pixels = transforms[:, :, 2] * 14
    assert 2.9 < pixels.abs().max() <= 3.0001
    shear = draw(configure(rotation=0, shear=20, scale=0, shift=0, batch_size=1000), 0)[:, 0, 1]
    assert 19.5 < torch.rad2deg(torch.atan(shear)).abs().max() <= 20.001


def test_no_augmentation_leaves_the_images_alone():
    config = configure(dataset="synthetic", rotation=0, shear=0, scale=0, shift=0, batch_size=4)
    images = load_data(config)[1].train.tensors[0][:4]
    torch.testing.assert_close(augment(images, draw(config, 0)), images.unsqueeze(1) / 255, rtol=0, atol=1e-4)


def test_the_sampling_grid_is_that_of_torch():
    transforms = draw_transforms(Limits(8, 8, 0.08, 2), seed=0, step=3, size=5)
    torch.testing.assert_close(_make_grid(transforms), torch.nn.functional.affine_grid(transforms, [5, 1, 28, 28], align_corners=False))


def test_a_shift_moves_whole_pixels_and_leaves_black():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 10, 10] = 255
    two_right = torch.tensor([[[1.0, 0, -2 * 2 / 28], [0, 1.0, 0]]])
    moved = augment(image, two_right)
    assert moved[0, 0, 10, 12] > 0.99
    assert moved.sum() < 1.01


def test_held_out_images_are_evenly_spread_the_same_for_every_seed_and_not_trained_on():
    config = configure(dataset="synthetic")
    _, whole = load_data(config)
    images, labels = whole.train.tensors
    positions = torch.arange(96) * 4_096 // 96
    for seed in (0, 1):
        held_config, held = load_data(configure(dataset="synthetic", holdout=96, seed=seed))
        assert held.evaluated is held.holdout
        assert torch.equal(held.holdout.tensors[0], images[positions])
        assert torch.equal(held.holdout.tensors[1], labels[positions])
        assert len(held.train) == 4_000 == held_config.training_samples
        assert fingerprint(held.train, held_config.task) != fingerprint(whole.train, config.task)
        assert len(torch.cat([held.train.tensors[0], held.holdout.tensors[0]]).unique(dim=0)) == len(images.unique(dim=0))
    assert whole.holdout is None
    assert whole.evaluated is whole.test


class Kept:
    def __init__(self, value):
        self.value = value
        self.uses = itertools.count()


@pytest.mark.parametrize(
    "make",
    [
        torch.tensor,
        np.array,
        lambda values: np.array(values, dtype=object),
        lambda values: tuple(map(float, values)),
        lambda values: " ".join(map(str, values)),
        lambda values: {"a": [np.float32(values[1])]},
        lambda values: Kept(np.array(values)),
    ],
)
def test_samples_of_any_kind_have_a_fingerprint(make):
    class Samples(Dataset):
        def __init__(self, values):
            self.values = values

        def __len__(self):
            return 9

        def __getitem__(self, _):
            return make(self.values)

    class Handed(Mnist):
        def collate(self, samples):
            return samples

    one, same, other = (fingerprint(samples, Handed()) for samples in map(Samples, ([1, 2], [1, 2], [1, 3])))
    assert one == same != other


@pytest.mark.parametrize(
    "column",
    [
        torch.arange(20.0).reshape(4, 5)[:, -1],
        torch.arange(20.0).reshape(4, 5)[:1, -1],  # of a single number torch keeps the stride
        torch.arange(20.0).reshape(4, 5)[:0, -1],
        torch.tensor(3.0),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j, 3 - 1j]).conj().imag,  # which torch keeps as a number to be negated
        torch.ones(1).expand(4),
    ],
)
def test_the_bytes_of_a_tensor_are_those_of_its_numbers_however_they_lie(column):
    assert bytes(encode_tensor(column)) == column.resolve_conj().resolve_neg().numpy().tobytes()


def test_facts_are_the_same_but_for_rounding():
    facts = {"mean": 0.5, "words": ["a", "b"], "sizes": {"x": 1, "y": [2.0]}}
    assert find_other_facts(facts, {"mean": 0.5 + 1e-7, "words": ["a", "b"], "sizes": {"x": 1, "y": [2]}}) == []
    assert find_other_facts(facts, {"mean": 0.6, "words": ["b", "a"], "sizes": {"x": 1, "y": [2.0]}}) == ["mean", "words"]
    assert find_other_facts(facts, {"mean": 0.5, "words": ["a", "b"], "sizes": {"y": [2.0], "x": 1}}) == ["sizes"]
    assert find_other_facts({"spread": 2e-6, "mean": 1e-9}, {"spread": 1e-4, "mean": -3e-9}) == ["spread"]
    assert find_other_facts({}, {"mean": 0.5}) == find_other_facts("nonsense", {"mean": 0.5}) == ["mean"]


def test_whatever_is_drawn_shows_in_the_state_of_the_generators():
    for draw in (torch.rand, np.random.rand, np.random.randn, lambda count: [random.random() for _ in range(count)]):
        seed_generators(0)
        draw(1)
        for count in (1, 251, 624):
            before = read_generators()
            draw(count)
            assert read_generators() != before, (draw, count)
