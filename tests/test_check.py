"""The program that looks whether a task keeps its promises: each fault is planted, and named."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_dist.check import CHECKS, main
from mnist_dist.source import find_task, is_named_before
from mnist_dist.witness import digest

SANE = """
import functools
import os
import random
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from mnist_dist.task import Data, Tally, Task


class Sane(Task):
    hidden: int = 8

    def load(self):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(96, 6, generator=generator)
        targets = inputs.sum(dim=1, keepdim=True)
        return Data(TensorDataset(inputs[:64], targets[:64]), TensorDataset(inputs[64:], targets[64:]))

    def build_model(self):
        return nn.Sequential(nn.Linear(6, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1))

    def losses(self, model, batch, drawn):
        inputs, targets = batch
        return ((model(inputs) - targets) ** 2).squeeze(1)

    def tally(self, model, batch):
        losses = self.losses(model, batch, None).double()
        return Tally(torch.stack([losses.new_tensor(len(losses)), losses.sum()]))

    def measure(self, sums):
        count, loss = sums.tolist()
        return {"loss": loss / count}


class Lazy(Dataset):
    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 64

    def __getitem__(self, index):
        inputs = torch.full((6,), index / 64) + torch.rand(6) + random.random() + np.random.rand()
        return inputs.float(), inputs.float().sum(dim=0, keepdim=True)
"""


def write(tmp_path, fault=""):
    """A file with the sane task, or one that has a fault: the body of a class, or more."""
    file = tmp_path / f"{tmp_path.name}.py"
    if fault and "class Faulty" not in fault:
        fault = "class Faulty(Sane):\n" + fault
    file.write_text(f"{SANE}\n\n{fault}\n")
    return file


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Check a task with a fault; the exit status, the answers by their names, and standard error."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def call(only, fault="", *more):
        file = write(tmp_path, fault)
        status = main(["--task", str(file), "--batch_size", "16", "--only", only, "--json", *more])
        out, err = capsys.readouterr()
        return status, {answer["check"]: answer for answer in json.loads(out or "[]")}, err

    return call


def test_a_sane_task_passes_all_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    file = write(tmp_path)
    assert main(["--task", str(file), "--batch_size", "16", "--hidden", "12"]) == 0
    out, err = capfd.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == [f"PASS {name}" for name in CHECKS]
    assert "any world" in out
    assert "97 parameters" in out
    assert "32 samples, 2 sums" in out
    assert err == ""
    assert is_named_before(find_task(str(file)).name)
    assert not list((tmp_path / "temporary").glob("mnist_dist*"))


SHUFFLED = """
    def build_model(self):
        model = super().build_model()
        for part in np.random.default_rng(os.getpid()).permutation(9):
            model.register_parameter(f"part{part}", nn.Parameter(torch.zeros(1)))
        return model
"""
# The check, what its message must hold, and the fault.
FAULTS = {
    "a mean": (
        "losses",
        ["shape [] for 4 samples"],
        """
    def losses(self, model, batch, drawn):
        return super().losses(model, batch, drawn).mean()
""",
    ),
    "one sample loses its dimension": (
        "losses",
        ["shape [] for 1 samples"],
        """
    def losses(self, model, batch, drawn):
        return ((model(batch[0]) - batch[1]) ** 2).squeeze()
""",
    ),
    "not finite": (
        "losses",
        ["expected finite numbers"],
        """
    def losses(self, model, batch, drawn):
        return super().losses(model, batch, drawn) / 0
""",
    ),
    "sorted losses": (
        "losses",
        ["do not move with the samples"],
        """
    def losses(self, model, batch, drawn):
        return super().losses(model, batch, drawn).sort().values
""",
    ),
    "a mean over the batch in the losses": (
        "rows",
        ["in the losses the samples of a batch see each other"],
        """
    def losses(self, model, batch, drawn):
        losses = super().losses(model, batch, drawn)
        return losses - 0.5 * losses.mean()
