"""Steps that are replayed do what steps do. Recording needs a GPU: here a stand-in keeps what a graph keeps, tensors and not numbers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mnist_dist import distributed, graph
from mnist_dist.config import configure
from mnist_dist.errors import RunError, UserError
from mnist_dist.graph import GraphedStep
from mnist_dist.loop import train as train_config


def record_on_the_cpu(compute, inputs):
    output = torch.zeros(())

    def replay():
        output.copy_(compute(*inputs))

    return replay, output


@pytest.fixture
def recorded(monkeypatch):
    """How often a graph was recorded."""
    calls = []
    monkeypatch.setattr(graph, "record", lambda *given: calls.append(given) or record_on_the_cpu(*given))
    return calls


def test_each_call_gets_its_own_inputs_and_keeps_its_output(recorded):
    step = GraphedStep(lambda a, b: (a * b).sum())
    outputs = [step(torch.full((2,), float(number)), torch.tensor([1.0, 2.0])) for number in range(8)]
    assert torch.stack(outputs).tolist() == [3.0 * number for number in range(8)]
    assert len(recorded) == 1


def test_the_batches_of_a_data_set_may_be_dictionaries(recorded):
    step = GraphedStep(lambda samples, _: (samples["x"] * samples["y"][0]).sum())
    outputs = [step({"x": torch.full((2,), float(number)), "y": [torch.tensor([2.0])]}, None) for number in range(8)]
    assert torch.stack(outputs).tolist() == [4.0 * number for number in range(8)]
    assert len(recorded) == 1


def test_a_batch_of_another_shape_is_refused_and_not_spread_over_the_first(recorded):
    step = GraphedStep(lambda samples: samples["x"].sum())
    for _ in range(4):
        step({"x": torch.zeros(64, 37)})
    with pytest.raises(UserError, match=r"here one is float32 \[64, 1\], and was float32 \[64, 37\]"):
        step({"x": torch.zeros(64, 1)})


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": torch.zeros(2), "count": 3}, "a batch holds a int"),
        ([torch.zeros(2), np.zeros(2)], "a batch holds a ndarray"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], "a batch holds some on cpu, meta"),
    ],
)
def test_what_a_graph_would_keep_of_the_first_batch_is_refused(recorded, batch, words):
    with pytest.raises(UserError, match=words):
        GraphedStep(lambda samples: samples[0])(batch)


def test_a_batch_with_a_tensor_less_is_refused(recorded):
    step = GraphedStep(lambda samples: samples[0].sum())
    for _ in range(4):
        step([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(UserError, match=r"here one is missing, and was float32 \[3\]"):
        step([torch.zeros(2)])


def test_a_batch_of_another_type_is_refused_and_not_rounded(recorded):
    step = GraphedStep(lambda samples: samples["x"].sum())
    for _ in range(4):
        step({"x": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(UserError, match=r"here one is float32 \[3\], and was int64 \[3\]"):
        step({"x": torch.full((3,), 0.5)})


def test_a_dictionary_may_have_its_keys_in_another_order(recorded):
    step = GraphedStep(lambda samples: (samples["x"] - samples["y"]).sum())
    for _ in range(4):
        step({"x": torch.full((2,), 4.0), "y": torch.ones(2)})
    assert step({"y": torch.ones(2), "x": torch.full((2,), 4.0)}) == 6


def test_keys_are_told_apart_by_what_they_are_and_not_by_how_they_are_shown(recorded):
    class Key(int):
        def __repr__(self):
            return "key"

    step = GraphedStep(lambda samples: (samples[Key(1)] - samples[Key(2)]).sum())
    outputs = [step({Key(1): torch.full((2,), float(number)), Key(2): torch.ones(2)}) for number in range(8)]
    assert torch.stack(outputs).tolist() == [2.0 * number - 2 for number in range(8)]


class Recording:
    """A recording as torch's: to end one that has failed fails as well."""

    def __init__(self, _, **how):
        assert how == {"capture_error_mode": "thread_local"}  # beside the thread that pins memory for the batches of workers

    def __enter__(self):
        pass

    def __exit__(self, kind, *_):
        if kind is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("failure", "raised", "words"),
    [
        (RunError("t failed: t.py:3 in losses: operation not permitted when stream is capturing"), UserError, r"\.item\(\).*t\.py:3"),
        (RunError("t failed: capture.py:3 in losses: KeyError: 'x'"), RunError, "^t failed: capture.py:3 in losses: KeyError: 'x'$"),
    ],
)
def test_a_step_that_cannot_be_recorded_is_told_by_its_own_words(monkeypatch, failure, raised, words):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Recording)

    def compute(_):
        raise failure

    with pytest.raises(raised, match=words):
        graph.record(compute, (torch.zeros(1),))


