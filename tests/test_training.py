"""One training on any number of ranks: the same curve, the same counts, and no silent errors."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice

import pytest
import safetensors
import torch
from cluster import ROOT
from processes import TINY, Train, TrainTask, run_ranks
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from mnist_dist import batches, optimization
from mnist_dist.batches import StepSampler, list_batches
from mnist_dist.config import configure, make_config
from mnist_dist.data import load_data
from mnist_dist.distributed import join_group
from mnist_dist.errors import RunError
from mnist_dist.evaluation import evaluate, open_evaluation
from mnist_dist.model import build_model
from mnist_dist.muon import Muon
from mnist_dist.optimization import build_optimizer, describe_state, learning_rate_at
from mnist_dist.options import read_options_file
from mnist_dist.reader import InMemory, Reader
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.world import find_world


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # test_promises.py has shorter ones
@pytest.mark.parametrize(
    ("optimizer", "steps", "tolerance"),
    [("muon", 3, 1e-3), ("sgd", 40, 1e-4)],
)
def test_every_world_gives_the_same_curve_and_the_same_world_the_same_bits(tmp_path, optimizer, steps, tolerance):
    # A calm learning rate: as a network leaves its first plateau, rounding grows tenfold every few steps on any number of ranks, and
    # two threads differ from one as much. At 0.003 that begins within these steps, to 2e-4 on some machines; here it stays below 1e-6.
    # Muon lifts the smallest parts of a gradient, rounding among them, to the size of the others. So one ReLU that flips is enough: on a
    # processor with AMX weights differed by 1e-8 after two steps, by 1e-4 after three and by 1e-3 after ten. With half of each batch they
    # would differ by 6e-3 after three.
    recipe = f"--optimizer {optimizer} --momentum 0.9 --weight_decay 0.0005 --steps {steps} --learning_rate 0.001 --schedule constant"
    recipe = [
        *recipe.split(),
        "--threads",
        "1",
        "--precision",
        "fp32",
        "--log_every",
        "1",
        "--test_size",
        "500",
        "--report",
        "false",
        "--wandb",
        "disabled",
    ]
    rows, weights = {}, {}
    worlds = {"1": 1, "2": 2, "4": 4} | ({"2 again": 2} if optimizer == "sgd" else {})
    for name, world in worlds.items():
        run_ranks(tmp_path, Train([*recipe, "--run_dir", str(tmp_path / name)]), world)
        rows[name] = [
            {k: v for k, v in row.items() if k != "train/images_per_s" and not k.startswith("health/")}
            for row in read_rows(tmp_path / name)
        ]
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    if "2 again" in worlds:
        assert rows["2 again"] == rows["2"]
        assert all(torch.equal(value, weights["2 again"][name]) for name, value in weights["2"].items())
    for world in ("2", "4"):
        assert [row["step"] for row in rows[world]] == list(range(1, steps + 1))
        for one, other in zip(rows["1"], rows[world], strict=True):
            assert other["train/loss"] == pytest.approx(one["train/loss"], rel=tolerance)
            assert other["train/learning_rate"] == one["train/learning_rate"]
            # Jumps where a ReLU flips; a wrong average would be off by the number of processes.
            assert other["train/gradient_norm"] == pytest.approx(one["train/gradient_norm"], rel=0.05)
        difference = max(float((value - weights[world][name]).abs().max()) for name, value in weights["1"].items())
        assert difference < tolerance
    losses = [row["train/loss"] for row in rows["1"]]
    assert sum(losses[-(steps // 3) :]) < sum(losses[: steps // 3])  # it learns


def test_the_run_folder_holds_what_a_person_may_rely_on(tmp_path):
    folder = tmp_path / "run"
    run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder), "--log_every", "4"]), 2)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "model.safetensors",
        "checkpoints",
        "starts.jsonl",
        "ends.jsonl",
        "lock",
    }
    assert make_config(read_options_file(folder / "config.yaml")).batch_size == 6
    assert (folder / "config.yaml").read_text().startswith("task: mnist\n")
    [start] = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    noted = {name: start[name] for name in ("step", "world_size", "tier", "best", "parameters", "training_samples", "test_samples")}
    assert noted == {
        "step": 0,
        "world_size": 2,
        "tier": "any world",
        "best": "accuracy",
        "parameters": 593_200,
        "training_samples": 4_096,
        "test_samples": 1_024,
    }
    assert start["source"].startswith("__init__.py ")
    rows = read_rows(folder)
    assert [row["step"] for row in rows] == [4, 5, 8, 10]
    measured = {"train/loss", "train/learning_rate", "train/gradient_norm", "train/images_per_s"}
    health = {f"health/{name}" for name in ("step_s", "memory_gb", "slowest_rank", "slowest_to_median", "restarts")}
    assert set(rows[0]) == {"step", "epoch", *measured, *health}
    assert rows[0]["health/slowest_rank"] in (0, 1)
    assert rows[0]["health/slowest_to_median"] >= 1
    assert set(rows[1]) == {*rows[0], "test/loss", "test/accuracy", "test/class_accuracy"}
    result = json.loads((folder / "result.json").read_text())
    assert (result["step"], result["world_size"], result["test/images"]) == (10, 2, 30)
    assert result["test/accuracy"] == rows[-1]["test/accuracy"] == 1 - result["test/errors"] / 30
    assert sum(map(sum, result["test/confusion_matrix"])) == 30
    assert result["test/class_accuracy"] == rows[-1]["test/class_accuracy"]
    assert {"dataset", "mean", "std"} < {*result}
    assert result["elapsed_s"] > 0
    assert result["images_per_s"] > 0
    assert result["versions"]["torch"] == str(torch.__version__)
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mnist_dist"])["dataset"] == "synthetic"
        build_model(Mnist(), 1).load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


@dataclass(frozen=True)
class Evaluate:
    """Ranks that evaluate one model on some sizes of a split."""

    sizes: tuple[int, ...]

    def __call__(self):
        batches._EVALUATED_AT_ONCE = 50
        config, loaded = load_data(configure(dataset="synthetic", precision="fp32", threads=1))
        with join_group(find_world(os.environ), config) as group:
            model = group.accelerator.prepare(build_model(config.task, 3))
            for size in self.sizes:
                with open_evaluation(TensorDataset(*loaded.test[:size]), config, group) as reader:
                    evaluation = evaluate(config, model, reader, group)
                if group.is_main:
                    print(json.dumps([evaluation.measures["confusion_matrix"], round(evaluation.measures["loss"], 5)]))


@pytest.mark.slow
def test_the_evaluation_counts_every_image_once_in_every_world(tmp_path):
    sizes = (1, 3, 49, 50, 51)  # one below, at and above the batch
    lines = {world: run_ranks(tmp_path, Evaluate(sizes), world).strip().splitlines() for world in (1, 2, 3, 4)}
    assert lines[1] == lines[2] == lines[3] == lines[4]
    _, labels = load_data(configure(dataset="synthetic"))[1].test.tensors
    for size, line in zip(sizes, lines[1], strict=True):
        assert [sum(row) for row in json.loads(line)[0]] == labels[:size].bincount(minlength=10).tolist()


def test_an_evaluation_takes_about_as_many_at_once_as_the_training():
    for options in ({"batch_size": 4}, {"batch_size": 16, "micro_batch": 8}):
        parts = [share.indices for share in list_batches(41, 2, range(1, 2), configure(**options))]
        assert [len(part) for part in parts] == [8, 8, 4]
        assert torch.cat(parts).tolist() == list(range(1, 41, 2))
    assert [len(batch.indices) for batch in list_batches(2000, 1, range(1), configure(batch_size=2000))] == [500] * 4


def test_an_evaluation_that_counts_another_number_is_an_error():
    config, loaded = load_data(configure(dataset="synthetic", test_size=40, precision="fp32"))
    with join_group(find_world({}), config) as group:
        # The planted fault: half of the images belong to a rank that is not there.
        shares = list_batches(40, 2, range(1), config)
        reader = Reader(loaded.test, config, group, "test", shares)
        with reader, pytest.raises(RunError, match="read 20 images, but the split has 40: its ranks do not share it correctly"):
            evaluate(config, build_model(config.task, 0), reader, group)


def test_what_an_evaluation_says_of_its_matrix():
    confusion = torch.zeros(10, 10, dtype=torch.float64)
    confusion[:2, :2] = torch.tensor([[8, 2], [1, 9]])
    measures = Mnist().measure(torch.cat([torch.tensor([20, 10.0]), confusion.flatten()]))
    assert (measures["images"], measures["errors"], measures["accuracy"], measures["loss"]) == (20, 3, 0.85, 0.5)
    assert measures["class_accuracy"] == [0.8, 0.9, *[None] * 8]
    assert measures["confusion_matrix"] == confusion.int().tolist()


@dataclass(frozen=True)
class ShardTwice(Train):
    """The planted fault: what `accelerator.prepare` does to a loader that is already this rank's share. It deals out its batches."""

    def __call__(self):
        rank, size, sample = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), StepSampler.__iter__
        StepSampler.__iter__ = lambda self: islice(sample(self), rank, None, size)
        return super().__call__()


