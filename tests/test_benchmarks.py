"""The benchmarks' own sums, their peers, and that each part of the loop is found. What they measure is not tested."""

import argparse
import itertools
import json
import math
import subprocess

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import accuracy, commits, common, scaling, startup, stock, throughput, time_to_accuracy, worlds
from mnist_dist.config import configure, make_config
from mnist_dist.errors import UserError
from mnist_dist.program import run_program
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.tasks.mnist.model import CNN

# What time_to_accuracy makes of a command line without options.
OPTIONS = argparse.Namespace(config="fast", evaluations=8, example=None, epochs=None, train_size=None, test_size=None)
TINY = {"dataset": "synthetic", "steps": 3, "batch_size": 4, "train_size": 20, "test_size": 5, "report": False, "wandb": "disabled"}
PROGRAMS = [accuracy, commits, scaling, startup, throughput, time_to_accuracy, worlds]


def test_the_operations_of_a_training_step_are_counted_right():
    model = CNN()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(4, 1, 28, 28)).sum().backward()
    assert counter.get_total_flops() / 4 == pytest.approx(common.TRAINING_FLOP, rel=0.001)


@pytest.mark.slow
def test_the_loop_takes_its_batches_through_the_turns_of_a_benchmark(tmp_path):
    seen = []

    def take_turns(batches, state):
        accelerator = state.group.accelerator
        common.make_step(common.make_model(accelerator), config, accelerator, 4)()
        for batch in batches:
            seen.append(batch.step)
            yield batch

    config = configure(**TINY, run_dir=str(tmp_path))
    common.run_loop(config, take_turns)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_time_of_a_step_is_shared_out_to_its_parts(tmp_path, monkeypatch, micro_batch):
    timer, now_s, totals_s = throughput.PartTimer(), itertools.count(), []
    monkeypatch.setattr(timer, "read_clock", lambda: float(next(now_s)))

    def take_turns(batches, _):
        timer.on = True
        for batch in batches:
            start_s = timer.read_clock()
            yield batch
            totals_s.append(timer.read_clock() - start_s)

    config = make_config({**TINY, "optimizer": "sgd", "micro_batch": micro_batch, "run_dir": str(tmp_path)}, task=timer.make_task())
    with timer.timed_optimizers():
        common.run_loop(config, take_turns)
    # By a clock that goes on by one whenever it is read: twice for each part, and for the backward pass once where the next begins.
    passes = 3 * (2 if micro_batch else 1)
    assert timer.spent_s["optimizer"] == 3
    assert timer.spent_s["augment"] == 3 + passes + (3 if micro_batch else 1)  # the last are the batches of the evaluation
    assert timer.spent_s["backward"] == passes
    assert timer.spent_s["forward"] == 2 * passes
    assert sum(timer.spent_s.values()) < 3 * 20
    assert len(totals_s) == 3  # the loop comes back after the last step


@pytest.mark.slow
def test_the_start_of_a_training_is_told_part_by_part():
    start = startup.measure_start("python -m", "smoke", "disabled")
    parts = start["parts_s"]
    assert {"process group", "data", "model", "optimizer and run folder", "start of W&B's process", "first step", "rest"} < {*parts}
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(start["total_s"])


