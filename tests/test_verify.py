"""The recorded curve: any right world meets it, and the mistakes it is for do not."""

import json
from dataclasses import dataclass
from importlib import resources

import pytest
from processes import run_ranks

from mnist_dist.errors import RunError
from mnist_dist.verify import TOLERANCE, compare, make_config, verify

REFERENCE = json.loads((resources.files("mnist_dist") / "reference.json").read_text())


def test_two_ranks_meet_the_recorded_curve(tmp_path):
    text = run_ranks(tmp_path, verify, 2)
    assert text.count("right: 40 steps") == 1
    assert "in a world of 2" in text


@dataclass(frozen=True)
class Mistaken:
    """A training with a mistake that a cluster's set-up or a change of the code could make."""

    run_dir: str
    mistake: str

    def __call__(self):
        from mnist_dist import loop

        config = make_config(self.run_dir)
        if self.mistake == "gradients are summed, not averaged":
            config = config.model_copy(update={"learning_rate": 2 * config.learning_rate})
        elif self.mistake == "augmentation of another step":
            draw = loop.draw_transforms
            loop.draw_transforms = lambda config, step: draw(config, step + 1)
        loop.train(config)


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