def test_a_loader_that_is_sharded_twice_is_caught(tmp_path):
    with pytest.raises(AssertionError, match="is it sharded twice"):
        run_ranks(tmp_path, ShardTwice([*TINY, "--run_dir", str(tmp_path / "run")]), 2)


@dataclass(frozen=True)
class TurnNaN(TrainTask):
    """The planted fault: the loss of one rank at one step is not a number."""

    rank: int
    step: int

    def make_task(self):
        rank, fault = self.rank, self.step - 1

        class NotANumber(Mnist):
            def draw(self, seed, step, size):
                transforms = super().draw(seed, step, size).clone()
                if step == fault:
                    transforms[rank] = float("nan")
                return transforms

        return NotANumber


MANY = ["--train_size", "80", "--batch_size", "80"]  # of which 64 are tried at the start


def test_a_nan_stops_every_rank_and_is_named_with_its_step_and_rank(tmp_path):
    folder = tmp_path / "run"
    arguments = [*TINY, "--run_dir", str(folder), "--log_every", "4", "--checkpoint_every", "6"]
    text = run_ranks(tmp_path, TurnNaN(arguments, rank=1, step=7), 2, expect=1)
    assert text.count("the loss is nan at step 7 on rank 1; the run stops here") == 2
    first = run_ranks(tmp_path, TurnNaN([*TINY, *MANY, "--run_dir", str(tmp_path / "first")], rank=70, step=1), expect=1)
    assert "the loss is nan at step 1 on rank 0; no step was made before, so it is a sample's" in first
    assert not (folder / "result.json").exists()
    assert [row["step"] for row in read_rows(folder)] == [4, 5]
    assert [int(path.name[5:13]) for path in (folder / "checkpoints").iterdir()] == [6]
    # The last good checkpoint is good: without the fault the same command ends well.
    run_ranks(tmp_path, Train(arguments), 2)


