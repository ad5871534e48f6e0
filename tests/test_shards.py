"""With shards a run has the same bits on any number of processes; without them it may have any number up to the batch."""

import json
import random
import signal
from pathlib import Path

import pytest
from processes import TINY, Train, run_ranks, start_ranks
from safetensors.torch import load_file

NOISY, RAGGED = (str(Path(__file__).with_name(f"{name}_task.py")) for name in ("noisy", "ragged"))
COMMON = [
    "--batch_size",
    "24",
    "--log_every",
    "1",
    "--evaluate_every",
    "1000",
    "--wandb",
    "disabled",
    "--report",
    "false",
    "--threads",
    "1",
]
RECIPES = {
    "sgd in float32": [
        "--dataset",
        "synthetic",
        "--optimizer",
        "sgd",
        "--momentum",
        "0.9",
        "--precision",
        "fp32",
        "--learning_rate",
        "0.03",
    ],
    "muon in bfloat16": ["--dataset", "synthetic", "--optimizer", "muon", "--precision", "bf16"],
    "batch norm, dropout and workers": ["--task", NOISY, "--workers", "1", "--norm", "--dropout", "0.3", "--precision", "fp32"],
}
# Of them, collate makes batches of any kind. Masks, dropout and a moving average are in each.
SENTENCES = {
    f"sentences, {made}": [
        "--task",
        RAGGED,
        "--made",
        made,
        "--workers",
        "1",
        "--masked",
        "0.2",
        "--dropout",
        "0.3",
        "--optimizer",
        "adamw",
        "--precision",
        "fp32",
    ]
    for made in ("padded", "packed", "a bag")
}
ALL = RECIPES | SENTENCES
QUICK = ("muon in bfloat16", "batch norm, dropout and workers")
MARKED = [pytest.param(recipe, marks=[] if name in QUICK else pytest.mark.slow) for name, recipe in ALL.items()]


def read_bytes(folder):
    return (folder / "model.safetensors").read_bytes()


def read_rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("elapsed_s", "train/images_per_s")
    return [{name: value for name, value in row.items() if name not in timed and not name.startswith("health/")} for row in rows]


def read_measures(folder):
    return {name: value for name, value in json.loads((folder / "result.json").read_text()).items() if name.startswith("test/")}


@pytest.mark.parametrize("recipe", MARKED, ids=ALL)
def test_shards_give_the_same_bits_in_any_world_and_after_a_change_of_it(tmp_path, recipe):
    arguments = [*COMMON, *recipe, "--shards", "8", "--steps", "3", "--test_size", "30"]
    for world in (1, 3):  # all up to eight are a slow test
        text = run_ranks(tmp_path, Train([*arguments, "--run_dir", str(tmp_path / str(world))]), world)
        assert "any world: the same bits on 1 to 8 processes" in text
        assert read_bytes(tmp_path / str(world)) == read_bytes(tmp_path / "1")
        assert read_rows(tmp_path / str(world)) == read_rows(tmp_path / "1")
        assert read_measures(tmp_path / str(world)) == read_measures(tmp_path / "1")
    # Stopped by a signal to one of two, and resumed on three.
    arguments += ["--run_dir", str(tmp_path / "changed")]
    ranks = start_ranks(tmp_path, Train(arguments), 2)
    ranks[0].wait_for(lambda: (tmp_path / "changed/metrics.jsonl").exists() and (tmp_path / "changed/metrics.jsonl").read_text())
    ranks[1].kill(signal.SIGUSR1)
    assert [rank.wait() for rank in ranks] in ([85, 85], [0, 0])  # it may have been at its end
    run_ranks(tmp_path, Train(arguments), 3)
    assert read_bytes(tmp_path / "changed") == read_bytes(tmp_path / "1")
    assert read_rows(tmp_path / "changed") == read_rows(tmp_path / "1")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", ALL.values(), ids=ALL)
