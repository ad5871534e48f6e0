"""What any right world computes alike, and the mistakes that leave it: each is planted in real processes, found, and its rank named."""

import json
import math
import os
import re
import socket
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from noisy_task import NoisyTask
from processes import run_ranks

from mnist_dist.errors import UserError
from mnist_dist.finding import Finding, read_findings, write_findings
from mnist_dist.inspection import (
    CURVE_TOLERANCE,
    GRADIENT_TOLERANCE,
    Fingerprint,
    Inspection,
    Rank,
    Steps,
    compare_gradients,
    measure_distance,
    take_fingerprint,
    watch_losses,
)
from mnist_dist.reference import BATCHES, SKETCH, find_shipped, read_reference
from mnist_dist.task import Task
from mnist_dist.verify import main, make_config

SHIPPED = Path(str(resources.files("mnist_dist.tasks.mnist"))) / "reference.json"
TASK = str(Path(__file__).parent / "noisy_task.py")
SMALL = ("--task", TASK, "--batch_size", "12", "--steps", "21", "--threads", "1")


@dataclass(frozen=True)
class Verify:
    """The program with some arguments, on a machine with a mistake, called in a folder."""

    arguments: tuple[str, ...]
    mistake: str = ""
    folder: str = "."

    def __call__(self):
        os.chdir(self.folder)
        plant(self.mistake, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        return main(self.arguments)


def plant(mistake, rank, size):
    """Make the mistake in this process; those of a single rank are on the last one."""
    from mnist_dist.batches import Batch, StepSampler
    from mnist_dist.source import find_task
    from mnist_dist.state import TrainingState

    task, is_last = find_task(TASK), rank == size - 1
    load, losses, order, sample = task.load, task.losses, StepSampler._order, StepSampler.__iter__
    train_on, add_gradients = TrainingState.train_on, TrainingState._add_gradients
    if mistake.startswith("a gradient off by ") and is_last:
        share = float(mistake.split()[-1])

        def lose(self, model, batch, drawn):
            found = losses(self, model, batch, drawn)
            return found + share * (found - found.detach())  # the same losses

        task.losses = lose
    elif mistake.startswith("bit ") and is_last:

        def flip(self, *arguments):
            loss = train_on(self, *arguments)
            if self.step == 19:  # in step 20
                with torch.no_grad():
                    weights = next(self.bare_model.parameters()).view(-1).view(torch.int32)
                    weights[7] ^= 1 << int(mistake.split()[1])
            return loss

        TrainingState.train_on = flip
    elif mistake == "a share shifted by one" and is_last:
        StepSampler._order = lambda self, part: order(self, part).roll(1) if self.dealt_to > 1 else order(self, part)
    elif mistake == "data shifted by one" and is_last:

        def shift(self):
            data = load(self)
            read = type(data.train).__getitem__
            type(data.train).__getitem__ = lambda split, index: read(split, (index + 1) % len(split))
            return data

        task.load = shift
    elif mistake == "sums instead of means":

        def add_up(self, *arguments):
            loss = add_gradients(self, *arguments)
            for parameter in self.bare_model.parameters():
                parameter.grad *= self.group.size
            return loss

        TrainingState._add_gradients = add_up
    elif mistake == "steps sharded twice":
        StepSampler.__iter__ = lambda self: islice(sample(self), rank, None, size) if self.dealt_to > 1 else sample(self)
    elif mistake == "samples sharded twice":

        def share_again(self):
            for batch in sample(self):
                yield replace(Batch.of(batch.indices[rank::size], batch.places[rank::size]), step=batch.step)

        StepSampler.__iter__ = lambda self: share_again(self) if self.dealt_to > 1 else sample(self)
    elif mistake == "random numbers of the step that follows":
        read = task.losses
        task.losses = lambda self, model, batch, drawn: read(self, model, (batch[0].roll(1, 0), batch[1]), drawn)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    run_ranks(folder, Verify((*SMALL, "--record", str(folder / "small.json"))))
    return folder / "small.json"


def find_out(folder, reference, mistake, world=2, expect=1):
    """What a verification finds: the findings by their names, and all that was printed."""
    text = run_ranks(
        folder, Verify((*SMALL, "--reference", str(reference), "--answer", str(folder / "a.json")), mistake), world, None, expect
    )
    findings = {finding.check: finding for finding in read_findings(folder / "a.json")}
    assert all(f"{one.word:5} {one.check}: {one.measured}" in text for one in findings.values() if "sharded twice" not in one.measured)
    return findings, text


NAME = f"on host {socket.gethostname()} ({'cuda:0' if torch.cuda.is_available() else 'cpu'}, "


def test_two_ranks_compute_what_one_has_recorded(tmp_path, reference):
    findings, text = find_out(tmp_path, reference, "", expect=0)
    assert [finding.word for finding in findings.values()] == ["ok", "ok"]
    assert "9 batches on 2 ranks, the same bits on all" in findings["gradients"].measured
    assert "21 steps on 2 processes" in findings["curve"].measured
    assert findings["gradients"].values["difference"] < GRADIENT_TOLERANCE / 10
    assert findings["curve"].values["difference"] < CURVE_TOLERANCE / 10
    assert text.count("ok    curve") == 1


@pytest.mark.parametrize("share", ["1e-3", "2e-5"])
def test_a_rank_with_wrong_gradients_is_named(tmp_path, reference, share):
    gradients = find_out(tmp_path, reference, f"a gradient off by {share}")[0]["gradients"]
    assert gradients.word == "WRONG"
    assert gradients.measured.startswith(f"rank 1 {NAME}")
    assert gradients.values["ranks"] == [1]
    assert gradients.values["difference"] == pytest.approx(float(share), rel=0.05)
    assert socket.gethostname() in gradients.next_step


def test_gradients_that_are_off_by_less_than_rounding_are_a_warning(tmp_path, reference):
    gradients = find_out(tmp_path, reference, "a gradient off by 1e-6", expect=0)[0]["gradients"]
    assert gradients.word == "WARN"
    assert "other bits than ranks of the same kind" in gradients.measured


def test_a_flipped_bit_is_named_by_the_recorded_weights_or_by_the_majority(tmp_path, reference):
    curve = find_out(tmp_path, reference, "bit 22")[0]["curve"]
    assert curve.word == "WRONG"
    assert f"rank 1 {NAME}" in curve.measured
    assert "had other weights than recorded after step 20" in curve.measured
    assert curve.values["weights_ranks"] == curve.values["ranks"] == [1]
    # The lowest bit, which no loss shows and no record.
    two = find_out(tmp_path / "two", reference, "bit 0")[0]["curve"]
    assert "differed after step 20" in two.measured
    assert "which are wrong is not known" in two.measured
    three = find_out(tmp_path / "three", reference, "bit 0", world=3)[0]["curve"]
    assert three.word == "WRONG"
    assert three.values["weights_ranks"] == three.values["ranks"] == [2]
    assert "had other weights than the rest after step 20" in three.measured


def test_a_shifted_share_is_named_with_the_sample_that_it_took(tmp_path, reference):
    findings, _ = find_out(tmp_path, reference, "a share shifted by one")
    assert findings["gradients"].word == "ok"
    curve = findings["curve"]
    assert curve.values["ranks"] == curve.values["parted_ranks"] == [1]
    assert curve.values["parted_step"] == 1
    assert curve.next_step == "look for a loader that is sharded twice, or data that are shifted"
    assert re.search(r"rank 1 on .* took other samples .*in step 1 6 of 6, the first of them sample \d+ in place of \d+", curve.measured)


def test_shifted_data_are_named(tmp_path, reference):
    findings, _ = find_out(tmp_path, reference, "data shifted by one")
    assert findings["gradients"].values["ranks"] == findings["curve"].values["ranks"] == [1]
    assert f"other data are on rank 1 {NAME}" in findings["gradients"].measured
    assert findings["gradients"].next_step == "give all hosts the same data, then run verify again"


def test_sums_in_place_of_means_are_told_from_a_wrong_rank(tmp_path, reference):
    findings, _ = find_out(tmp_path, reference, "sums instead of means")
    assert findings["gradients"].word == "ok"
    curve = findings["curve"]
    assert "is 2.0000 times the recorded one: is it a sum in place of a mean?" in curve.measured
    assert "all ranks went wrong in step" in curve.measured
    assert curve.values["ranks"] == []


def test_a_loader_that_is_sharded_twice_is_named(tmp_path, reference):
    findings, text = find_out(tmp_path, reference, "steps sharded twice")
    assert "got the samples of step 2 in step 1: is its loader sharded twice?" in findings["curve"].measured
    assert "Traceback" not in text
    findings, _ = find_out(tmp_path / "samples", reference, "samples sharded twice")
    assert "in step 1 the ranks took 6 samples together, and a batch has 12" in findings["curve"].measured


def test_a_mistake_that_all_ranks_share_leaves_the_record(tmp_path, reference):
    findings, _ = find_out(tmp_path, reference, "random numbers of the step that follows", world=1)
    assert findings["gradients"].word == findings["curve"].word == "WRONG"
    assert "all ranks are wrong: compare the versions" in findings["gradients"].next_step


@pytest.mark.slow
def test_a_task_whose_step_depends_on_the_world_needs_the_same_one_or_shards(tmp_path):
    record = ("--record", str(tmp_path / "one.json"))
    run_ranks(tmp_path, Verify((*SMALL, "--dropout", "0.5", *record)))
    text = run_ranks(tmp_path, Verify((*SMALL, "--dropout", "0.5", "--reference", str(tmp_path / "one.json"))), 2, expect=2)
    assert "recorded on 1 processes, and this start has 2" in text
    assert "draws random numbers: start as many, or record with --shards" in text
    sharded = (*SMALL, "--norm", "true", "--dropout", "0.5", "--shards", "4")
    run_ranks(tmp_path, Verify((*sharded, "--record", str(tmp_path / "sharded.json"))), 2)
    assert "ok    curve" in run_ranks(tmp_path, Verify((*sharded, "--reference", str(tmp_path / "sharded.json"))))


def test_other_options_code_or_data_than_recorded_are_refused_in_words(tmp_path, reference, capsys):
    def refuse(*arguments):
        assert main(arguments) == 2
        return capsys.readouterr().err

    given = ("--reference", str(reference))
    assert "batch_size: 12 there, 64 asked for" in refuse("--task", TASK, "--steps", "21", *given)
    assert "task: noisy_task there, mnist asked for" in refuse(*given)
    assert "no curve of task noisy_task comes with this package" in refuse(*SMALL)
    assert "precision has no use here: verify sets it itself" in refuse("--precision", "bf16")
    values = json.loads(reference.read_text())
    (tmp_path / "code.json").write_text(json.dumps(values | {"source": "noisy_task.py 0123456789ab"}))
    assert "other code of task" in refuse(*SMALL, "--reference", str(tmp_path / "code.json"))
    (tmp_path / "data.json").write_text(json.dumps(values | {"data": "0123456789abcdef"}))
    assert "recorded on other data" in run_ranks(tmp_path, Verify((*SMALL, "--reference", str(tmp_path / "data.json"))), 2, expect=2)


def test_a_file_that_is_no_reference_is_refused(tmp_path, reference, capsys):
    path, values = tmp_path / "bad.json", json.loads(reference.read_text())
    rows = values["samples"]
    mistaken = [
        [1.0, 2.0],  # the form before this one
        {},
        values | {"more": 1},
        values | {"version": 2},
        values | {"losses": values["losses"][:-1]},
        values | {"losses": [*values["losses"][:-1], "1"]},
        values | {"losses": [*values["losses"][:-1], values["losses"][-1] * 1.001]},
        values | {"samples": [rows[0][:-1], *rows[1:]]},
        values | {"gradients": values["gradients"][:-1]},
        values | {"first_gradient": values["first_gradient"][:-1]},
        values | {"rounding": -1.0},
        values | {"options": {"task": "x" * 5000}},
        values | {"made_on": {"processes": 2**70}},
    ]
    texts = [json.dumps(value) for value in mistaken] + ["", "[" * 100_000, "[NaN]", json.dumps(values).replace(str(rows[0][0]), "NaN")]
    texts.append(json.dumps(values).replace(str(rows[0][0]), "1" + "0" * 5000))
    for text in texts:
        path.write_text(text)
        assert main([*SMALL, "--reference", str(path)]) == 2, text[:80]
        assert f"the reference {path} is not valid" in capsys.readouterr().err
    os.mkfifo(tmp_path / "fifo")
    assert main([*SMALL, "--reference", str(tmp_path / "fifo")]) == main([*SMALL, "--reference", str(tmp_path / "absent")]) == 2


def test_nothing_is_overwritten(reference, tmp_path, capsys):
    for option in ("--record", "--answer"):
        assert main([*SMALL, option, str(reference)]) == main([*SMALL, option, str(tmp_path / "absent/a.json")]) == 2
        assert capsys.readouterr().err.count("expected a new name in an existing folder") == 2


READS_A_FILE = """
import numpy as np

from noisy_task import NoisyTask


class ReadsAFile(NoisyTask):
    class_names = tuple(np.load("names.npy"))
    folder: str = "data"

    def load(self):
        assert np.load(f"{self.folder}/count.npy") == 100
        return super().load()
"""


def test_a_task_may_open_files_of_the_folder_that_verify_is_called_in(tmp_path):
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "names.npy", NoisyTask.class_names)
    np.save(tmp_path / "data/count.npy", 100)
    (tmp_path / "reads.py").write_text(READS_A_FILE)
    arguments = ("--task", "reads.py", *SMALL[2:])
    run_ranks(tmp_path, Verify((*arguments, "--record", "reads.json"), folder=str(tmp_path)))
    names = {path.name for path in tmp_path.iterdir()}
    text = run_ranks(tmp_path / "logs", Verify((*arguments, "--reference", "reads.json"), folder=str(tmp_path)), 2)
    assert "ok    curve: 21 steps on 2 processes" in text
    assert {path.name for path in tmp_path.iterdir()} - {"logs", "__pycache__"} == names - {"__pycache__"} >= {"reads.json"}