def test_more_threads_than_cores_are_warned_of(tmp_path):
    many = ["--threads", str(4 * (os.cpu_count() or 1)), "--steps", "1", "--run_dir", str(tmp_path / "run")]
    text = run_ranks(tmp_path, Train([*TINY, *many]), 2)
    assert text.count("they wait for each other") == 1
    assert f"threads is {many[1]}, and this process may use" in text


def test_the_learning_rate_is_a_function_of_the_step():
    config = configure(steps=100, learning_rate=0.5, warmup=0.2)
    rates = [learning_rate_at(config, step) for step in range(100)]
    assert max(rates) == pytest.approx(0.5, rel=0.01)
    assert rates.index(max(rates)) in (19, 20)
    assert 0 < rates[-1] < rates[0] < 0.02
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert {learning_rate_at(config.replace(schedule="constant"), step) for step in range(100)} == {0.5}
    linear = [learning_rate_at(config.replace(schedule="linear"), step) for step in range(100)]
    assert linear[:20] == rates[:20]
    assert linear[20:] == pytest.approx([0.5 * (79.5 - step) / 80 for step in range(80)])
    steps = [learning_rate_at(config.replace(schedule="step"), step) for step in range(100)]
    assert steps == pytest.approx([0.5] * 75 + [0.05] * 25)
    for warmup in (0.0, 1.0):
        for schedule in ("one_cycle", "linear"):
            changed = config.replace(warmup=warmup, schedule=schedule)
            assert all(0 < learning_rate_at(changed, step) <= 0.5 for step in range(100))