@pytest.mark.slow
def test_the_clock_stands_still_while_the_loop_evaluates(tmp_path, monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(time_to_accuracy.time, "perf_counter", lambda: now_s)

    def tally(self, model, batch):
        nonlocal now_s
        now_s += 1000
        return count(self, model, batch)

    def losses(self, model, batch, drawn):
        nonlocal now_s
        now_s += 1
        return compute(self, model, batch, drawn)

    count, compute = Mnist.tally, Mnist.losses
    monkeypatch.setattr(Mnist, "tally", tally)
    monkeypatch.setattr(Mnist, "losses", losses)
    options = argparse.Namespace(**{**vars(OPTIONS), "config": "smoke", "evaluations": 2, "epochs": 1, "train_size": 160, "test_size": 5})
    monkeypatch.setattr(time_to_accuracy, "read_recipe", lambda _: {"dataset": "synthetic", "batch_size": 40})
    evaluations = time_to_accuracy.train_ours(options, 0, tmp_path)["evaluations"]
    assert [(row["epoch"], row["time_s"]) for row in evaluations] == [(0.5, 2), (1, 4)]


def test_the_stock_loader_gives_the_embedded_images_as_the_loop_normalises_them(tmp_path):
    stock.write_files(tmp_path)
    images, labels = next(iter(stock.make_loader(tmp_path, train=False, batch_size=50, size=50)))
    ours, our_labels = Mnist().load().test[:50]
    assert torch.equal(labels, our_labels)
    assert torch.allclose(images[:, 0], (ours / 255 - stock.MEAN) / stock.STD, atol=1e-5)
    augmented = stock.make_loader(tmp_path, train=True, batch_size=8, size=8, augmentation=stock.make_augmentation(Mnist().limits))
    assert next(iter(augmented))[0].shape == (8, 1, 28, 28)


@pytest.mark.parametrize("batches", [2, 100])
def test_the_time_of_the_stock_way_is_that_of_the_images_after_the_warm_up(tmp_path, monkeypatch, batches):
    now_s = 0.0

    def train_batch(_model, _optimizer, images, _labels):
        nonlocal now_s
        now_s += len(images)

    monkeypatch.setattr(stock, "make_loader", lambda *_, **__: [(range(size), None) for size in (8, 8, 8, 8, 3)])
    monkeypatch.setattr(stock, "train_batch", train_batch)
    session = throughput.Session(argparse.Namespace(stock_batch_size=8), configure(), tmp_path)
    session.threads = torch.get_num_threads()
    monkeypatch.setattr(session.timer, "read_clock", lambda: now_s)
    assert session._time_stock("stock", 0, 1, batches) == 1.0


def test_a_stock_batch_that_leaves_nothing_to_time_is_refused(capsys):
    assert run_program(lambda: throughput.main(["--stock_batch_size", "15001"])) == 2
    assert "stock_batch_size is 15001; allowed: at most 15000" in capsys.readouterr().err


# As the published example is built, but for what it computes.
EXAMPLE = """
import argparse
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

def train(args, model, device, train_loader, optimizer, epoch):
    assert [len(images) for images, _ in train_loader] == [64, 36]

def test(model, device, test_loader):
    raise AssertionError("it is counted exactly instead")

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    assert args.seed == 7
    train_data, test_data = (datasets.MNIST("../data", train, transforms.ToTensor(), download=True) for train in (True, False))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    for epoch in range(1, args.epochs + 1):
        train(args, model, "cpu", DataLoader(train_data, batch_size=64), None, epoch)
        test(model, "cpu", DataLoader(test_data, batch_size=1000))

if __name__ == "__main__":
    main()
"""


def test_the_published_example_is_run_from_the_file_of_the_reader(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["unchanged"])
    file = tmp_path / "main.py"
    file.write_text(EXAMPLE)
    options = argparse.Namespace(**{**vars(OPTIONS), "example": file, "epochs": 2, "train_size": 100, "test_size": 200})
    settings = time_to_accuracy.describe_settings("example", options)
    evaluations = time_to_accuracy.train_example(file, settings, 7, tmp_path)["evaluations"]
    assert [row["epoch"] for row in evaluations] == [1, 2]
    assert 0 < evaluations[0]["time_s"] < evaluations[1]["time_s"]
    assert 0 <= evaluations[0]["accuracy"] <= 1
    file.write_text(EXAMPLE + "\n")  # another version of it is another entry
    assert time_to_accuracy.describe_settings("example", options) != settings


def test_a_file_that_is_not_the_example_is_refused(tmp_path):
    file = tmp_path / "main.py"
    options = argparse.Namespace(**{**vars(OPTIONS), "example": file})
    with pytest.raises(UserError, match="cannot be read: No such file"):
        time_to_accuracy.describe_settings("example", options)
    file.write_text("print()")
    with pytest.raises(UserError, match="has no train, test and main"):
        time_to_accuracy.train_example(file, time_to_accuracy.describe_settings("example", options), 0, tmp_path)


def test_the_example_is_asked_for_before_anything_is_trained(tmp_path, capsys):
    assert run_program(lambda: time_to_accuracy.main(["--results", str(tmp_path / "x.jsonl")])) == 2
    assert "needs --example FILE" in capsys.readouterr().err


def test_a_ratio_is_of_medians_and_its_spread_of_pairs():
    assert common.compare([2, 4, 9], [1, 2, 3]) == "2.00 (2.00 - 3.00)"


def test_rows_come_back_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "results" / "x.jsonl"
    assert common.read_rows(path) == []
    common.append_row(path, {"a": 1})
    assert common.read_rows(path) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a":')
    with pytest.raises(UserError, match="line 2 of"):
        common.read_rows(path)


def test_a_time_is_that_of_the_first_evaluation_that_reached_the_mark():
    accuracies = [0.98, 0.991, 0.989, 0.9951]
    row = {"evaluations": [{"time_s": 10.0 * number, "accuracy": value} for number, value in enumerate(accuracies)]}
    assert time_to_accuracy.find_time(row, 0.99) == 10
    assert time_to_accuracy.find_time(row, 0.994) == 30
    assert time_to_accuracy.find_time(row, 0.999) == math.inf


def test_a_ring_all_reduce_sends_all_but_the_own_share_twice():
    link = scaling.Link("x", 0.5, 100)
    assert link.all_reduce_s(1, 1000) == 0
    assert link.all_reduce_s(2, 1000) == pytest.approx(2 * 0.5 + 10)
    assert link.all_reduce_s(4, 1000) == pytest.approx(6 * 0.5 + 15)


def test_more_processes_pay_until_the_exchange_outweighs_the_share():
    free, slow = scaling.Link("free", 0, math.inf), scaling.Link("slow", 1, math.inf)
    assert scaling.find_last_useful(0, 1e-3, 64, free) == 64
    assert scaling.find_last_useful(0, 1e-3, 64, slow) == 1


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ((2, 4), "rank zero has 2,084 open files (2.00 for each rank), another at most 37."),
        ((4, 1, 2), "rank zero has 2,084 open files (2.00 for each rank), another at most 37."),
        ((1, 2), "Fewer than two worlds of several ranks tell nothing of a larger one."),
        ((2, 2), "Fewer than two worlds of several ranks tell nothing of a larger one."),
    ],
)
def test_a_large_world_is_reckoned_from_the_two_largest_whose_ranks_are_connected(ranks, words):
    files = {1: (29, 29), 2: (40, 19), 4: (44, 21)}
    measured = [{"ranks": size, "open_files_main": files[size][0], "open_files_others": files[size][1]} for size in ranks]
    assert worlds.reckon_large(measured).endswith(words)