""",
    ),
    "a loss that sees the samples of one kind alone": (
        "rows",
        ["in the losses the samples of a batch see each other"],
        """
    def losses(self, model, batch, drawn):
        alike = batch[0][:, :1].mul(3).round()
        return super().losses(model, batch, drawn) * (alike == alike.T).sum(0)
""",
    ),
    "a layer that mixes rows beside dropout": (
        "rows",
        ["in 1 (Mixing) the samples of a batch see each other"],
        """
    def build_model(self):
        return nn.Sequential(nn.Linear(6, 8), Mixing(), nn.Dropout(0.5), nn.Linear(8, 1))


class Mixing(nn.Module):
    def forward(self, values):
        return values - values.mean(dim=0)
""",
    ),
    "a mean over the batch beside random numbers of a kind that nobody knows": (
        "rows",
        ["in the losses the samples of a batch see each other"],
        """
    def losses(self, model, batch, drawn):
        losses = super().losses(model, batch, drawn)
        return losses * torch.rand(len(losses)) - losses.mean()
""",
    ),
    "a generator of its own": (
        "repeat",
        ["1 (Noise) differs between two passes"],
        """
    def build_model(self):
        return nn.Sequential(nn.Linear(6, 8), Noise(), nn.Linear(8, 1))


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, values):
        return values + torch.rand(values.shape, generator=self.generator)
""",
    ),
    "a gradient by a generator of its own": (
        "repeat",
        ["the gradient of 2.weight differs between two passes"],
        """
    def build_model(self):
        model = super().build_model()
        generator = torch.Generator().manual_seed(1)
        model[2].weight.register_hook(lambda gradient: gradient + torch.rand(gradient.shape, generator=generator))
        return model
""",
    ),
    "a draw without its seed": (
        "repeat",
        ["draw gives other numbers"],
        """
    def draw(self, seed, step, size):
        return torch.rand(size)
""",
    ),
    "an unused parameter": (
        "gradients",
        ["on rank 0 of 2 in step 1", "spare gets no gradient"],
        """
    def build_model(self):
        model = super().build_model()
        model.register_parameter("spare", nn.Parameter(torch.zeros(3)))
        return model

    def losses(self, model, batch, drawn):
        inputs, targets = batch
        return ((model[2](model[1](model[0](inputs))) - targets) ** 2).squeeze(1)
""",
    ),
    "a parameter that some batches leave out": (
        "gradients",
        ["1.weight, 1.bias get no gradient"],
        """
    def build_model(self):
        return nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])

    def losses(self, model, batch, drawn):
        inputs, targets = batch
        outputs = model[0](inputs)
        if inputs[:, 0].min() < -1.8:
            outputs = outputs + model[1](inputs)
        return ((outputs - targets) ** 2).squeeze(1)
""",
    ),
    "a generator of its own in build_model": (
        "model",
        ["the initial 0.weight (and 1 more) differs when it is built again", "the generators of torch, numpy and random"],
        """
    def build_model(self):
        model = super().build_model()
        nn.init.constant_(model[0].weight, np.random.default_rng().random())
        model[2].weight.data += np.random.default_rng().random()
        return model
""",
    ),
    "the order of its parts in build_model": ("model", ["another one in another process", "another order (", "sort it"], SHUFFLED),
    "the order of its parts in a step": ("state", ["another one in another process", "another order (", "sort it"], SHUFFLED),
    "the process in build_model": (
        "model",
        ["the initial 2.bias differs in another process"],
        """
    def build_model(self):
        model = super().build_model()
        nn.init.constant_(model[2].bias, os.getpid())
        return model
""",
    ),
    "an item that depends on how often it was read": (
        "data",
        ["45 of the training data differs when it is read again"],
        """
    def load(self):
        return Data(Counting(), Lazy())


class Counting(Lazy):
    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)[0] + (self.reads if index == 45 else 0), torch.zeros(1)
