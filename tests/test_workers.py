"""Data that are not in memory: the same samples wherever they are read, and a worker that fails is named."""

import ctypes
import gc
import itertools
import json
import os
import pickle
import random
import re
import signal
import time
import warnings
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Train, run_ranks, start_ranks
from safetensors.torch import load_file
from torch.utils.data import Dataset, TensorDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mnist_dist import batches
from mnist_dist.batches import Batch, MicroBatch, StepSampler
from mnist_dist.config import configure, make_config
from mnist_dist.data import SampleProbe, load_data
from mnist_dist.distributed import join_group
from mnist_dist.errors import RunError, UserError, first_line
from mnist_dist.model import build_model
from mnist_dist.reader import Reader, keep_split, read, read_on
from mnist_dist.samples import digest, find_immovable, list_tensors, take_samples
from mnist_dist.tier import describe_flaw, find_tier
from mnist_dist.world import World

TASK = str(Path(__file__).with_name("noisy_task.py"))
NOISY = ["--task", TASK, "--batch_size", "12", "--steps", "10", "--evaluate_every", "5", "--log_every", "1", "--checkpoint_every", "0"]
NOISY += [
    "--learning_rate",
    "0.01",
    "--optimizer",
    "sgd",
    "--momentum",
    "0.9",
    "--precision",
    "fp32",
    "--report",
    "false",
    "--wandb",
    "disabled",
]


def read_run(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if not name.startswith("health/") and name != "train/images_per_s"} for row in rows]
    return rows, load_file(folder / "model.safetensors")


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


def test_samples_are_the_same_at_any_number_of_workers_and_after_any_stop(tmp_path):
    runs = {}
    # Two threads in the process that reads for itself: in a worker there is one.
    for workers in (0, 1, 3):
        run_ranks(tmp_path, Train([*NOISY, "--threads", "2", "--workers", str(workers), "--run_dir", str(tmp_path / str(workers))]))
        runs[workers] = read_run(tmp_path / str(workers))
    assert_same(runs[1], runs[0])
    assert_same(runs[3], runs[0])
    # Stopped by a real signal somewhere in the middle, and resumed with another number of workers.
    arguments = [*NOISY, "--threads", "2", "--run_dir", str(tmp_path / "stopped")]
    [rank] = start_ranks(tmp_path, Train([*arguments, "--workers", "2", "--slow_s", "0.02"]))
    rank.wait_for(lambda: (tmp_path / "stopped/metrics.jsonl").exists() and '"step": 2' in (tmp_path / "stopped/metrics.jsonl").read_text())
    rank.kill(signal.SIGTERM)
    assert rank.wait() == 143, rank.text
    run_ranks(tmp_path, Train([*arguments, "--workers", "1"]))
    assert 2 <= json.loads((tmp_path / "stopped/starts.jsonl").read_text().splitlines()[1])["step"] < 10
    assert_same(read_run(tmp_path / "stopped"), runs[0])


class TrainElsewhere(Train):
    """Without what only Linux and glibc have."""

    def __call__(self):
        for module, name in ((os, "sched_getaffinity"), (os, "posix_fadvise")):
            delattr(module, name)

        class Library(ctypes.CDLL):
            def __getattr__(self, name):
                if name in ("prctl", "mallopt"):
                    raise AttributeError(name)
                return super().__getattr__(name)

        ctypes.CDLL = Library
        return super().__call__()


def test_training_needs_nothing_that_only_linux_has(tmp_path):
    for name, kind in (("here", Train), ("elsewhere", TrainElsewhere)):
        run_ranks(tmp_path, kind([*NOISY, "--threads", "0", "--workers", "1", "--run_dir", str(tmp_path / name)]))
    assert_same(read_run(tmp_path / "elsewhere"), read_run(tmp_path / "here"))


def test_samples_are_the_same_on_any_number_of_ranks(tmp_path):
    rows, weights = {}, {}
    for world in (1, 2, 4):
        run_ranks(tmp_path, Train([*NOISY, "--threads", "1", "--workers", "1", "--run_dir", str(tmp_path / str(world))]), world)
        rows[world], weights[world] = read_run(tmp_path / str(world))
    for world in (2, 4):
        for one, other in zip(rows[1], rows[world], strict=True):
            assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
            assert ("test/loss" in one) == ("test/loss" in other)
            assert other.get("test/loss") == (pytest.approx(one["test/loss"], rel=1e-5) if "test/loss" in one else None)
        assert all(float((value - weights[world][name]).abs().max()) < 1e-5 for name, value in weights[1].items())