@pytest.mark.slow
def test_the_curve_that_ships_is_met_and_can_be_recorded_again(tmp_path):
    text = run_ranks(tmp_path, Verify(()), 2)
    assert text.count("ok    gradients: 9 batches on 2 ranks") == text.count("ok    curve: 40 steps on 2 processes") == 1
    run_ranks(tmp_path, Verify(("--record", str(tmp_path / "curve.json"))))
    here, there = read_reference(tmp_path / "curve.json"), read_reference(SHIPPED)
    assert max(abs(a - b) / b for a, b in zip(here.losses, there.losses, strict=True)) < CURVE_TOLERANCE / 10
    assert (here.options, here.data, here.any_world) == (there.options, there.data, there.any_world)
    assert "ok    curve" in run_ranks(tmp_path, Verify(("--reference", str(tmp_path / "curve.json"))))


def test_the_distance_of_two_sketches_is_that_of_the_vectors():
    generator = torch.Generator().manual_seed(0)
    one = [torch.randn(50, 4096, generator=generator), torch.randn(7, generator=generator)]
    for share in (1e-3, 1e-6):
        other = [tensor * (1 + share) for tensor in one]
        assert measure_distance(take_fingerprint(other).sketch, take_fingerprint(one).sketch) == pytest.approx(share, rel=0.1)
    # What lies in one row, in one column, or in one number is as long.
    norm = sum(float(tensor.square().sum()) for tensor in one) ** 0.5
    for place in ((3, slice(None)), (slice(None), 3), (3, 3)):
        other = [one[0].clone(), one[1]]
        other[0][place] += 0.1
        length = float((other[0] - one[0]).norm()) / norm
        assert 0.5 < measure_distance(take_fingerprint(other).sketch, take_fingerprint(one).sketch) / length < 1.6
    assert measure_distance([float("nan")] * SKETCH, [1.0] * SKETCH) == float("inf")