""",
    ),
    "a random split": (
        "data",
        ["of the training data (and ", "differs when the data are loaded again", "fixed seed"],
        """
    def load(self):
        data = super().load()
        order = np.random.default_rng().permutation(64)
        return Data(TensorDataset(*(tensor[order] for tensor in data.train.tensors)), data.test)
""",
    ),
    "one sample of another process": (
        "data",
        ["sample 27 of the test data differs in another process"],
        """
    def load(self):
        return Data(Lazy(), Own())


class Own(Lazy):
    def __getitem__(self, index):
        inputs, targets = super().__getitem__(index)
        return (inputs + os.getpid() if index == 27 else inputs), targets
""",
    ),
    "a counter as an attribute": (
        "state",
        ["the loss differs", "the attribute calls of the model (Counted) changes", "register_buffer"],
        """
    def build_model(self):
        return Counted(super().build_model())


class Counted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, inputs):
        self.calls += 1
        return self.inner(inputs) * self.calls
""",
    ),
    "a buffer that is not saved": (
        "state",
        ["the loss differs", "the buffer seen of 1 (Averaging) changes"],
        """
    def build_model(self):
        return nn.Sequential(nn.Linear(6, 8), Averaging(), nn.Linear(8, 1))


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(8), persistent=False)

    def forward(self, values):
        self.seen += values.detach().abs().mean(dim=0)
        return values * self.seen
""",
    ),
    "a vocabulary that load leaves in the module": (
        "model",
        ["the shape of 0.weight (and 2 more) differs before load is called", "options and facts (find_facts)"],
        """
    def load(self):
        VOCABULARY.extend(range(8))
        return super().load()

    def build_model(self):
        return nn.Sequential(nn.Linear(6, len(VOCABULARY) or 1), nn.Linear(len(VOCABULARY) or 1, 1))


VOCABULARY = []
""",
    ),
    "a vocabulary that only load makes": (
        "model",
        ["no model can be built before load is called", "options and facts (find_facts)", "in build_model", "KeyError"],
        """
    def load(self):
        VOCABULARY["size"] = 8
        return super().load()

    def build_model(self):
        return nn.Sequential(nn.Linear(6, VOCABULARY["size"]), nn.Linear(VOCABULARY["size"], 1))


VOCABULARY = {}
""",
    ),
    "random samples that are cached": (
        "data",
        ["is drawn at random when it is first read, and kept"],
        """
    def load(self):
        return Data(Cached(), Lazy())


class Cached(Lazy):
    @functools.lru_cache(None)
    def __getitem__(self, index):
        return super().__getitem__(index)
""",
    ),
    "the rank in the losses": (
        "two processes",
        ["the loss of step 1 is", "in one process", "in two"],
        """
    def losses(self, model, batch, drawn):
        return super().losses(model, batch, drawn) * (1 + int(os.environ.get("RANK", "0")))
""",
    ),
    "the rank in the gradients": (
        "two processes",
        [" in one process and ", " in two: a loss must be the same"],
        """
    def build_model(self):
        model = super().build_model()
        model[2].weight.register_hook(lambda gradient: gradient * (1 + 0.2 * int(os.environ.get("RANK", "0"))))
        return model
""",
    ),
    "the process in the losses of a task with dropout": (
        "two processes",
        ["the loss of step 1", "differs between two runs of two processes"],
        """
    def build_model(self):
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def losses(self, model, batch, drawn):
        return super().losses(model, batch, drawn) + (os.getpid() % 1009) / 1009
""",
    ),
    "a tally that counts twice": (
        "evaluation",
        ["the tally of one sample counts 2"],
        """
    def tally(self, model, batch):
        return Tally(2 * super().tally(model, batch).sums)