@pytest.mark.parametrize(
    ("fault", "words", "workers"),
    [("raises", "ValueError: this picture is torn", 0), ("raises", "ValueError: this picture is torn", 2), ("exits", "SystemExit: 3", 2)],
)
def test_an_error_in_a_sample_names_its_index_and_the_line(tmp_path, fault, words, workers):
    arguments = [*NOISY, "--workers", str(workers), "--fault", fault, "--fault_at", "71", "--run_dir", str(tmp_path / "run")]
    text = run_ranks(tmp_path, Train(arguments), expect=1)
    assert "sample 71 of the training data cannot be read" in text
    assert "noisy_task.py:" in text
    assert words in text
    assert "Traceback" not in text


@pytest.mark.parametrize("index", [72, 71], ids=["held out", "trained on"])
@pytest.mark.parametrize(("fault", "words"), [("raises", "sample {} of the training data cannot be read"), ("dies", "was at sample {}")])
def test_a_sample_has_the_number_that_it_has_in_what_load_returned(tmp_path, fault, words, index):
    """With samples held out, and so few trained on, that all have another place."""
    arguments = [*NOISY, "--holdout", "10", "--train_size", "90", "--workers", "1", "--fault", fault, "--fault_at", str(index)]
    text = run_ranks(tmp_path, Train([*arguments, "--steps", "8", "--run_dir", str(tmp_path / "run")]), expect=1)
    assert words.format(index) in text
    assert "a worker that reads the training data" in text or fault == "raises"


@pytest.mark.parametrize(("fault", "words"), [("dies", "died"), pytest.param("hangs", "gave no samples for 2 s", marks=pytest.mark.slow)])
def test_a_worker_that_dies_or_hangs_is_named(tmp_path, fault, words):
    arguments = [*NOISY, "--workers", "2", "--fault", fault, "--fault_at", "71", "--timeout_s", "2", "--run_dir", str(tmp_path / "run")]
    start = time.monotonic()
    [rank] = start_ranks(tmp_path, Train(arguments))
    assert rank.wait(60) == 1, rank.text
    assert time.monotonic() - start < 40
    assert words in rank.text
    assert "of 2 (process" in rank.text
    assert "was at sample 71" in rank.text
    assert "Traceback" not in rank.text


@pytest.mark.slow
def test_a_worker_that_hangs_on_one_of_two_ranks_is_what_all_of_them_name(tmp_path):
    # Sample 71 is read by rank zero in one of the two, by the other rank in the other.
    whose = set()
    for seed in range(6):
        folder = tmp_path / str(seed)
        arguments = [*NOISY, "--workers", "1", "--fault", "hangs", "--fault_at", "71", "--timeout_s", "8", "--seed", str(seed)]
        ranks = start_ranks(tmp_path / f"ranks{seed}", Train([*arguments, "--run_dir", str(folder)]), 2)
        assert [rank.wait(60) for rank in ranks] == [1, 1]
        found = [
            re.search(r"gave no samples for 6.4 s \(see --timeout_s\): worker 0 of 1 \(process \d+\) was at sample 71", rank.text)
            for rank in ranks
        ]
        assert all(found), [rank.text for rank in ranks]
        whose.add("failed: " in ranks[0].text)
        why = json.loads((folder / "ends.jsonl").read_text().splitlines()[-1])["why"]
        assert "was at sample 71" in why
        if len(whose) == 2:
            return
    raise AssertionError(whose)


@pytest.mark.slow
def test_the_time_for_which_a_run_is_suspended_is_not_that_of_its_workers(tmp_path):
    folder = tmp_path / "run"
    [rank] = start_ranks(tmp_path, Train([*NOISY, "--workers", "1", "--slow_s", "0.05", "--timeout_s", "3", "--run_dir", str(folder)]))
    rank.wait_for(lambda: (folder / "metrics.jsonl").exists() and '"step": 2' in (folder / "metrics.jsonl").read_text())
    processes = [rank.process.pid, *list_children(rank.process.pid)]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    assert rank.wait(120) == 0, rank.text


