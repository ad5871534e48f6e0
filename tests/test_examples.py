"""The examples: trained by the program as a reader would, with and without workers; evaluated, reported and exported."""

import json

import pytest
import torch
from cluster import ROOT
from pictures import write_classes
from processes import Programs, run_ranks
from test_documents import read_own_task

from mnist_dist.source import find_task

COLOURS = ["blue", "green", "red"]
RUN = ["--batch_size", "12", "--precision", "fp32", "--threads", "1", "--log_every", "1", "--wandb", "disabled", "--learning_rate", "0.002"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("pictures"))


def run_programs(folder, *lines, expect=0):
    return run_ranks(
        folder, Programs([[str(word) for word in line] for line in lines]), environ={"XDG_STATE_HOME": str(folder / "state")}, expect=expect
    )


def finish(folder, *options, measures, page):
    """Train with these options, and ask the run all that a run can be asked."""
    run = folder / "run"
    text = run_programs(
        folder,
        ["train", *RUN, *options, "--run_dir", run],
        ["evaluate", run, "--threads", "1", "--json"],
        ["evaluate", run, "--threads", "1"],
        ["export", run, folder / "model.pt2"],
        ["report", run],
    )
    result = json.loads((run / "result.json").read_text())
    evaluated = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    for name in measures:
        assert evaluated[f"test/{name}"] == pytest.approx(result[f"test/{name}"], rel=1e-5), name
    report = (run / "report.html").read_text()
    assert "Left out" not in report
    assert all(f">{title}</h2>" in report for title in page)
    return result, text


@pytest.mark.slow
def test_the_pictures_are_told_apart_and_the_run_can_be_asked_everything(tmp_path, pictures):
    options = ["--task", ROOT / "examples/image_folder.py", "--data_dir", pictures, "--arch", "mobilenet_v3_small", "--side", "32"]
    result, text = finish(tmp_path, *options, "--steps", "8", measures=("accuracy", "loss"), page=("Test pictures by class", "Predictions"))
    assert result["classes"] == COLOURS
    assert result["test/pictures"] == 15
    assert "this world" in text
    assert "as blue" in text  # the table of evaluate
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert program(torch.zeros(5, 3, 32, 32)).shape == (5, 3)


@pytest.mark.slow
def test_the_forecast_is_better_than_the_last_value(tmp_path):
    options = ["--task", ROOT / "examples/forecast.py", "--steps", "200", "--batch_size", "64", "--log_every", "50"]
    result, text = finish(tmp_path, *options, measures=("loss", "absolute_error", "skill"), page=("Forecasts",))
    assert result["test/skill"] > 0.3, text
    assert len(result["test/error_by_step"]) == 12
    assert result["test/error_by_step"][0] < result["test/error_by_step"][-1]
    assert (tmp_path / "run/plots/forecasts.png").read_bytes().startswith(b"\x89PNG")
    assert "any world" in text


@pytest.mark.slow
def test_workers_change_no_bit(tmp_path, pictures):
    options = ["--task", ROOT / "examples/image_folder.py", "--data_dir", pictures, "--arch", "mobilenet_v3_small", "--side", "32", *RUN]
    runs = [["train", *options, "--steps", "3", "--report", "false", "--run_dir", tmp_path / str(workers)] for workers in (0, 2)]
    other = ["train", *options, "--steps", "3", "--report", "false", "--run_dir", tmp_path / "other", "--seed", "1"]
    run_programs(tmp_path, runs[0], [*runs[1], "--workers", "2"], other)
    one, two, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("0", "2", "other"))
    assert one == two
    assert one != other


def test_data_in_memory_have_no_work_for_workers(tmp_path):
    line = ["train", "--task", ROOT / "examples/forecast.py", *RUN, "--steps", "2", "--workers", "2", "--run_dir", tmp_path / "run"]
    assert "keeps its data in memory" in run_programs(tmp_path, line, expect=2)


def test_pictures_that_cannot_be_trained_on_are_refused(tmp_path, pictures):
    line = ["train", "--task", ROOT / "examples/image_folder.py", *RUN, "--steps", "2", "--run_dir", tmp_path / "run"]
    assert "data_dir is none; expected the folder" in run_programs(tmp_path, line, expect=2)
    write_classes(tmp_path / "one", [("train", 4)])
    write_classes(tmp_path / "one", [("test", 4)], ("blue", "red"))
    assert "expected the same" in run_programs(tmp_path, [*line, "--data_dir", tmp_path / "one"], expect=2)
    broken = write_classes(tmp_path / "broken")
    for path in (broken / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    text = run_programs(tmp_path, [*line, "--data_dir", broken], expect=2)
    assert "cannot be read" in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["image_folder", "forecast"])
def test_an_example_is_short_and_its_class_is_found(name):
    path = ROOT / f"examples/{name}.py"
    assert len(path.read_text().splitlines()) < 60
    assert find_task(str(path))().short_name == name


def test_the_file_of_the_page_becomes_a_report(tmp_path):
    (tmp_path / "my_task.py").write_text(read_own_task())
    result, _ = finish(tmp_path, "--task", tmp_path / "my_task.py", "--steps", "50", measures=("loss",), page=("Curves",))
    assert result["test/loss"] < 10


def test_facts_that_no_file_could_hold_are_refused_before_the_training(tmp_path):
    wrong = "    def find_facts(self, train):\n        return {'mean': train[:][0].mean()}\n"
    (tmp_path / "my_task.py").write_text(f"{read_own_task()}\n{wrong}")
    text = run_programs(tmp_path, ["train", "--task", tmp_path / "my_task.py", *RUN, "--run_dir", tmp_path / "run"], expect=2)
    assert "find_facts returned {'mean': tensor(0.4" in text or "find_facts returned {'mean': tensor(0.5" in text
    assert "expected a dictionary of plain values" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_fact_may_have_the_name_of_a_value_of_the_result(tmp_path):
    (tmp_path / "my_task.py").write_text(
        f"{read_own_task()}\n    def find_facts(self, train):\n        return {{'step': -1, 'mean': 0.5}}\n"
    )
    options = ["--task", tmp_path / "my_task.py", "--steps", "2"]
    result, _ = finish(tmp_path, *options, measures=("loss",), page=("Curves",))
    assert (result["step"], result["mean"]) == (2, 0.5)