def make_row(entry, seed, settings):
    return {
        "benchmark": "time_to_accuracy",
        "entry": entry,
        "seed": seed,
        "settings": settings,
        "precision": "fp32",
        "workers": 1,
        "threads": 2,
        "tried": [],
        "evaluations": [{"epoch": 1, "time_s": 5.0 if entry == "ours" else 50.0, "accuracy": 0.991}],
        "products": [{"fp32": 1e9, "bf16": 1e9}],
        "machine": common.describe_machine(),
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "unknown",
    }


def test_what_the_results_hold_is_not_measured_again_and_is_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time_to_accuracy.subprocess, "run", lambda *_, **__: pytest.fail("started again"))
    path = tmp_path / "x.jsonl"
    for entry, seed in itertools.product(("ours", "course"), (0, 1)):
        common.append_row(path, make_row(entry, seed, time_to_accuracy.describe_settings(entry, OPTIONS)))
    arguments = ["--results", str(path), "--entries", "ours", "course", "--seeds", "0", "1"]
    assert time_to_accuracy.main(arguments) == 0
    table = capsys.readouterr().out
    assert "10.0" in table
    assert "not reached" in table


def test_a_row_that_is_missing_is_measured_and_a_failure_is_told(tmp_path, monkeypatch, capsys):
    started = []

    def start(command, **_):
        started.append(command[-3:-1])
        return subprocess.CompletedProcess(command, 1, stderr="much\nerror: the reason")

    monkeypatch.setattr(time_to_accuracy.subprocess, "run", start)
    path = tmp_path / "x.jsonl"
    common.append_row(path, make_row("course", 0, time_to_accuracy.describe_settings("course", OPTIONS)))
    arguments = ["--results", str(path), "--entries", "course", "ours", "--seeds", "0", "1"]
    assert run_program(lambda: time_to_accuracy.main(arguments)) == 1
    assert started == [["ours", "0"], ["course", "1"], ["ours", "1"]]
    assert "error: the reason" in capsys.readouterr().err


def test_a_peer_is_measured_with_the_workers_and_threads_that_are_quickest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time_to_accuracy, "count_usable_cores", lambda: 2)
    trained = []

    def start(command, **_):
        options = time_to_accuracy.make_parser().parse_args(command[3:])
        entry, seed, way = options.only[0], int(options.only[1]), json.loads(options.only[2])
        if options.train_size is None:
            trained.append((seed, way["workers"], way["threads"], len(way["tried"])))
        row = make_row(entry, seed, time_to_accuracy.describe_settings(entry, OPTIONS)) | way
        row["evaluations"][0]["time_s"] = 9 - (way["workers"] == 1) - (way["threads"] == 2)
        common.append_row(options.results, row)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(time_to_accuracy.subprocess, "run", start)
    path = tmp_path / "x.jsonl"
    arguments = ["--results", str(path), "--entries", "course", "--seeds"]
    assert time_to_accuracy.main([*arguments, "0", "1"]) == 0
    assert trained == [(0, 1, 2, 6), (1, 1, 2, 6)]
    assert time_to_accuracy.main([*arguments, "2"]) == 0  # later: the same, without new trials
    assert trained[2:] == [(2, 1, 2, 6)]
    assert "1 workers, 2 threads" in capsys.readouterr().out