def test_a_worker_that_dies_while_it_hands_over_its_samples_is_named(monkeypatch):
    # Then the connection breaks, maybe before torch has seen that the worker is dead.
    def lose(iterator, *_, **__):
        os.kill(iterator._workers[0].pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", lose)
    config = make_config({"task": TASK, "workers": 1, "batch_size": 12})
    batches = [Batch.of(torch.arange(12), range(12))]
    with (
        join_group(World(), config) as group,
        pytest.raises(RunError, match=r"a worker that reads the training data died: .*out of memory"),
        Reader(config.task.load().train, config, group, "training", batches) as reader,
    ):
        next(iter(reader))


def list_children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize("to_all", [True, False], ids=["to all processes", "killed"])
def test_a_signal_to_all_processes_saves_and_a_killed_run_leaves_no_worker(tmp_path, to_all):
    folder = tmp_path / "run"
    [rank] = start_ranks(tmp_path, Train([*NOISY, "--workers", "2", "--slow_s", "0.02", "--run_dir", str(folder)]))
    rank.wait_for(lambda: (folder / "metrics.jsonl").exists() and '"step": 3' in (folder / "metrics.jsonl").read_text())
    workers = list_children(rank.process.pid)
    assert len(workers) >= 2
    if to_all:  # as scancel and Ctrl-C do
        for pid in (*workers, rank.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert rank.wait() == 143, rank.text
        assert "saved" in rank.text
    else:
        rank.kill(signal.SIGKILL)
        assert rank.wait() == -signal.SIGKILL
    end = time.monotonic() + 60
    while any(map(is_alive, workers)):
        assert time.monotonic() < end
        time.sleep(0.05)


class Pair(NamedTuple):
    """A batch of a task's own type."""

    image: torch.Tensor
    label: torch.Tensor


@pytest.mark.parametrize("size", [3, 1 << 18])  # sent plainly, and through shared memory
def test_a_batch_comes_from_a_worker_as_it_was_made(size):
    image = torch.arange(size, dtype=torch.float32)
    samples = {
        "pair": Pair(image, torch.tensor(7)),
        "list": [image.to(torch.bfloat16), image.bool(), torch.zeros(0, 2), image[::2]],
        "channels last": torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "names": ("a", None, 3),
        "values": image.numpy(),
    }
    sent = Batch(5, torch.tensor([2, 1]), ((MicroBatch(range(1), samples), MicroBatch(range(1, 2))),))
    batch = pickle.loads(ForkingPickler.dumps(sent))
    assert (type(batch), batch.step, batch.places, batch.indices.tolist()) == (Batch, 5, [0, 1], [2, 1])
    came = batch.micro_batches[0].samples
    assert batch.micro_batches == [MicroBatch(range(1), came), MicroBatch(range(1, 2))]
    assert type(came["pair"]) is Pair
    assert [*came] == [*samples]
    assert came["names"] == samples["names"]
    assert isinstance(came["values"], np.ndarray)
    for one, other in zip(list_tensors(came), list_tensors(samples), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert came["channels last"].stride() == samples["channels last"].stride()  # a convolution rounds otherwise on another layout
    for one in list_tensors(came):
        one.zero_()  # they may be written to


def test_small_tensors_of_any_type_take_no_open_files():
    kinds = [torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.complex128]
    tensors = [tensor.to(kind) for kind in kinds for tensor in (torch.arange(6.0).view(2, 3), torch.tensor(7.0), torch.zeros(0, 2))]
    tensors += [tensors[-3].conj(), (tensors[-2] * 1j).conj().imag]
    gc.collect()  # what other tests have left
    before = len(os.listdir("/proc/self/fd"))
    content = ForkingPickler.dumps(Batch(0, torch.arange(1), ((MicroBatch(range(1), tensors),),)))
    assert len(os.listdir("/proc/self/fd")) == before
    for one, other in zip(pickle.loads(content).micro_batches[0].samples, tensors, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one.to(torch.complex128), other.to(torch.complex128))


@dataclass(slots=True)
class Slots:
    """A batch of a task's own, without a __dict__."""

    image: torch.Tensor
    others: list


class Node:
    """One of a graph, in which each knows its neighbours."""

    def __init__(self):
        self.value, self.others = torch.ones(1), []


def test_the_tensors_of_a_batch_are_found_whatever_it_is():
    image = torch.ones(2)
    found = list_tensors(Slots(image, [{"a": Pair(image, torch.tensor(7))}, "name", 3, None, np.ones(2), torch]))
    assert [tensor.numel() for tensor in found] == [2, 2, 1]
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert [tensor.numel() for tensor in list_tensors([torch.eye(3).to_sparse(), nested])] == [6, 3, 2, 3]
    nodes = [Node() for _ in range(200)]
    for node in nodes:
        node.others = nodes
    assert len(list_tensors(nodes)) == 200


@dataclass
class Pairing:
    """A sample of a task's own, of which one part is no part of the data."""

    text: str
    image: torch.Tensor
    uses: int = field(default=0, compare=False)


class Colour(Enum):
    RED = frozenset("xyz")
    BLUE = object()  # which is written otherwise in each process


def test_what_is_in_samples_is_in_their_digest_whatever_holds_it():
    samples = [
        Pairing("a", torch.ones(2)),
        Pairing("b", torch.ones(2)),
        Image.new("L", (2, 2), 1),
        Image.new("L", (2, 2), 2),
        *(datetime(2026, 1, day) for day in (1, 2)),
        *Colour,
        {"x", "y", "z"},
        {"x", "y"},
        bytearray(b"a"),
        bytearray(b"b"),
    ]
    digests = [digest([sample]) for sample in samples]
    assert len({*digests}) == len(samples)
    assert digest([Pairing("a", torch.ones(2), uses=3)]) == digests[0]
    assert digest([{*"zyx"}]) == digests[8]
    assert digest([Path("/a/1.png")]) == digest([Path("/b/1.png")])
    one = [1]
    assert digest([one, one]) == digest([one, [1]])  # in one process a cache may hand out the same list


def test_a_picture_has_the_same_digest_before_and_after_it_is_loaded(tmp_path):
    Image.new("L", (2, 2), 1).save(tmp_path / "one.png")
    picture = Image.open(tmp_path / "one.png")
    assert digest([picture]) == digest([picture])


def test_samples_that_are_parts_of_themselves_are_looked_at_in_time():
    parent = {"value": 1, "children": []}
    parent["children"] += [{"value": number, "parent": parent} for number in range(3)]
    nodes = [{"value": torch.ones(1)} for _ in range(30)]
    for node in nodes:
        node["others"] = [*nodes]
    assert digest([parent])
    assert digest([nodes])


def test_a_normal_number_that_was_kept_is_not_drawn_by_the_next_sample():
    class Normal(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return random.gauss(0, 1) if index % 2 else float(np.random.normal())

    config = make_config({"task": TASK, "batch_size": 12})
    found = set()
    for number, left in enumerate((0, 1, 2)):
        random.seed(number)
        np.random.seed(number)
        for _ in range(left):  # each keeps a second one
            random.gauss(0, 1)
            np.random.normal()
        kept = keep_split(Normal(), config, "training", torch.device("cpu"))
        found.add(tuple(float(read(kept, Batch.of([index], [index]))[0].samples) for index in range(4)))
    assert len(found) == 1


def test_what_cannot_go_to_a_gpu_is_known():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2)])
    fine = {"a": [torch.ones(1), Pair(torch.ones(1), torch.ones(1))], "names": ["b"], "packed": packed, "array": np.ones(1)}
    assert find_immovable(fine) == ""
    assert find_immovable([fine, Slots(torch.ones(1), [])]) == "Slots"


def test_samples_that_collate_refuses_are_named(monkeypatch):
    config, data = load_data(make_config({"task": str(Path(__file__).with_name("ragged_task.py")), "batch_size": 12}))
    monkeypatch.setattr(type(config.task), "collate", lambda self, samples: 1 / 0 if len(samples) < 5 else samples)
    [batch] = itertools.islice(StepSampler(data.train, config.model_copy(update={"micro_batch": 5}), 0, 1, 3), 1)
    numbers = ", ".join(map(str, batch.indices[10:].tolist()))
    with pytest.raises(UserError, match=f"samples {numbers} of the training data cannot be made a batch: .*ZeroDivisionError"):
        read(keep_split(data.train, config, "training", torch.device("cpu")), batch)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ("lambda: samples", r"cannot be sent by a worker: .*lambda"),
        (
            "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 99)) or [torch.ones(2, 3).T for _ in range(99)]",
            r"cannot be sent by a worker: .*Too many open files.* \(ulimit -n\)",
        ),
    ],
    ids=["a lambda", "too many files"],
)
def test_a_batch_that_cannot_be_sent_is_named(tmp_path, batch, words):
    file = tmp_path / "odd_task.py"
    file.write_text(
        "import resource\n\nimport torch\n\nfrom mnist_dist.source import find_task\n\n"
        f"Noisy = find_task({TASK!r})\n\n\nclass Odd(Noisy):\n"
        f"    def collate(self, samples):\n        return {batch}\n"
    )
    config = make_config({"task": str(file), "workers": 1, "batch_size": 12})
    with (
        join_group(World(), config) as group,
        pytest.raises(RunError, match="a batch of the training data " + words),
        Reader(config.task.load().train, config, group, "training", [Batch.of(range(12), range(12))]) as reader,
    ):
        next(iter(reader))