""",
    ),
    "a tally of means": (
        "evaluation",
        ["sum 1 of tally is", "in one process", "in two"],
        """
    def tally(self, model, batch):
        sums = super().tally(model, batch).sums
        return Tally(torch.stack([sums[0], sums[1] / sums[0]]))
""",
    ),
    "a mean of means that begins as a constant": (
        "evaluation",
        ["sum 2 of tally is", "for 12 samples at once", "for 4 at a time, with weights that were moved"],
        """
    def build_model(self):
        model = super().build_model()
        nn.init.zeros_(model[2].weight)
        return model

    def tally(self, model, batch):
        found, meant = model(batch[0]) > 0, batch[1] > 0
        precision = (found & meant).sum() / found.sum().clamp(min=1)
        return Tally(torch.cat([super().tally(model, batch).sums, (precision * len(found)).double().reshape(1)]))

    def measure(self, sums):
        return super().measure(sums[:2]) | {"precision": float(sums[2] / sums[0])}
""",
    ),
    "a ratio of what is always there at first": (
        "evaluation",
        ["failed in measure, with weights that were moved", "ZeroDivisionError"],
        """
    def build_model(self):
        model = super().build_model()
        nn.init.zeros_(model[2].weight)
        nn.init.ones_(model[2].bias)
        return model

    def tally(self, model, batch):
        found, meant = model(batch[0]) > 0, batch[1] > 0
        return Tally(torch.cat([super().tally(model, batch).sums, torch.stack([(found & meant).sum(), found.sum()]).double()]))

    def measure(self, sums):
        *_, right, found = sums.tolist()
        return super().measure(sums[:2]) | {"precision": right / found}
""",
    ),
    "a tally that leaves samples out": (
        "evaluation",
        ["the first of tally's sums counted 10 samples in all, and 32 were evaluated"],
        """
    def tally(self, model, batch):
        return super().tally(model, [part[:10] for part in batch])
""",
    ),
    "items that are changed as they are read": (
        "losses",
        ["sample 0 or 1 of the training data differs when it is read again", "clone it first"],
        """
    def load(self):
        return Data(Changing(), Lazy())


class Changing(Lazy):
    stored = torch.ones(64, 6)

    def __getitem__(self, index):
        inputs = self.stored[index]
        inputs[torch.rand(6) < 0.3] *= 0.5
        return inputs, torch.zeros(1)
""",
    ),
    "steps that are counted outside of the model": (
        "resume",
        ["after 5 steps where the run was killed at step 3 and resumed from 2", "the loss of step 3"],
        """
    def losses(self, model, batch, drawn):
        COUNTED.append(1)
        return super().losses(model, batch, drawn) * max(6, len(COUNTED))  # at its start, a run looks at fewer


COUNTED = []
""",
    ),
    "a rank that never comes": (
        "two processes",
        ["a run of 2 processes gave no answer within 6 s"],
        """
    def losses(self, model, batch, drawn):
        if os.environ.get("RANK") == "1":
            time.sleep(1000)
        return super().losses(model, batch, drawn)
""",
    ),
}


SLOW_FAULTS = {"a rank that never comes"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_FAULTS else name for name in FAULTS])
def test_a_fault_is_named(check, name):
    only, words, fault = FAULTS[name]
    deadline = ["--deadline_s", "6"] if "never comes" in name else []
    status, answers, err = check(only, fault, *deadline)
    assert status == 1, (answers, err)
    assert list(answers) == [only]
    assert not answers[only]["passed"]
    for word in words:
        assert word in answers[only]["text"]


WORLDS = {
    "dropout": ("1 (Dropout) draws random numbers", "nn.Dropout(0.5)"),
    "batch normalization": ("in 1 (BatchNorm1d) the samples of a batch see each other", "nn.BatchNorm1d(8)"),
    "a moving average": ("each forward pass changes 1.average", "Average()"),
}
AVERAGE = """

class Average(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, inputs):
        centred = inputs - self.average
        if self.training:
            self.average.lerp_(inputs.detach().mean(0), 0.5)
        return centred