def make_ranks(*offs, kinds="aaaaa"):
    """Ranks of some kinds of machine, whose gradients differ from the right ones by some parts of their norm."""
    sketches = [[(off + 1) * (place + 1) for place in range(SKETCH)] for off in offs]
    return [
        Rank(f"host{rank}", "cpu", kind, "data", [Fingerprint(str(off), sketch)] * BATCHES)
        for rank, (off, sketch, kind) in enumerate(zip(offs, sketches, kinds, strict=False))
    ]


@pytest.mark.parametrize(
    ("offs", "kinds", "word", "ranks"),
    [
        ((0, 0, 0), "aaa", "ok", []),
        ((0, 0, 1e-3), "aaa", "WRONG", [2]),
        ((1e-3, 0, 0, 1e-3, 0), "abcde", "WRONG", [0, 3]),
        ((0, 1e-7, 2e-7), "abc", "ok", []),
        ((0, 1e-7, 0), "aaa", "WARN", [1]),
        ((0, 1e-7), "aa", "WARN", [0, 1]),
        ((0, 1e-3), "aa", "WRONG", [0, 1]),
        ((0, float("nan"), 0), "abc", "WRONG", [1]),
    ],
)
def test_ranks_are_compared_without_a_record(offs, kinds, word, ranks):
    finding = compare_gradients(make_ranks(*offs, kinds=kinds), None, 1e-7)
    assert finding.word == word
    assert finding.values.get("ranks", []) == ranks
    assert all(f"rank {rank} on host host{rank}" in finding.measured for rank in ranks)


