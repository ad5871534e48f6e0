"""What a step does beside the built-in recipe: parts of a batch, clipped gradients, Accelerate's optimizer, checkpoints of large models."""

import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import TINY, Train, run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from mnist_dist import checkpoint, tier
from mnist_dist.batches import MicroBatch
from mnist_dist.checkpoint import Writer
from mnist_dist.config import make_config
from mnist_dist.data import SampleProbe, fingerprint, load_data
from mnist_dist.distributed import join_group
from mnist_dist.errors import UserError
from mnist_dist.model import build_model
from mnist_dist.randomness import read_generators
from mnist_dist.state import TrainingState
from mnist_dist.task import Data, Task
from mnist_dist.tasks.classification import Classification
from mnist_dist.witness import read_batch
from mnist_dist.world import World, find_world

CALM = ["--learning_rate", "0.001", "--schedule", "constant", "--momentum", "0"]  # rounding stays rounding


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_near(folder, other):
    for row, expected in zip(read_rows(folder), read_rows(other), strict=True):
        for name in ("train/loss", "train/gradient_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)
    weights = load_file(other / "model.safetensors")
    assert all(float((value - weights[name]).abs().max()) < 1e-6 for name, value in load_file(folder / "model.safetensors").items())


def test_parts_of_a_batch_and_clipping_make_the_same_steps_on_any_number_of_ranks(tmp_path):
    clipped = [*TINY, *CALM, "--clip_norm", "0.05"]
    run_ranks(tmp_path, Train([*TINY, *CALM, "--run_dir", str(tmp_path / "whole")]))
    run_ranks(tmp_path, Train([*clipped, "--run_dir", str(tmp_path / "clipped")]))
    # 12 samples in parts of 5, 5 and 2; then 6 on each rank, in parts of 4 and 2.
    run_ranks(tmp_path, Train([*TINY, *CALM, "--micro_batch", "5", "--run_dir", str(tmp_path / "parts")]))
    run_ranks(tmp_path, Train([*clipped, "--micro_batch", "4", "--run_dir", str(tmp_path / "parts on two")]), 2)
    assert_near(tmp_path / "parts", tmp_path / "whole")
    assert_near(tmp_path / "parts on two", tmp_path / "clipped")
    # The record has the norm before it was clipped; the weights have moved by no more than the clipped one allows.
    assert read_rows(tmp_path / "clipped")[0]["train/gradient_norm"] == read_rows(tmp_path / "whole")[0]["train/gradient_norm"] > 0.05
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "clipped"))
    assert any(not torch.equal(value, whole[name]) for name, value in cut.items())


def make_state(group, config):
    config, data = load_data(config)
    return TrainingState(config, data, group), data


@pytest.mark.slow
def test_the_loss_of_a_step_holds_no_gradients():
    for shards in (None, 2):
        options = {"dataset": "synthetic", "batch_size": 8, "micro_batch": 4, "shards": shards}
        config = make_config({**options, "device": "cpu", "precision": "fp32"})
        with join_group(World(), config) as group:
            state, data = make_state(group, config)
            micro_batches = read_batch(state.config, data, 3)
            loss = state.train_on([micro_batches] if shards is None else [[micro_batch] for micro_batch in micro_batches], lambda: None)
        assert loss.untyped_storage().nbytes() == 4


class Masked(nn.Module):
    """A layer that keeps a mask, and a table of them, from its first pass on, and counts its passes."""

    def __init__(self):
        super().__init__()
        self.layer, self.mask, self.masks, self.passes = nn.Linear(8, 2), None, {}, 0

    def forward(self, inputs):
        self.mask = torch.ones_like(inputs[0]) if self.mask is None else self.mask
        self.masks.setdefault(len(inputs), self.mask)
        self.new, self.passes = True, self.passes + 1
        return self.layer(inputs * self.mask)


class Masking(Classification):
    class_names = ("0", "1")

    def load(self):
        return Data(*[TensorDataset(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 2)] * 2)

    def build_model(self):
        return Masked()