def test_shards_give_the_same_bits_in_every_world_up_to_eight(tmp_path, recipe):
    arguments = [*COMMON, *recipe, "--shards", "8", "--steps", "5", "--test_size", "31"]
    for world in (1, 2, 3, 4, 5, 8):
        run_ranks(tmp_path, Train([*arguments, "--run_dir", str(tmp_path / str(world))]), world)
        assert read_bytes(tmp_path / str(world)) == read_bytes(tmp_path / "1")
        assert read_rows(tmp_path / str(world)) == read_rows(tmp_path / "1")
        assert read_measures(tmp_path / str(world)) == read_measures(tmp_path / "1")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_soak_over_changing_worlds_ends_in_the_bits_of_one_process(tmp_path):
    arguments = [*COMMON, *RECIPES["batch norm, dropout and workers"], "--shards", "8", "--steps", "60", "--checkpoint_every", "3"]
    run_ranks(tmp_path, Train([*arguments, "--run_dir", str(tmp_path / "unbroken")]))
    choices, folder, starts = random.Random(7), tmp_path / "run", 0
    while not (folder / "result.json").exists() and starts < 40:
        starts += 1
        ranks = start_ranks(tmp_path, Train([*arguments, "--slow_s", "0.01", "--run_dir", str(folder)]), choices.choice((1, 2, 3, 4, 5, 8)))
        ranks[0].process.join(choices.uniform(1, 6))
        number = choices.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL))
        victims = [choices.choice(ranks)] if number != signal.SIGKILL else ranks
        for rank in victims:
            if rank.is_alive:
                rank.kill(number)
        for rank in ranks:
            rank.wait()
    assert starts > 2
    assert read_bytes(folder) == read_bytes(tmp_path / "unbroken")
    assert read_rows(folder) == read_rows(tmp_path / "unbroken")


def test_a_start_that_computes_otherwise_is_told_where_bits_are_promised(tmp_path):
    arguments = [*TINY, "--shards", "4", "--run_dir", str(tmp_path / "run")]
    run_ranks(tmp_path, Train(arguments))
    starts = tmp_path / "run/starts.jsonl"
    start = json.loads(starts.read_text())
    starts.write_text(json.dumps(start | {"processor": "Another One", "threads": 7}) + "\n")
    (tmp_path / "run/result.json").unlink()
    text = run_ranks(tmp_path, Train(arguments), 2)
    assert "the last start had processor Another One, now" in text
    assert "threads 7, now 1" in text
    (tmp_path / "run/result.json").unlink()
    assert "the last start had" not in run_ranks(tmp_path, Train(arguments), 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 5, 6, 7])
def test_any_number_of_processes_shares_a_batch(tmp_path, world):
    recipe = "--dataset synthetic --batch_size 64 --steps 20 --optimizer sgd --learning_rate 0.001 --momentum 0 --schedule constant"
    arguments = [*recipe.split(), *COMMON[2:], "--precision", "fp32", "--test_size", "101"]
    for name, size in (("one", 1), ("many", world)):
        run_ranks(tmp_path, Train([*arguments, "--run_dir", str(tmp_path / name)]), size)
    for one, other in zip(read_rows(tmp_path / "one"), read_rows(tmp_path / "many"), strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
        assert other["train/gradient_norm"] == pytest.approx(one["train/gradient_norm"], rel=1e-2)
    weights = load_file(tmp_path / "many/model.safetensors")
    assert all(float((value - weights[name]).abs().max()) < 1e-5 for name, value in load_file(tmp_path / "one/model.safetensors").items())
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "many")]
    assert results[0]["test/confusion_matrix"] == results[1]["test/confusion_matrix"]


@pytest.mark.parametrize(
    ("given", "world", "words"),
    [
        (["--shards", "7"], 1, "shards is 7, more than the 6 samples of a batch"),
        (["--shards", "2"], 3, "shards is 2, less than the 3 processes"),
        (["--shards", "4", "--cuda_graph"], 1, "cuda_graph cannot record the shards"),
    ],
)
def test_shards_that_cannot_be_are_refused(tmp_path, given, world, words):
    text = run_ranks(tmp_path, Train([*TINY, *given, "--run_dir", str(tmp_path / "run")]), world, expect=2)
    assert words in text
    assert not (tmp_path / "run").exists()