def test_a_batch_in_which_rounding_decides_otherwise_is_a_fault_only_among_ranks_that_round_alike():
    for kinds, word in (("abc", "ok"), ("aaa", "WRONG")):
        ranks = make_ranks(0, 0, 0, kinds=kinds)
        ranks[1].gradients[0] = Fingerprint("other", [value * 1.003 for value in ranks[1].gradients[0].sketch])
        assert compare_gradients(ranks, None, 1e-7).word == word


def test_a_wrong_rank_is_not_recorded(tmp_path):
    text = run_ranks(tmp_path, Verify((*SMALL, "--record", str(tmp_path / "wrong.json")), "a gradient off by 1e-3"), 2, expect=1)
    assert "which of these ranks is wrong is not known" in text
    assert not (tmp_path / "wrong.json").exists()


def test_findings_come_back_from_their_file_and_others_are_refused(tmp_path):
    findings = [Finding("curve", "ok", "all right"), Finding("gradients", "WRONG", "off", "test host a", {"ranks": [1]})]
    path = tmp_path / "findings.json"
    write_findings(path, findings)
    assert read_findings(path) == findings
    good = json.loads(path.read_text())
    for value in (
        {},
        [1],
        [good[0] | {"word": "FINE"}],
        [good[0] | {"more": 1}],
        [{"check": "curve"}],
        [good[0] | {"values": []}],
        "[" * 9999,
    ):
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(UserError, match="is not a list of findings"):
            read_findings(path)