def test_a_graph_is_recorded_after_some_steps_and_once(recorded):
    step = GraphedStep(lambda a: a.sum())
    counts = []
    for _ in range(6):
        step(torch.ones(2))
        counts.append(len(recorded))
    assert counts == [0, 0, 0, 1, 1, 1]


def train(folder, **values):
    recipe = {"dataset": "synthetic", "train_size": 80, "test_size": 20, "batch_size": 8, "steps": 12, "log_every": 1, "threads": 1}
    recipe |= {"learning_rate": 0.0003, "precision": "fp32", "report": False, "wandb": "disabled", "checkpoint_every": 5}
    train_config(configure(**recipe | values, run_dir=str(folder)))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "model.safetensors"), [row["train/loss"] for row in rows]


@pytest.mark.parametrize("optimizer", [pytest.param("muon", marks=pytest.mark.slow), "sgd", "adamw"])
def test_a_run_with_replayed_steps_is_the_run_without(tmp_path, monkeypatch, recorded, optimizer):
    monkeypatch.setattr(distributed, "check_graph", lambda *_: None)
    weights, losses = train(tmp_path / "plain", optimizer=optimizer)
    replayed_weights, replayed_losses = train(tmp_path / "replayed", optimizer=optimizer, cuda_graph=True)
    assert len(recorded) == 1
    # A learning rate in a tensor has seven digits. A step with another step's learning rate would be off by far more.
    assert replayed_losses == pytest.approx(losses, rel=1e-4)
    assert all(torch.allclose(value, replayed_weights[name], atol=1e-5) for name, value in weights.items())


@pytest.mark.slow
def test_a_run_goes_on_with_replayed_steps_from_one_without(tmp_path, monkeypatch, recorded):
    monkeypatch.setattr(distributed, "check_graph", lambda *_: None)
    weights, _ = train(tmp_path / "plain", optimizer="adamw")
    train(tmp_path / "mixed", optimizer="adamw")
    folder = tmp_path / "mixed"
    (folder / "result.json").unlink()
    first, *later = sorted((folder / "checkpoints").iterdir())
    assert first.name.startswith("step_00000005")
    for path in later:
        path.unlink()
    mixed, _ = train(folder, optimizer="adamw", cuda_graph=True)
    assert len(recorded) == 1
    assert all(torch.allclose(value, mixed[name], atol=1e-5) for name, value in weights.items())


def test_a_step_whose_replay_fails_is_not_saved(tmp_path, monkeypatch):
    """It may have moved the weights, and runs none of the Python that would have noted it."""

    def record_once(compute, inputs):
        replays = iter([lambda: compute(*inputs)])

        def replay():
            next(replays, fail)()

        return replay, torch.zeros(())

    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(distributed, "check_graph", lambda *_: None)
    monkeypatch.setattr(graph, "record", record_once)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(tmp_path, cuda_graph=True, checkpoint_every=1000)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_replayed_steps_need_a_gpu(tmp_path):
    with pytest.raises(UserError, match="one process on a GPU, and this run is on a CPU"):
        train(tmp_path, cuda_graph=True)
    assert not list(tmp_path.iterdir())