def test_a_model_is_tried_without_a_trace():
    """What a pass on the CPU has kept would be of no use to one on a GPU."""
    config = make_config({"batch_size": 8, "device": "cpu", "precision": "fp32"}, task=Masking)
    with join_group(World(), config) as group:
        state, _ = make_state(group, config)
        model = state.bare_model
        assert (model.mask, model.masks, model.passes, hasattr(model, "new")) == (None, {}, 0, False)
        assert not state.tier.is_any_world  # for it counts


class Deep(Masking):
    """Of very many, very small layers."""

    def build_model(self):
        return nn.Sequential(nn.Linear(8, 2), *[nn.Linear(2, 2) for _ in range(100)])


def test_a_checkpoint_of_many_small_tensors_is_no_larger_than_is_read():
    config = make_config({"batch_size": 8, "device": "cpu", "precision": "fp32", "optimizer": "adamw"}, task=Deep)
    with join_group(World(), config) as group:
        state, data = make_state(group, config)
        before = len(checkpoint.encode(state.copy([])))
        state.train_on([read_batch(state.config, data, 1)], lambda: None)
        content = checkpoint.encode(state.copy([]))
        assert len(content) > 2 * before
        assert len(content) < 4 * state.count_bytes()


class Shuffling(Masking):
    """Data, facts and weights by the generators of numpy and random."""

    def load(self):
        order = np.random.permutation(40)
        return Data(*[TensorDataset(torch.tensor(order).float()[:, None], torch.randperm(40) % 2)] * 2)

    def find_facts(self, train):
        return {"number": random.random()}

    def build_model(self):
        model = nn.Linear(1, 2)
        model.weight.data.copy_(torch.tensor(np.random.rand(2, 1)))
        return model


