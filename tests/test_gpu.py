"""The promises on a GPU. `make gpu-test` runs these; where there is one GPU only, two ranks share it, which NCCL 2.30 can do.

Most of them are run on a CPU as well, with the slow tests: so they stay right where no GPU is at hand.
"""

import json
import os
import re
import signal
import time

import pytest
import torch
from cluster import ROOT
from pictures import write_classes
from processes import Programs, StopAt, Train, find_free_ports, run_ranks, start_ranks
from test_promises import STEPS, Story, assert_same_bits, read_lines

from mnist_dist.config import parse_command_line

pytestmark = pytest.mark.gpu
on_cpu_too = pytest.mark.slow
DEVICE = "cuda" if os.environ.get("TEST_ON_GPU") == "1" else "cpu"

RUN = [
    "--dataset",
    "synthetic",
    "--train_size",
    "240",
    "--test_size",
    "100",
    "--batch_size",
    "24",
    "--learning_rate",
    "0.002",
    "--device",
    DEVICE,
]
RUN += ["--log_every", "1", "--evaluate_every", "4", "--report", "false", "--wandb", "disabled", "--threads", "1"]
KINDS = {
    "muon in bf16": ["--precision", "bf16"],
    "muon in fp32": ["--precision", "fp32"],
    "sgd": ["--precision", "bf16", "--optimizer", "sgd"],
    "adamw": ["--precision", "bf16", "--optimizer", "adamw"],
    "a graph": ["--precision", "bf16", "--cuda_graph"],
    "a graph of adamw": ["--precision", "fp32", "--optimizer", "adamw", "--cuda_graph"],
    "shards": ["--precision", "bf16", "--shards", "4"],
}


@pytest.fixture(autouse=True)
def _gpu(request):
    if DEVICE == "cuda" or request.node.get_closest_marker("slow") is None:
        assert torch.cuda.is_available(), "this test needs a GPU"


def in_twos():
    """Skip a test where two ranks cannot have a GPU each, nor share one."""
    if DEVICE == "cuda" and torch.cuda.device_count() < 2 and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        pytest.skip("two ranks need two GPUs, or NCCL 2.30 or newer and NCCL_MULTI_RANK_GPU_ENABLE=1")


def read_weights(folder):
    return (folder / "model.safetensors").read_bytes()


def read_losses(folder):
    return [row["train/loss"] for row in read_lines(folder / "metrics.jsonl")]


def list_kinds():
    """The kinds as a test takes them: a graph needs a GPU."""
    return [kind if "--cuda_graph" in options else pytest.param(kind, marks=on_cpu_too) for kind, options in KINDS.items()]


@pytest.mark.parametrize("kind", list_kinds())
def test_a_stopped_run_has_the_bits_of_the_unbroken_one_and_so_has_a_second(tmp_path, kind):
    options = [*RUN, *KINDS[kind], "--steps", str(STEPS + 2)]
    run_ranks(tmp_path, Story(tmp_path, options, (1, 3, 5), rounds=4 if kind == "shards" else 3, evaluate_every=4))
    for step in (1, 3, 5):
        assert [start["step"] for start in read_lines(tmp_path / f"stopped {step}/starts.jsonl")] == [0, step]
        assert_same_bits(tmp_path / f"stopped {step}", tmp_path / "unbroken")
    [start] = read_lines(tmp_path / "unbroken/starts.jsonl")
    assert (start["device"], start["precision"]) == (DEVICE, options[options.index("--precision") + 1])
    run_ranks(tmp_path, Train([*options, "--run_dir", str(tmp_path / "second")]))
    assert_same_bits(tmp_path / "second", tmp_path / "unbroken")


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_a_graph_does_what_the_steps_do(tmp_path, optimizer):
    options = [*RUN, "--precision", "fp32", "--optimizer", optimizer, "--steps", "12", "--learning_rate", "0.0003"]
    lines = [["train", *options, *more, "--run_dir", str(tmp_path / name)] for name, more in (("steps", []), ("graph", ["--cuda_graph"]))]
    run_ranks(tmp_path, Programs(lines))
    assert read_losses(tmp_path / "graph") == pytest.approx(read_losses(tmp_path / "steps"), rel=1e-4)


@on_cpu_too
def test_two_ranks_train_as_one_over_nccl(tmp_path):
    in_twos()
    calm = [*RUN, "--precision", "fp32", "--optimizer", "sgd", "--momentum", "0", "--steps", "8", "--schedule", "constant"]
    for world in (1, 2):
        run_ranks(tmp_path, Train([*calm, "--run_dir", str(tmp_path / str(world))]), world)
    assert read_losses(tmp_path / "2") == pytest.approx(read_losses(tmp_path / "1"), rel=1e-5)


@on_cpu_too
def test_shards_give_the_same_bits_on_one_rank_and_on_two(tmp_path):
    in_twos()
    for world in (1, 2):
        run_ranks(tmp_path, Train([*RUN, *KINDS["shards"], "--steps", "8", "--run_dir", str(tmp_path / str(world))]), world)
    assert read_weights(tmp_path / "1") == read_weights(tmp_path / "2")
    assert read_losses(tmp_path / "1") == read_losses(tmp_path / "2")