def test_of_an_error_in_the_thread_that_pins_memory_the_first_line_is_its_own():
    try:
        try:
            {}["key"]
        except KeyError as error:
            raise MemoryError("out of memory\nmore") from error
    except MemoryError:
        wrapper = torch._utils.ExceptionWrapper(where="in pin memory thread for device 0")
    with pytest.raises(MemoryError) as caught:
        wrapper.reraise()
    assert first_line(caught.value) == "out of memory"


def test_a_batch_for_a_gpu_keeps_its_places(monkeypatch):
    monkeypatch.setattr(batches, "pin_memory", lambda samples: f"pinned {samples}")
    batch = Batch(3, torch.arange(2), ((MicroBatch(range(0, 2, 2), "a"),), (MicroBatch(range(2, 4, 2), "b"),)))
    pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert pinned.parts == ((MicroBatch(range(0, 2, 2), "pinned a"),), (MicroBatch(range(2, 4, 2), "pinned b"),))
    assert pinned.step == 3


class Halved(TensorDataset):
    """In memory, but what is read is not what lies there."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0] / 2, 1


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({}, "each forward pass changes average.weight"),
        ({"made": "packed"}, "each forward pass changes average.weight"),
        ({"made": "a bag"}, "each forward pass changes average.weight"),
        ({"masked": 0.2}, "collate draws random numbers"),
        ({"blind": True}, "in the losses the samples of a batch see each other"),
    ],
)
def test_what_collate_does_may_make_a_step_depend_on_the_world(option, reason):
    config, data = load_data(make_config({"task": str(Path(__file__).with_name("ragged_task.py")), **option}))
    assert find_tier(config.task, build_model(config.task, 0), SampleProbe(data.train, config)).reason == reason


class Drawing(Dataset):
    """Samples of which few draw from a generator: from one that only this data set knows, from one that it seeds anew, or from Python's."""

    def __init__(self, whose):
        own = np.random.default_rng(0)
        self.draw = {
            "its own": lambda _: own.random(),
            "seeded anew": lambda index: torch.rand((), generator=torch.Generator().manual_seed(index)).item(),
            "Python's": lambda _: random.random(),
        }[whose]

    def __len__(self):
        return 600

    def __getitem__(self, index):
        return torch.ones(3) * (self.draw(index) if index % 13 == 12 else 1)