@pytest.mark.parametrize(
    "options", [{"optimizer": "muon"}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0}, {"optimizer": "adamw"}]
)
def test_what_an_optimizer_keeps_is_known_before_its_first_step(options):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 3), torch.nn.LayerNorm(3))
    model[0].bias.requires_grad_(requires_grad=False)
    config = configure(**options)
    built = build_optimizer(model.parameters(), config, "fp32")
    model(torch.ones(2, 1, 4, 4)).pow(2).sum().backward()
    built.step()
    state = built.state_dict()["state"]
    found = {f"{index}/{name}": [*value.shape] for index, slots in state.items() for name, value in slots.items() if value is not None}
    assert found == describe_state(model.parameters(), config)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_momentum_of_sgd_is_the_one_that_was_chosen(nesterov):
    weight = torch.nn.Parameter(torch.zeros(1))
    built = build_optimizer(
        [weight], configure(optimizer="sgd", momentum=0.5, nesterov=nesterov, weight_decay=0.0, learning_rate=1.0), "fp32"
    )
    weight.grad = torch.ones(1)
    built.step()
    assert weight.item() == (-1.5 if nesterov else -1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "name", "kind"), [("muon", "_MUON", Muon), ("sgd", "_SGD", torch.optim.SGD), ("adamw", "_ADAMW", torch.optim.AdamW)]
)
def test_every_optimizer_learns_what_it_does_with_torchs_compiler(monkeypatch, optimizer, name, kind):
    def follow(steps=5, saved=None):
        model = build_model(Mnist(), 0)
        built = build_optimizer(model.parameters(), configure(optimizer=optimizer, learning_rate=0.01), "fp32")
        if saved is not None:
            model.load_state_dict(saved[0])
            built.load_state_dict(saved[1])
        for _ in range(steps):
            loss = torch.nn.functional.cross_entropy(model(torch.zeros(4, 1, 28, 28)), torch.tensor([1, 1, 1, 1]))
            loss.backward()
            built.step()
            built.zero_grad()
            losses.append(loss.item())
        return copy.deepcopy((model.state_dict(), built.state_dict()))

    losses = []
    middle = follow(2)
    here = follow(3, middle)
    assert losses[-1] < losses[0]
    monkeypatch.setattr(optimization, name, kind)
    there = follow()
    assert losses[:5] == losses[5:]
    assert here[1]["param_groups"] == there[1]["param_groups"]
    assert all(torch.equal(value, there[0][key]) for key, value in here[0].items())
    for one, other in zip(here[1]["state"].values(), there[1]["state"].values(), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


# The compiler takes a third of a start, and torch's distributed tensors a tenth.
@pytest.mark.slow
def test_programs_on_one_process_do_not_import_torchs_compiler(tmp_path):
    (tmp_path / "programs.py").write_text(f"""if True:
        import sys
        from mnist_dist import evaluate, train

        ways = [["--optimizer", "muon"], ["--optimizer", "sgd"], ["--optimizer", "adamw"], ["--shards", "2"]]
        for number, way in enumerate(ways):
            folder = "{tmp_path}/run%d" % number
            assert train.main([*{TINY}, *way, "--checkpoint_every", "5", "--run_dir", folder]) == 0
        assert evaluate.main([folder]) == 0
        print({{"torch._dynamo", "torch.distributed.tensor", "sympy", "torchvision", "matplotlib", "wandb"}} & {{*sys.modules}})
    """)
    done = subprocess.run([sys.executable, tmp_path / "programs.py"], cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr


def test_training_twice_in_one_process_works_and_leaves_the_environment_alone(tmp_path):
    from mnist_dist.loop import train

    before = dict(os.environ)
    values = {
        "report": False,
        "wandb": "disabled",
        "dataset": "synthetic",
        "train_size": 24,
        "test_size": 10,
        "batch_size": 12,
        "threads": 1,
    }
    for precision in ("fp32", "bf16"):
        result = train(configure(**values, epochs=1, precision=precision, run_dir=str(tmp_path / precision)))
        assert result.values["precision"] == precision
    assert dict(os.environ) == before


def test_splits_are_kept_on_the_device():
    split = TensorDataset(torch.zeros(3, 28, 28, dtype=torch.uint8), torch.arange(3))
    kept = InMemory(split, torch.device("meta"))
    assert len(kept) == 3
    assert {tensor.device.type for tensor in kept.tensors} == {"meta"}