"""


@pytest.mark.parametrize("name", WORLDS)
def test_what_is_legitimate_makes_the_tier(check, name):
    reason, layer = WORLDS[name]
    body = f"    def build_model(self):\n        return nn.Sequential(nn.Linear(6, 8), {layer}, nn.Linear(8, 1))\n{AVERAGE}"
    # One of them also makes its runs.
    runs = ",two processes,resume,evaluation" if name == "batch normalization" else ""
    status, answers, err = check(f"losses,rows,tier,repeat,gradients,state{runs}", body)
    assert status == 0, (answers, err)
    assert answers["tier"]["tier"] == "this world"
    assert reason in answers["tier"]["text"]
    if runs:
        assert "this world: 1 (BatchNorm1d) sees the whole batch" in answers["rows"]["text"]
        assert "same bits in two runs" in answers["two processes"]["text"]
        assert "on 2 processes" in answers["resume"]["text"]


def test_a_digest_is_of_all_that_an_object_holds():
    @dataclass
    class Open:
        x: Any

    @dataclass(slots=True)
    class Slotted:
        x: Any

    zeros = torch.zeros(5000)  # more than torch prints
    one = zeros.clone()
    one[2500] = 9
    for kind in (Open, Slotted, lambda x: [x], lambda x: {"x": x}):
        assert digest(kind(zeros)) == digest(kind(zeros.clone())) != digest(kind(one))


def test_what_a_task_prints_is_beside_the_answer(check):
    body = """
    print("imported")

    @property
    def sizes(self):
        print("asked")
        return 64, 32

    def load(self):
        print("loaded")
        return super().load()
"""
    status, answers, err = check("losses,model", body)
    assert (status, [*answers]) == (0, ["losses", "model"])
    assert {"imported", "asked", "loaded"} <= set(err.splitlines())


def test_one_reason_is_told_once(check):
    status, answers, _ = check("losses,rows,tier", "    def losses(self, model, batch, drawn):\n        return model(batch[0]).mean()\n")
    assert status == 1
    assert answers["rows"]["text"] == "for the same reason as losses"


def test_the_tier_is_that_of_a_run_with_as_many_shards(check):
    _, answers, _ = check("tier", "", "--shards", "4")
    assert answers["tier"]["text"] == "any world: the same bits on 1 to 4 processes of as many threads, by 4 shards"


RAGGED = Path(__file__).with_name("ragged_task.py")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--unseen", "--dropout", "0.3"], "no sample sees another one"),
        (["--unseen", "--dropout", "0.3", "--made", "a bag"], "not compared: the forward pass, outside of its layers, draws other"),
        (["--masked", "0.2"], "not compared: collate draws other random numbers"),
        (["--made", "packed"], "no sample sees another one"),
    ],
)
def test_samples_of_batches_of_any_kind_are_compared_where_they_can_be(capsys, options, found):
    assert main(["--task", str(RAGGED), "--batch_size", "16", "--only", "losses,rows", *options]) == 0
    assert f"PASS rows: {found}" in capsys.readouterr().out


def test_an_evaluation_that_draws_is_compared_with_shards_alone(capsys):
    for more, found in (
        ([], "not compared: tally (is there a dropout"),
        (["--shards", "4"], "31 samples, 2 sums and the measures are the"),
    ):
        options = ["--unseen", "--dropout", "0.3", "--average_differs", *more]
        assert main(["--task", str(RAGGED), "--batch_size", "16", "--only", "evaluation", *options]) == 0
        assert f"PASS evaluation: {found}" in capsys.readouterr().out


def test_samples_that_are_read_one_by_one_under_their_seeds_and_tied_weights_pass(check):
    body = """
    def load(self):
        return Data(Lazy(), Lazy())

    def find_facts(self, train):
        return {"width": 6}

    def build_model(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(self.facts["width"], 1))
        model[1].weight = model[0].weight
        return model
