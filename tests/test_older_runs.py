"""A run folder of the version before tasks, by its formats: it is resumed, finished, and read."""

import json
from dataclasses import dataclass

import pytest
import yaml
from processes import TINY, StopAt, Train, run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch.runs import read_state
from mnist_dist import checkpoint, evaluate, report
from mnist_dist.config import parse_command_line
from mnist_dist.record import read_run
from mnist_dist.weights import load_model

LATER_OPTIONS = ("task", "clip_norm", "workers", "micro_batch")
LATER_FACTS = ("tier", "best", "training_samples", "test_samples", "source")


@dataclass(frozen=True)
class StopAfterFour(Train):
    """A rank that is stopped in the course of step 4."""

    def __call__(self):
        from mnist_dist.loop import train

        return train(parse_command_line(self.arguments), StopAt(4)).stop.exit_code


def make_older(folder):
    """Turn what this version wrote into a run folder into what the one before would have written."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert {*LATER_OPTIONS} < {*config}
    (folder / "config.yaml").write_text(yaml.safe_dump({name: config[name] for name in config if name not in LATER_OPTIONS}))
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert {*LATER_FACTS} < {*starts[-1]}
    rows = [json.dumps({name: start[name] for name in start if name not in LATER_FACTS}) for start in starts]
    (folder / "starts.jsonl").write_text("\n".join([*rows, ""]))
    for path in checkpoint.list_newest_first(folder / "checkpoints"):
        state = checkpoint.decode(path.read_bytes())
        for fields, name in ((state["recipe"], "task"), (state["recipe"], "clip_norm"), (state, "world")):
            fields.pop(name, None)  # the one that this was resumed from lacks them already
        path.unlink()
        checkpoint.write(path.parent, state["step"], checkpoint.encode(state), keep=9)
    weights, result = folder / "model.safetensors", folder / "result.json"
    if result.exists():
        values = json.loads(result.read_text())
        del values["test/class_accuracy"]
        result.write_text(json.dumps(values))
        with safe_open(weights, "pt") as file:
            entries = json.loads(file.metadata()["mnist_dist"])
        save_file(load_file(weights), weights, metadata=entries)  # side by side, each under its own name


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    run_ranks(folder, Train([*TINY, "--run_dir", str(folder / "unbroken")]))
    arguments = [*TINY, "--run_dir", str(folder / "run")]
    run_ranks(folder, StopAfterFour(arguments), expect=85)
    make_older(folder / "run")
    text = run_ranks(folder, Train(arguments))
    assert "from step 4 of 10" in text
    assert "finished: test accuracy" in text
    assert "another" not in text  # no warning about its code
    assert (folder / "run/model.safetensors").read_bytes() == (folder / "unbroken/model.safetensors").read_bytes()
    make_older(folder / "run")
    return arguments, folder / "run"


def test_an_older_run_that_is_finished_stays_so_and_is_read(arguments, tmp_path):
    arguments, folder = arguments
    assert "is finished: test accuracy" in run_ranks(tmp_path, Train(arguments))
    run = read_run(folder)
    state = read_state(folder, [])
    assert (state.state, state.step, state.measure, state.best) == ("finished", 10, "test/accuracy", run.result["test/accuracy"])


def test_weights_and_report_and_evaluation_of_an_older_run(arguments, tmp_path, capsys):
    _, folder = arguments
    trained = load_model(folder)
    alone = load_model(folder / "model.safetensors")
    for facts in (trained.task.facts, alone.task.facts):
        assert facts["dataset"] == "synthetic"
        assert all(isinstance(facts[name], float) and 0 < facts[name] < 1 for name in ("mean", "std"))
    assert evaluate.main([str(folder)]) == 0
    assert f"{read_run(folder).result['test/accuracy']:.2%}" in capsys.readouterr().out
    assert report.main([str(folder)]) == 0
    assert "Test images by class" in (folder / "report.html").read_text()