@pytest.mark.parametrize("whose", ["its own", "seeded anew", "Python's"])
def test_a_data_set_that_seldom_draws_from_a_generator_of_its_own_is_found(whose):
    split = take_samples(Drawing(whose), range(500))
    flaw = describe_flaw(SampleProbe(split, make_config({"batch_size": 64})))
    numbers = re.findall(r"\d+", flaw.partition(" of the training data differs when it is read again")[0])
    assert any(int(number) % 13 == 12 for number in numbers) is (whose == "its own") is bool(flaw)


def test_workers_do_not_share_the_place_in_a_file_that_is_open(tmp_path):
    size, file = 1 << 12, tmp_path / "records"
    numbers = torch.arange(500).repeat_interleave(size // 8)
    file.write_bytes(numbers.numpy().tobytes())

    class Records(Dataset):
        def __init__(self):
            self.file = file.open("rb", buffering=0)

        def __len__(self):
            return 500

        def __getitem__(self, index):
            self.file.seek(index * size)
            time.sleep(0.001)  # in which other workers come to the same point
            return torch.tensor(int.from_bytes(self.file.read(8), "little"))

    config, records = make_config({"batch_size": 20, "workers": 4}), Records()
    with join_group(World(), config) as group:
        batches = [Batch.of(torch.arange(start, start + 20), range(20)) for start in range(0, 500, 20)]
        with warnings.catch_warnings(action="error"), Reader(records, config, group, "training", batches) as reader:
            found = torch.cat([batch.micro_batches[0].samples for batch in reader])
    assert found.tolist() == list(range(500))
    # This process reads on from where it was.
    assert records.file.tell() == 0


def test_a_tensor_data_set_with_a_reading_of_its_own_is_read_by_it():
    split, config = Halved(torch.arange(8.0)), configure()
    for kept in (
        keep_split(split, config, "test", torch.device("cpu")),
        keep_split(take_samples(split, range(6)), config, "test", torch.device("cpu")),
    ):
        [micro_batch] = read(kept, Batch.of([2, 3], range(2)))
        assert micro_batch.samples[0].tolist() == [1.0, 1.5]


class Fewer(TensorDataset):
    """In memory, but not all of it is to be seen."""

    def __len__(self):
        return 5


def test_a_tensor_data_set_with_a_length_of_its_own_has_that_length():
    split, config = Fewer(torch.arange(8.0)), configure()
    assert len(keep_split(split, config, "test", torch.device("cpu"))) == 5
    assert [len(rows) for [rows] in read_on(split, config, torch.device("cpu"))] == [5]