def test_more_than_64_processes_are_compared_in_larger_batches():
    large = make_config(processes=72)
    assert [make_config(processes=size).batch_size for size in (1, 64, 65)] == [64, 64, 1024]
    assert make_config({"batch_size": 128}, processes=72).batch_size == make_config({}, {"batch_size": 128}, processes=72).batch_size == 128
    large.check_world(1024)
    path = find_shipped(large)
    read_reference(path).check_config(large, str(path))
    assert find_shipped(make_config()) == SHIPPED


@pytest.mark.slow
def test_the_file_for_more_than_64_processes_is_what_this_machine_computes(tmp_path):
    arguments = ("--batch_size", "1024", "--answer", str(tmp_path / "answer.json"))
    run_ranks(tmp_path, Verify(arguments), 2)
    assert {finding.word for finding in read_findings(tmp_path / "answer.json")} <= {"ok", "WARN"}


def test_of_a_fault_that_all_ranks_share_none_is_named():
    inspection = Inspection(make_config(), None, lambda _: None)
    inspection.config = inspection.config.replace(batch_size=4)
    inspection.reference = SimpleNamespace(losses=[1.0] * 3, samples=[[1.0] * 4] * 3, first_gradient=[1.0] * SKETCH)
    inspection.ranks = [Rank("ab"[rank // 2], "cpu", "kind", "data", []) for rank in range(4)]

    def judge(*differences, gradient=1.0):
        inspection._first_gradient = [gradient] * SKETCH
        steps = [Steps([1.0] * 3, [1] * 3, [1e-6, one, 0.1], "") for one in differences]
        return inspection._judge_curve(steps, [1.0] * 3)

    # A wrong average of step 1, say: each rank's samples show it by as much as they depend on it.
    shared = judge(4e-4, 2e-3, 1e-4, 9e-4)
    assert (shared.values["parted_step"], shared.values["ranks"]) == (2, [])
    assert shared.measured.endswith("all ranks went wrong in step 2: the loss of a sample is off by 2.0e-03 of the mean")
    alone = judge(2e-6, 2e-3, 1e-6, 5e-6)
    assert alone.values["ranks"] == [1]
    assert "rank 1 on host a (cpu, kind) went wrong first, in step 2" in alone.measured
    assert judge(1e-6, math.inf, 1e-6, math.inf).values["ranks"] == [1, 3]
    assert judge(2e-6, 2e-3, 1e-6, 5e-6, gradient=2.0).values["ranks"] == []  # what was exchanged is wrong


def test_only_the_losses_of_a_training_are_noted():
    class Penalty(Task):
        def losses(self, model, batch, drawn):
            with torch.enable_grad():  # of a gradient penalty, in an evaluation, too
                return model(batch).square().sum(1)

    noted = []
    task, model = watch_losses(Penalty, noted)(), torch.nn.Linear(2, 3)
    task.losses(model.train(), torch.ones(4, 2), None)
    task.losses(torch.nn.Linear(2, 3).train().requires_grad_(False), torch.ones(3, 2), None)  # samples that reach no parameter
    with torch.no_grad():
        task.losses(model.eval(), torch.ones(5, 2), None)
    assert [len(losses) for losses in noted] == [4, 3]