"""
    status, answers, err = check("model,data,state,cost", body)
    assert status == 0, (answers, err)
    assert "17 digests" in answers["data"]["text"]
    assert answers["cost"]["parameters"] == 6 * 6 + 6 + 6 + 7
    assert answers["cost"]["signal_delay_s"] >= 30
    assert answers["cost"]["checkpoint_bytes"] > 4 * 3 * 55


def test_what_is_right_with_the_weights_of_a_training_passes(check):
    """Padding whose row is zero, a scale that must be positive, and a precision whose count comes from the data."""
    body = """
    def load(self):
        return Data(Sentences(64, 0), Sentences(32, 64))

    def collate(self, samples):
        words, targets = zip(*samples)
        return nn.utils.rnn.pad_sequence(words, batch_first=True), torch.stack(targets)

    def build_model(self):
        return Scaled()

    def losses(self, model, batch, drawn):
        mean, scale = model(batch[0])
        return -torch.distributions.Normal(mean, scale).log_prob(batch[1].squeeze(1))

    def tally(self, model, batch):
        positive = batch[1].squeeze(1) > 0
        right = (model(batch[0])[0] > 0) & positive
        return Tally(torch.cat([super().tally(model, batch).sums, torch.stack([right.sum(), positive.sum()]).double()]))

    def measure(self, sums):
        return super().measure(sums[:2]) | {"recall": float(sums[2]) / float(sums[3])}


class Sentences(Dataset):
    def __init__(self, count, first):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        place += self.first
        words = torch.randint(1, 9, (2 + place * 7 % 5,), generator=torch.Generator().manual_seed(place))
        return words, torch.tensor([float(place % 16 == 15)])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out, self.scale = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 1), nn.Parameter(torch.ones(1))

    def forward(self, words):
        return self.out(self.table(words).sum(1)).squeeze(1), self.scale