def test_older_rows_of_the_loop_say_nothing_of_workers_and_are_gone_on_with(tmp_path, monkeypatch):
    ways = []

    def start(command, **_):
        ways.append(json.loads(command[-1]))
        common.append_row(path, make_row("ours", 1, settings) | ways[-1])
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(time_to_accuracy.subprocess, "run", start)
    monkeypatch.setattr(time_to_accuracy, "count_usable_cores", lambda: 2)
    path, settings = tmp_path / "x.jsonl", time_to_accuracy.describe_settings("ours", OPTIONS)
    older = make_row("ours", 0, settings)
    common.append_row(path, {name: older[name] for name in older if name not in ("workers", "tried")})
    assert time_to_accuracy.main(["--results", str(path), "--entries", "ours", "--seeds", "0", "1"]) == 0
    assert ways == [{"workers": 0, "threads": 2, "tried": []}]


def test_a_seed_that_was_measured_again_counts_once_though_its_older_row_has_other_settings(tmp_path, capsys):
    path, settings = tmp_path / "x.jsonl", time_to_accuracy.describe_settings("course", OPTIONS)
    older = make_row("course", 0, {**settings, "workers": 1})  # where rows had them once
    common.append_row(path, {name: older[name] for name in older if name != "workers"})
    for seed in (1, 0):
        common.append_row(path, make_row("course", seed, settings) | {"evaluations": [{"epoch": 1, "time_s": 7.0, "accuracy": 0.991}]})
    assert time_to_accuracy.main(["--table", "--results", str(path)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| the course")]
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["2", "99.10%", "7"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_table_without_results_is_one_clear_line(program, tmp_path, capsys):
    assert run_program(lambda: program.main(["--table", "--results", str(tmp_path / "none.jsonl")])) == 2
    assert "holds no results yet" in capsys.readouterr().err


def test_a_row_tells_no_host_and_no_path():
    row = json.dumps(common.describe_machine() | common.describe_origin())
    assert "/" not in row


@pytest.mark.slow
def test_two_checkouts_train_in_turn(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    assert commits.main(["--results", str(path), "--beside", str(common.ROOT), "--config", "smoke", "--rounds", "1", "--steps", "100"]) == 0
    [row] = common.read_rows(path)
    assert all(one["this"] > 0 < one["other"] for one in row["rounds"])
    assert "| smoke" in capsys.readouterr().out
    for wrong in ({"beside": tmp_path}, {"beside": common.ROOT, "steps": 50}):
        with pytest.raises(UserError, match=f"{[*wrong][-1]} is "):
            commits.measure(argparse.Namespace(**{"config": "smoke", "rounds": 1, "steps": 100} | wrong))


@pytest.mark.slow
def test_accuracies_are_kept_by_recipe_and_seed_and_summed_up_with_an_interval(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    training = ["--steps", "2", "--train_size", "40", "--test_size", "20", "--batch_size", "4", "--device", "cpu"]
    arguments = ["--results", str(path), "--configs", "smoke", "--seeds", "0", "1"]
    assert accuracy.main([*arguments, "--", *training]) == 0
    rows = common.read_rows(path)
    assert [row["seed"] for row in rows] == [0, 1]
    monkeypatch.setattr(accuracy.subprocess, "run", lambda *_, **__: pytest.fail("started again"))
    assert accuracy.main([*arguments, "--", *training, "--log_every", "3"]) == 0  # no matter of the recipe
    other = {"fp32": "bf16", "bf16": "fp32"}[rows[0]["precision"]]
    with pytest.raises(pytest.fail.Exception, match="started again"):
        accuracy.main([*arguments, "--", *training, "--precision", other])
    capsys.readouterr()
    for row, share in zip(rows, (0.5, 0.6), strict=True):
        common.append_row(path, row | {"test/accuracy": share})
    assert accuracy.main(["--table", "--results", str(path)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| smoke")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[0] == "smoke train_size=40 test_size=20 steps=2 batch_size=4"
    assert cells[2:8] == ["20 test", "2", "55.000", "7.071", "-8.530 - 118.530", "50.00"]  # 55 +- 12.706 * 7.0711 / sqrt(2)


def test_the_accuracy_of_a_recipe_of_ones_own_has_its_table(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    [row, *_] = common.read_rows(common.ROOT / "benchmarks/results/accuracy.jsonl")
    row["settings"] = {"config": "mine", "recipe": common.describe_recipe(configure(epochs=7))}
    row["elapsed_s"] = 1918.4
    common.append_row(path, row)
    assert accuracy.main(["--table", "--results", str(path)]) == 0
    table = capsys.readouterr().out
    assert "| mine epochs=7 |" in table
    assert "1,918 |" in table