@on_cpu_too
def test_on_two_ranks_a_resumed_run_has_the_bits_of_the_unbroken_one(tmp_path):
    in_twos()
    options = [*RUN, *KINDS["muon in bf16"], "--steps", str(STEPS + 2)]
    run_ranks(tmp_path, Story(tmp_path, options, (1, 3), rounds=3, evaluate_every=4, ports=find_free_ports(5)), 2)
    for step in (1, 3):
        assert [start["step"] for start in read_lines(tmp_path / f"stopped {step}/starts.jsonl")] == [0, step + 1]
        assert_same_bits(tmp_path / f"stopped {step}", tmp_path / "unbroken")


SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"}  # as between hosts


# With a row of the record for each step, the ranks wait for their GPU most of the time.
@pytest.mark.parametrize(("victim", "log_every", "environ"), [(0, 1, {}), (1, 1, {}), (1, 100, {}), (1, 1, SOCKETS)])
def test_a_killed_rank_is_named_although_nccl_waits_for_it(tmp_path, victim, log_every, environ):
    in_twos()
    options = [*RUN, "--steps", "100000", "--log_every", str(log_every), "--evaluate_every", "100000", "--timeout_s", "60"]
    ranks = start_ranks(tmp_path, Train([*options, "--run_dir", str(tmp_path / "run")]), 2, environ)
    ranks[0].wait_for(lambda: re.search(r"step [1-9]0+/", ranks[0].text), 90)
    ranks[victim].kill(signal.SIGKILL)
    begin = time.monotonic()
    other = ranks[1 - victim]
    assert other.wait() == 1
    assert time.monotonic() - begin < 30
    assert re.search(rf"error: rank {victim} on host \S+ is gone and left no reason", other.text), other.text
    assert "Traceback" not in other.text


@on_cpu_too
def test_a_signal_stops_two_ranks_together(tmp_path):
    in_twos()
    options = [*RUN, "--steps", "100000", "--log_every", "5", "--run_dir", str(tmp_path / "run")]
    ranks = start_ranks(tmp_path, Train(options), 2)
    ranks[0].wait_for(lambda: "step 10/" in ranks[0].text, 90)
    ranks[1].kill(signal.SIGTERM)
    assert len({rank.wait() for rank in ranks}) == 1
    assert re.search(r"stopped by a signal after step \d+", ranks[0].text)


def test_verify_finds_nothing_wrong(tmp_path):
    text = run_ranks(tmp_path, Programs([["verify"]]))
    assert "ok    gradients" in text
    assert "ok    curve" in text


def test_verify_finds_nothing_wrong_on_two_ranks(tmp_path):
    in_twos()
    assert run_ranks(tmp_path, Programs([["verify"]]), 2).count("ok  ") >= 2


def test_a_run_that_began_on_a_gpu_ends_on_a_cpu(tmp_path):
    options = [*RUN, "--precision", "fp32", "--steps", "8", "--run_dir", str(tmp_path / "run")]
    run_ranks(tmp_path, Until(tuple(options)))
    [begun] = read_lines(tmp_path / "run/starts.jsonl")
    options[options.index("--device") + 1] = "cpu"
    run_ranks(tmp_path, Train(options))
    assert [start["device"] for start in read_lines(tmp_path / "run/starts.jsonl")] == ["cuda", "cpu"]
    assert begun["device"] == "cuda"
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0]["health/memory_gb"] > 0


class Until(tuple):
    """The options of a run that is stopped in its fourth step, as work for a rank."""

    def __call__(self):
        from mnist_dist import loop

        loop.train(parse_command_line(list(self)), StopAt(4))


def test_the_other_programs_read_a_run_of_a_gpu(tmp_path):
    run = str(tmp_path / "run")
    lines = [["train", *RUN, "--steps", "60", "--evaluate_every", "60", "--run_dir", run, "--cuda_graph"]]
    lines += [["evaluate", run, "--json"], ["evaluate", run, "--json", "--device", "cpu"]]
    text = run_ranks(tmp_path, Programs([*lines, ["export", run, str(tmp_path / "model.pt2")]]))
    on_gpu, on_cpu = (json.loads(line) for line in text.splitlines() if line.startswith("{"))
    assert (on_gpu["device"], on_cpu["device"]) == ("cuda", "cpu")
    assert on_gpu["test/loss"] == pytest.approx(on_cpu["test/loss"], abs=0.01)
    assert (tmp_path / "model.pt2").exists()


@on_cpu_too
def test_workers_feed_a_gpu_with_the_same_samples(tmp_path):
    pictures = str(write_classes(tmp_path / "pictures"))
    options = ["--task", f"{ROOT}/examples/image_folder.py", "--arch", "mobilenet_v3_small", "--side", "32", "--data_dir", pictures]
    options += ["--device", DEVICE, "--steps", "4", "--batch_size", "12", "--log_every", "1", "--report", "false", "--wandb", "disabled"]
    lines = [["train", *options, "--workers", str(workers), "--run_dir", str(tmp_path / str(workers))] for workers in (0, 2)]
    run_ranks(tmp_path, Programs(lines), environ={"XDG_STATE_HOME": str(tmp_path)})
    assert read_weights(tmp_path / "0") == read_weights(tmp_path / "2")