"""
    status, answers, err = check("losses,evaluation", body)
    assert status == 0, (answers, err)


def test_a_recipe_for_one_gpu_is_checked_as_any_other(capsys):
    assert main(["--config", "gpu", "--only", "losses,gradients"]) == 0
    assert capsys.readouterr().out.count("PASS") == 2


def test_with_shards_two_processes_must_have_the_bits_of_one(check):
    status, answers, err = check("two processes", "    pass\n", "--shards", "4")
    assert status == 0, (answers, err)
    assert answers["two processes"]["text"] == "the same bits as one: 5 steps with 4 shards"
    scaled = "super().losses(model, batch, drawn) * (1 + 1e-6 * int(os.environ.get('RANK', '0')))"
    status, answers, err = check("two processes", f"    def losses(self, model, batch, drawn):\n        return {scaled}\n", "--shards", "4")
    assert status == 1
    assert "differs between one process and two with shards" in answers["two processes"]["text"]


@pytest.mark.parametrize("options", [("--train_size", "3", "--batch_size", "2"), ("--epochs", "0.5", "--batch_size", "33")])
def test_a_run_of_fewer_steps_than_the_checks_make_passes(check, options):
    status, answers, err = check("repeat,gradients,state,cost", "    pass\n", *options)
    assert status == 0, (answers, err)


def test_the_built_in_task_passes(capsys):
    assert main(["--dataset", "synthetic", "--only", "losses,rows,tier,repeat"]) == 0
    assert "PASS tier: any world" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "absent/task.py"], "absent/task.py', which is not a file"),
        (["--only", "speed"], "only is 'speed', which is no check; allowed: losses, rows"),
        (["--skip", ",".join(CHECKS)], "which leaves no check to make; there are losses, "),
        (["--deadline_s", "soon"], "deadline_s is 'soon'; expected a number of seconds from 1 to 86400"),
        (["--batch_size", "none"], "batch_size is None"),
        (["--batch_size", "1", "--dataset", "synthetic", "--only", "resume"], "batch_size is 1, less than the 2 processes"),
        (["--rotations", "1"], "did you mean 'rotation'"),
    ],
)
def test_a_mistake_of_the_user_is_one_message(capsys, arguments, words):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.slow
def test_it_is_started_once_in_a_slurm_job_of_any_size(tmp_path):
    shell = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
    names = {"PROCID": "0", "LOCALID": "0", "STEP_NUM_TASKS": "4", "STEP_TASKS_PER_NODE": "4", "STEP_NODELIST": "n1"}
    task = shell | {f"SLURM_{name}": value for name, value in names.items()}
    command = [sys.executable, "-m", "mnist_dist.check", "--task", str(write(tmp_path)), "--batch_size", "16", "--only", "losses,model"]

    def start(variables):
        environ = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")} | variables
        return subprocess.run(command, env=environ, text=True, capture_output=True, timeout=120)

    assert start(shell).returncode == 0
    assert "; start it once: it starts others itself (in a Slurm job: srun --ntasks=1)\n" in start(task).stderr


def test_a_task_that_cannot_be_loaded_is_one_message(check):
    status, answers, err = check("model", "    def load(self):\n        raise OSError('no such disk')\n")
    assert (status, answers) == (2, {})
    assert "in load" in err
    assert "no such disk" in err


def test_a_task_with_a_fault_elsewhere_fails_only_where_it_must(check):
    """An unused parameter: several processes would refuse it, which is a failure of what starts them alone."""
    status, answers, _ = check("losses,tier,evaluation", FAULTS["an unused parameter"][2])
    assert status == 1
    assert {name: answer["passed"] for name, answer in answers.items()} == {"losses": True, "tier": True, "evaluation": False}
    assert "any world" in answers["tier"]["text"]
    assert "spare gets no gradient" in answers["evaluation"]["text"]


def test_a_parameter_that_is_seldom_reached_is_no_failure_with_shards(check):
    status, answers, err = check("gradients", FAULTS["a parameter that some batches leave out"][2], "--shards", "2")
    assert status == 0, (answers, err)
    assert re.search(r"1\.bias did not always get one, in \d+ batches of \d+, which is zero in a shard", answers["gradients"]["text"])


def test_a_task_whose_tier_cannot_be_found_out_does_not_pass_for_one(check):
    status, answers, _ = check("tier", FAULTS["a draw without its seed"][2])
    assert status == 1
    assert not answers["tier"]["passed"]


def test_the_threads_of_this_process_are_given_back(check):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check("losses,cost")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_ended_by_a_signal_it_leaves_no_process_and_no_folder(tmp_path):
    file = write(tmp_path, FAULTS["a rank that never comes"][2])
    environ = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "mnist_dist.check", "--task", str(file), "--batch_size", "16", "--only", "tier,two_processes"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline().startswith("PASS tier")
        end = time.monotonic() + 100
        while not (marks := list(tmp_path.glob("mnist_dist_check_*/one/left*"))):
            assert time.monotonic() < end
            time.sleep(0.05)
        program.terminate()
        assert program.wait(100) == 143  # before its own deadline, which it would answer with 1, also beside a test of 64 ranks
        assert program.stderr.read() == ""
    assert not list(tmp_path.glob("mnist_dist_check_*"))
    folder = str(marks[0].parents[1]).encode()
    held = [
        path for path in Path("/proc").glob("[0-9]*/fd/1") if os.path.lexists(path) and os.fsencode(os.readlink(path)).startswith(folder)
    ]
    assert not held


def test_an_option_that_the_check_sets_itself_is_refused(tmp_path, capsys):
    for name, value in (("device", "cuda"), ("wandb", "online"), ("run_dir", "runs/x")):
        assert main(["--task", str(write(tmp_path)), f"--{name}", value]) == 2
        assert f"{name} has no use here: check sets it itself; leave it out" in capsys.readouterr().err
