"""The recorded curve: any right world meets it, and the mistakes it is for do not."""

import json
import os
from dataclasses import dataclass
from importlib import resources

import pytest
from processes import run_ranks

from mnist_dist.config import make_config as config_of
from mnist_dist.errors import RunError
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.verify import TOLERANCE, compare, main, make_config, verify

REFERENCE = json.loads((resources.files("mnist_dist.tasks.mnist") / "reference.json").read_text())


def test_two_ranks_meet_the_recorded_curve(tmp_path):
    text = run_ranks(tmp_path, verify, 2)
    assert text.count("right: 40 steps") == 1
    assert "in a world of 2" in text


class AStepLate(Mnist):
    """The built-in task, with the augmentation of the step that follows."""

    def draw(self, seed, step, size):
        return super().draw(seed, step + 1, size)


AStepLate.name = "mnist"


@dataclass(frozen=True)
class Mistaken:
    """A training with a mistake that a cluster's set-up or a change of the code could make."""

    run_dir: str
    mistake: str

    def __call__(self):
        from mnist_dist.loop import train

        config = make_config(self.run_dir)
        if self.mistake == "gradients are summed, not averaged":
            config = config.replace(learning_rate=2 * config.learning_rate)
        elif self.mistake == "augmentation of another step":
            config = config_of(config.values(), task=AStepLate)
        train(config)


@pytest.mark.parametrize(
    "mistake", ["augmentation of another step", pytest.param("gradients are summed, not averaged", marks=pytest.mark.slow)]
)
def test_a_mistake_leaves_the_recorded_curve(tmp_path, mistake):
    run_ranks(tmp_path, Mistaken(str(tmp_path / "run"), mistake))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    with pytest.raises(RunError, match=r"the loss of step \d+ is .* does not train right"):
        compare([row["train/loss"] for row in rows], REFERENCE)


def test_what_is_compared():
    assert "largest relative difference to the recorded curve 0.0e+00" in compare(REFERENCE, REFERENCE)
    off = [*REFERENCE[:-1], REFERENCE[-1] * (1 + 2 * TOLERANCE)]
    for losses in (off, [*REFERENCE[:-1], float("nan")], REFERENCE[:-1]):
        with pytest.raises(RunError):
            compare(losses, REFERENCE)


@pytest.mark.slow
def test_the_curve_that_ships_can_be_recorded_again_and_another_be_compared_with(tmp_path):
    run_ranks(tmp_path, Main(("--record", str(tmp_path / "curve.json"))), 2)
    recorded = json.loads((tmp_path / "curve.json").read_text())
    assert compare(recorded, REFERENCE)
    assert "right: 40 steps" in run_ranks(tmp_path, Main(("--reference", str(tmp_path / "curve.json"))))
    recorded[7] *= 1.001
    (tmp_path / "other.json").write_text(json.dumps(recorded))
    assert "the loss of step 8 is" in run_ranks(tmp_path, Main(("--reference", str(tmp_path / "other.json"))), expect=1)


def test_a_curve_that_is_none_or_would_be_overwritten_is_refused(tmp_path, capsys):
    (tmp_path / "curve.json").write_text("[1, 2]")
    assert main(["--record", str(tmp_path / "curve.json")]) == main(["--record", str(tmp_path / "absent/curve.json")]) == 2
    assert "expected a new name in an existing folder" in capsys.readouterr().err
    for text in ("[]", "{}", "[1, NaN]", '["1"]', "[" * 100_000, "[-1]", "[1" + "0" * 5000 + "]"):
        (tmp_path / "curve.json").write_text(text)
        assert main(["--reference", str(tmp_path / "curve.json")]) == 2
        assert "is not a list of losses" in capsys.readouterr().err
    os.mkfifo(tmp_path / "fifo")
    assert main(["--reference", str(tmp_path / "fifo")]) == main(["--reference", str(tmp_path / "absent")]) == 2


@dataclass(frozen=True)
class Main:
    """The program with some arguments."""

    arguments: tuple[str, ...]

    def __call__(self):
        return main(self.arguments)