def test_data_and_weights_are_drawn_alike_in_each_process():
    found = []
    for seed in (1, 2):
        np.random.seed(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        before = read_generators()
        config, data = load_data(make_config({"batch_size": 8, "device": "cpu"}, task=Shuffling))
        model = build_model(config.task, 5)
        assert read_generators() == before
        found.append((fingerprint(data.train, config.task), config.task.facts, model.weight.tolist()))
    assert found[0] == found[1]
    assert build_model(config.task, 6).weight.tolist() != found[0][2]


class Normalizing(Masking):
    """Samples and facts by sums over the whole data set, which torch rounds otherwise on two threads."""

    def load(self):
        samples = torch.rand(60_000, 8, generator=torch.Generator().manual_seed(1))
        return Data(*[TensorDataset((samples - samples.mean()) / samples.std(), torch.arange(60_000) % 2)] * 2)

    def find_facts(self, train):
        return {"mean": float(train.tensors[0].sum() / 3)}


def test_data_and_facts_are_rounded_alike_on_any_number_of_threads():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            config, data = load_data(make_config({"batch_size": 8, "device": "cpu"}, task=Normalizing))
            assert torch.get_num_threads() == threads
            found.append((fingerprint(data.train, config.task), config.task.facts))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


class Tabulated(Masking):
    def load(self):
        return Data(*[TensorDataset(torch.arange(40) % 4, torch.arange(40) % 2)] * 2)

    def build_model(self):
        return nn.Embedding(4, 2, max_norm=1.0)


def test_a_pass_that_has_shortened_vectors_leaves_no_whole_state():
    """A checkpoint of it would be of no step: the start that repeats the step would begin with other weights."""

    def fail():
        raise ValueError("amid a step")

    config = make_config({"batch_size": 8, "device": "cpu", "precision": "fp32"}, task=Tabulated)
    with join_group(World(), config) as group:
        state, data = make_state(group, config)
        assert state.is_whole
        with pytest.raises(ValueError, match="amid a step"):
            state.train_on([read_batch(state.config, data, 0)], fail)
        assert not state.is_whole


@pytest.mark.slow
def test_losses_of_few_digits_are_added_up_in_float32(monkeypatch):
    losses = Classification.losses
    monkeypatch.setattr(Classification, "losses", lambda *given: losses(*given).bfloat16())
    config = make_config({"dataset": "synthetic", "batch_size": 64, "device": "cpu", "precision": "fp32"})
    with join_group(World(), config) as group:
        state, data = make_state(group, config)
        micro_batches = read_batch(state.config, data, 3)
        _, loss = state.compute_gradients(micro_batches, 64)
        single = state.config.task.losses(state.bare_model, micro_batches[0].samples, micro_batches[0].drawn)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(single.detach().double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("made", ["padded", "packed", "a bag"])
def test_the_pieces_of_a_batch_of_any_kind_have_the_gradients_of_the_whole(made):
    found = []
    for micro_batch in (None, 5):
        options = {"task": str(Path(__file__).with_name("ragged_task.py")), "made": made, "batch_size": 12, "micro_batch": micro_batch}
        config = make_config({**options, "device": "cpu", "precision": "fp32"})
        with join_group(World(), config) as group:
            state, data = make_state(group, config)
            micro_batches = read_batch(state.config, data, 3)
            gradients, loss = state.compute_gradients(micro_batches, 12)
        assert [one.size for one in micro_batches] == ([5, 5, 2] if micro_batch else [12])
        found.append([*gradients, loss])
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)
        assert whole.any()


class Pull(Task):
    """Samples of one class attract each other; or not, where each is alone in its class."""

    kinds: int = 20
    is_sorted: bool = False
    width: int = 8

    def load(self):
        generator = torch.Generator().manual_seed(1)
        kinds = torch.randint(self.kinds, (600,), generator=generator) if self.kinds < 600 else torch.arange(600)
        inputs = torch.randn(600, 8, generator=generator)
        return Data(*[TensorDataset(inputs, kinds.sort().values if self.is_sorted else kinds)] * 2)

    def build_model(self):
        return nn.Sequential(nn.Linear(8, self.width), nn.Tanh(), nn.Linear(self.width, 8))

    def losses(self, model, batch, drawn):
        inputs, kinds = batch
        outputs = model(inputs)
        others = (kinds[:, None] == kinds) & ~torch.eye(len(kinds), dtype=torch.bool)
        pulled = ((outputs[:, None] - outputs).square().sum(2) * others).sum(1) / others.sum(1).clamp(min=1)
        return (outputs - inputs).square().sum(1) + pulled


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "in the losses some of 64 samples see each other"),
        ({"batch_size": 12, "is_sorted": True}, "in the losses some of 12 samples see each other"),
        ({"kinds": 300, "is_sorted": True}, "in the losses some of 64 samples see each other"),
        ({"kinds": 2, "is_sorted": True}, "in the losses the samples of a batch see each other"),
        ({"kinds": 600}, ""),
        ({"micro_batch": 1}, "in the losses some of 64 samples see each other"),
        ({"width": 1000, "is_sorted": True}, "in the losses some of 32 samples see each other"),  # of which no more fit
    ],
)
def test_samples_that_see_only_those_of_their_class_are_of_this_world(monkeypatch, options, reason):
    monkeypatch.setattr(tier, "_HELD_BYTES", 1 << 18)
    config, data = load_data(make_config(options, task=Pull))
    assert tier.find_tier(config.task, build_model(config.task, 0), SampleProbe(data.train, config)).reason == reason


class Crowded(Pull):
    """What is only done with more than a few samples: a random draw, or a change of a buffer; or else a gradient that the losses need."""

    what: str = "draws"

    def build_model(self):
        model = super().build_model()
        model.register_buffer("seen", torch.zeros(()))
        return model

    def losses(self, model, batch, drawn):
        inputs = batch[0].clone()
        if self.what == "needs a gradient":
            inputs.requires_grad_()
            (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
            return slope.square().sum(1) + model(inputs).square().sum(1)
        if len(inputs) > 4:
            inputs = inputs + 0 * torch.rand(()) if self.what == "draws" else inputs
            model.seen.add_(self.what == "changes")
        return (model(inputs) - inputs).square().sum(1)


@pytest.mark.parametrize(
    ("what", "reason"),
    [("draws", "draws random numbers"), ("changes", "each forward pass changes seen"), ("needs a gradient", "")],
)
def test_what_happens_with_many_samples_alone_is_seen_to(what, reason):
    config, data = load_data(make_config({"what": what}, task=Crowded))
    found = tier.find_tier(config.task, build_model(config.task, 0), SampleProbe(data.train, config)).reason
    assert reason in found
    assert bool(found) is bool(reason)


class Cracked(Pull):
    """One sample of a batch, but none of the first ones, has no loss."""

    def losses(self, model, batch, drawn):
        return super().losses(model, batch, drawn) / (batch[1] != 23)


def test_a_loss_that_is_not_finite_among_many_is_refused_at_the_start():
    config, data = load_data(make_config({"kinds": 600}, task=Cracked))
    with pytest.raises(UserError, match=r"the loss of sample 23 of the training data is inf; expected a finite number"):
        tier.find_tier(config.task, build_model(config.task, 0), SampleProbe(data.train, config))


def test_the_optimizer_that_is_stepped_is_the_one_that_accelerate_prepared():
    config = make_config({"dataset": "synthetic", "device": "cpu", "precision": "fp32"})
    with join_group(World(), config) as group:
        state, _ = make_state(group, config)
        assert type(state.optimizer).__module__ == "accelerate.optimizer"
        assert state.optimizer in group.accelerator._optimizers


class Large(Classification):
    """Ten million parameters."""

    name = "large"
    class_names = ("a", "b")

    def load(self):
        inputs = torch.randn(8, 2200, generator=torch.Generator().manual_seed(0))
        return Data(TensorDataset(inputs, torch.arange(8) % 2), TensorDataset(inputs, torch.arange(8) % 2))

    def build_model(self):
        return nn.Sequential(nn.Linear(2200, 2200), nn.ReLU(), nn.Linear(2200, 2200), nn.ReLU(), nn.Linear(2200, 2))


def test_a_checkpoint_holds_up_the_loop_for_a_copy_alone(tmp_path):
    config = make_config({"batch_size": 8, "optimizer": "adamw", "device": "cpu", "precision": "fp32", "holdout": 0}, task=Large)
    with join_group(World(), config) as group:
        state, data = make_state(group, config)
        state.train_on([[MicroBatch(range(8), data.train.tensors)]], lambda: None)
        state.step = 1
        copies, held_up = [], []
        writer = Writer(tmp_path / "checkpoints", 3, lambda: None)
        for step in (1, 2, 3):
            start = time.perf_counter()
            copy = state.copy([])
            copies.append(time.perf_counter() - start)
            start = time.perf_counter()
            writer.submit(step, copy)
            held_up.append(time.perf_counter() - start)
            start = time.perf_counter()
            writer._running.result()
            written = time.perf_counter() - start
        writer.close()
    # Bytes, hash and disk take several times as long, and are not waited for.
    assert max(held_up) < 0.1 * written
    assert min(copies) < written
    # The copy does not change with the model.
    before = copy["model"]["0.weight"].clone()
    state.bare_model[0].weight.data.zero_()
    assert torch.equal(copy["model"]["0.weight"], before)


@dataclass(frozen=True)
class NormRank:
    """A rank whose BatchNorm counts its own samples, until the evaluation."""

    def __call__(self):
        from noisy_task import NoisyTask

        config = make_config({"batch_size": 12, "norm": True, "precision": "fp32", "threads": 1, "device": "cpu"}, task=NoisyTask)
        with join_group(find_world(os.environ), config) as group:
            state, data = make_state(group, config)
            assert state.tier.name == "this world"
            assert "2 (BatchNorm1d)" in state.tier.reason
            samples = torch.full((6, 64), float(group.rank)) + torch.arange(6)[:, None] * (1 + group.rank)
            state.train_on([[MicroBatch(range(6), (samples, torch.arange(6) % 3))]], lambda: None)
            mean = state.bare_model[2].running_mean.clone()
            assert len({tuple(values.tolist()) for values in group.gather(mean)}) == 2
            state.share_buffers()
            assert len({tuple(values.tolist()) for values in group.gather(state.bare_model[2].running_mean)}) == 1
            del data
        return 0


def test_ranks_evaluate_with_the_statistics_of_rank_zero(tmp_path):
    run_ranks(tmp_path, NormRank(), 2)
