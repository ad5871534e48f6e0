"""What a finished run can be asked: what it gets right, on any number of processes, and for a file that others can load."""

import argparse
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import TINY, Train, run_ranks
from safetensors.torch import save_file
from torch import nn

from mnist_dist import evaluate, export
from mnist_dist.config import configure
from mnist_dist.errors import RunError
from mnist_dist.task import Export
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.tasks.mnist.augment import make_inputs
from mnist_dist.tasks.mnist.model import CNN, Classifier
from mnist_dist.weights import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run on 50 training and 30 test images."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(folder, Train([*TINY, "--run_dir", str(folder)]))
    return folder


@dataclass(frozen=True)
class EvaluateProgram:
    """The program with some arguments, as work for a rank."""

    arguments: tuple[str, ...]

    def __call__(self):
        return evaluate.main([*self.arguments, "--threads", "1"])


def read_answer(text):
    """The one JSON object that all ranks together have printed."""
    (line,) = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(line)


def test_every_world_counts_the_same_as_the_run_itself(tmp_path, run):
    result = json.loads((run / "result.json").read_text())
    for world in (1, 2, 3):
        answer = read_answer(run_ranks(tmp_path, EvaluateProgram((str(run), "--json")), world))
        assert answer["world_size"] == world
        assert answer["precision"] == "fp32"  # as the run was computed
        for name in ("test/confusion_matrix", "test/errors", "test/images", "test/accuracy"):
            assert answer[name] == result[name], name
        assert answer["test/loss"] == pytest.approx(result["test/loss"], rel=1e-6)


def test_one_process_counts_in_a_slurm_job_of_any_size(run, monkeypatch, capsys):
    for name, value in (("SLURM_JOB_ID", "1"), ("SLURM_NTASKS", "4"), ("SLURM_NNODES", "2")):
        monkeypatch.setenv(name, value)
    assert evaluate.main([str(run), "--json", "--threads", "1"]) == 0, capsys.readouterr().err
    answer = json.loads(capsys.readouterr().out)
    assert (answer["world_size"], answer["test/images"]) == (1, 30)


def test_the_measures_of_a_run_with_shards_are_the_same_bits(tmp_path):
    ragged = ["--task", str(Path(__file__).with_name("ragged_task.py")), "--masked", "0.2", "--dropout", "0.3", "--micro_batch", "4"]
    options = ["--batch_size", "12", "--steps", "3", "--shards", "3", "--threads", "1", "--report", "false", "--wandb", "disabled"]
    run_ranks(tmp_path, Train([*ragged, *options, "--run_dir", str(tmp_path / "run")]), 2)
    result = json.loads((tmp_path / "run/result.json").read_text())
    for world in (1, 3):
        answer = read_answer(run_ranks(tmp_path, EvaluateProgram((str(tmp_path / "run"), "--json")), world))
        assert answer["test/loss"] == result["test/loss"]


def test_samples_that_are_drawn_are_those_of_the_runs_seed(tmp_path):
    noisy = ["--task", str(Path(__file__).with_name("noisy_task.py")), "--batch_size", "12", "--steps", "2", "--seed", "5"]
    options = ["--precision", "fp32", "--threads", "1", "--report", "false", "--wandb", "disabled", "--run_dir", str(tmp_path / "run")]
    run_ranks(tmp_path, Train([*noisy, *options]))
    result = json.loads((tmp_path / "run/result.json").read_text())
    answer = read_answer(run_ranks(tmp_path, EvaluateProgram((str(tmp_path / "run"), "--json"))))
    assert answer["test/loss"] == result["test/loss"]


def test_what_a_task_prints_is_beside_the_answer(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    noisy, file = Path(__file__).with_name("noisy_task.py"), tmp_path / "talking_task.py"
    text = f"from mnist_dist.source import find_task\n\nprint('imported')\n\n\nclass Talking(find_task({str(noisy)!r})):\n"
    file.write_text(f"{text}    def load(self):\n        print('loaded')\n        return super().load()\n")
    options = ["--batch_size", "12", "--steps", "2", "--threads", "1", "--report", "false", "--wandb", "disabled"]
    run_ranks(tmp_path, Train(["--task", str(file), *options, "--run_dir", str(tmp_path / "run")]))
    assert evaluate.main([str(tmp_path / "run"), "--task", str(file), "--json", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["test/samples"] == 31
    assert {"imported", "loaded"} <= set(err.splitlines())


def test_the_training_images_are_those_of_the_run_and_a_bare_file_means_all_images(run, capsys):
    assert evaluate.main([str(run), "--split", "train", "--json", "--threads", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    labels = Mnist(dataset="synthetic").load().train.tensors[1][:26]
    assert [sum(row) for row in answer["train/confusion_matrix"]] == labels.bincount(minlength=10).tolist()
    assert answer["train/images"] == 26
    assert evaluate.main([str(run / "model.safetensors"), "--precision", "fp32", "--threads", "1"]) == 0
    assert "1,024 test images of synthetic, fp32 on 1 x cpu" in capsys.readouterr().out


def test_the_table_says_what_the_json_says(run, capsys):
    options = [str(run), "--threads", "1"]
    evaluate.main([*options, "--json"])
    answer = json.loads(capsys.readouterr().out)
    evaluate.main(options)
    lines = capsys.readouterr().out.splitlines()
    assert f"accuracy {answer['test/accuracy']:.2%} ({answer['test/errors']} of 30 wrong), loss {answer['test/loss']:.4f}" in lines[1]
    rows = [line.split() for line in lines[-10:]]
    assert [[int(cell.replace(".", "0")) for cell in row[1:11]] for row in rows] == answer["test/confusion_matrix"]
    for label, row in enumerate(rows):
        accuracy = answer["test/class_accuracy"][label]
        assert [row[0], row[11]] == [str(label), str(sum(answer["test/confusion_matrix"][label]))]
        assert row[-1] == ("-" if accuracy is None else f"{accuracy:.2%}")
    assert len({len(line) for line in lines[-11:]}) == 1


def test_a_class_without_images_has_no_accuracy():
    confusion = torch.zeros(10, 10, dtype=torch.float64)
    confusion[3, 3], confusion[3, 5] = 2, 1
    measures = Mnist().measure(torch.cat([torch.tensor([3, 1.5]), confusion.flatten()]))
    assert json.loads(json.dumps(measures))["class_accuracy"] == [None] * 3 + [2 / 3] + [None] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a run folder nor a file of weights"),
        (["RUN", "--split", "half"], "'half'"),
        (["RUN", "--threads", "many"], "threads is 'many'"),
        (["RUN", "--data_dir", "here"], "synthetic, which comes with the package"),
        (["RUN", "--device", "cuda"], "device is cuda"),
        (["RUN", "--pecision", "fp32"], "--pecision"),
        (["clothes.safetensors"], "fashion_mnist needs data_dir"),
        (["clothes.safetensors", "--data_dir", "empty"], "fashion_mnist lacks train-images-idx3-ubyte"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, monkeypatch, capsys, run, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save_file(CNN().state_dict(), "clothes.safetensors", {"dataset": "fashion_mnist", "mean": "0.3", "std": "0.3"})
    assert evaluate.main([str(run) if argument == "RUN" else argument for argument in arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert len(output.err.splitlines()) == 1
    assert output.out == ""


def test_a_run_folder_that_lost_its_config_is_refused(tmp_path, capsys, run):
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert evaluate.main([str(tmp_path)]) == 2
    assert "config.yaml cannot be read" in capsys.readouterr().err


def compute_log_probabilities(run, pixels):
    trained = load_model(run)
    with torch.no_grad():
        return trained.model((pixels - trained.task.facts["mean"]) / trained.task.facts["std"]).log_softmax(1)


@pytest.mark.filterwarnings("error::UserWarning", "ignore:The given buffer is not writable")  # torch 2.10's own
def test_an_exported_file_gives_what_the_model_gives_for_any_number_of_images(tmp_path, run, capsys):
    file = tmp_path / "model.pt2"
    assert export.main([str(run), str(file)]) == 0
    text = capsys.readouterr().out
    assert f"{file.stat().st_size:,} bytes" in text
    assert "float32 [n, 1, 28, 28]" in text
    module = torch.export.load(file).module()
    images, _ = Mnist(dataset="synthetic").load().test.tensors
    for size in (1, 2, 7, 500):
        pixels = images[-size:].unsqueeze(1).float() / 255
        torch.testing.assert_close(module(pixels), compute_log_probabilities(run, pixels), rtol=1e-4, atol=1e-4)
    # The normalisation is in the file: the same as the package's own.
    trained = load_model(run)
    expected = trained.model(make_inputs(images[:7], trained.task.facts["mean"], trained.task.facts["std"])).argmax(1)
    assert torch.equal(module(images[:7].unsqueeze(1) / 255).argmax(1), expected)


def test_an_existing_file_is_overwritten_only_on_demand(tmp_path, run, capsys):
    file = tmp_path / "model.pt2"
    file.write_text("precious")
    assert export.main([str(run), str(file)]) == 2
    assert "--force" in capsys.readouterr().err
    assert file.read_text() == "precious"
    assert export.main([str(run), str(file), "--force"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    torch.export.load(file)


def test_an_export_that_differs_from_the_model_is_not_written(tmp_path, monkeypatch, capsys, run):
    planted = Classifier(CNN(), 0.5, 0.5)  # the planted fault: other weights end up in the file
    to_pt2 = export.to_pt2
    monkeypatch.setattr(export, "to_pt2", lambda exported: to_pt2(exported._replace(module=planted)))
    assert export.main([str(run), str(tmp_path / "model.pt2")]) == 1
    assert "differs from the model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_large_outputs_may_differ_in_their_last_digits_from_those_of_the_export():
    example = torch.rand(5, 3) + 1
    assert export.check_export(lambda x: 3e5 * x, lambda x: 3e5 * x * (1 + 1e-5), example) > 1
    with pytest.raises(RunError, match=r"differs from the model by .*, allowed [3-6]e\+01"):
        export.check_export(lambda x: 3e5 * x, lambda x: 3e5 * x * (1 + 1e-3), example)


def test_the_config_of_a_run_from_somebody_else_downloads_nothing(tmp_path):
    config = configure(dataset="kmnist", download="true", data_dir=str(tmp_path / "data"), run_dir=str(tmp_path))
    options = argparse.Namespace(run=str(tmp_path), **dict.fromkeys(evaluate._GIVEN))
    assert evaluate._make_config(options, config).task.download is False


class Branching(nn.Module):
    def forward(self, inputs):
        return inputs if inputs.sum() > 0 else -inputs


class Counting(nn.Module):
    def forward(self, inputs):
        return inputs + torch.arange(len(inputs)).unsqueeze(1)


@pytest.mark.parametrize(
    ("module", "example", "words"),
    [
        (Counting(), torch.zeros(3, 2), "write x.shape[0] for len(x)"),
        (nn.Bilinear(2, 2, 2), torch.zeros(3, 2), "as the model was called with the example of export: TypeError: "),
        (Branching(), torch.zeros(3, 2), "as model.pt2 was made of its model: "),
        (nn.Identity(), {"words": torch.zeros(3, 2)}, "the example of export is dict; expected a tensor"),
        (
            nn.LSTM(2, 2),
            torch.zeros(3, 2),
            "for 2 samples the model to export gives a tuple; expected one tensor with a row for each sample",
        ),
        (nn.Flatten(0), torch.zeros(3, 2), "for 2 samples the model to export gives a tensor [4]; expected one tensor"),
    ],
    ids=[
        "a batch size that is a plain number",
        "another number of inputs",
        "a branch that depends on the data",
        "no tensor",
        "two outputs",
        "one output for all",
    ],
)
def test_a_model_that_cannot_be_exported_is_one_message(tmp_path, monkeypatch, capsys, run, module, example, words):
    monkeypatch.setattr(Mnist, "export", lambda self, model, data: Export(module, example))
    assert export.main([str(run), str(tmp_path / "model.pt2")]) == 2
    *_, line = capsys.readouterr().err.splitlines()  # torch may say more before
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "model.pt2").exists()


def test_an_export_of_wrong_shape_or_without_a_number_is_found():
    classifier = Classifier(CNN(), 0.5, 0.5)
    pixels = torch.rand(3, 1, 28, 28)
    assert export.check_export(classifier, lambda part: classifier(part).detach(), pixels) < 1e-5
    for wrong in (lambda part: classifier(part)[:, :1].detach(), lambda part: classifier(part).detach() * float("nan")):
        with pytest.raises(RunError, match="nothing was written"):
            export.check_export(classifier, wrong, pixels)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.bin", "ends in .pt2 or .onnx"),
        ("nowhere/model.pt2", "existing folder"),
        ("folder.pt2", "which is a folder"),
        ("\u65e5" * 80 + ".pt2", "has 244 bytes; expected at most 200"),
        ("closed/model.pt2", "whose folder may not be written to"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.pt2").mkdir()
    Path("closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, *_: Path(path).name != "closed")  # root may write everywhere
    assert export.main(["no run is looked for", name]) == 2
    assert message in capsys.readouterr().err


def test_onnx_without_its_packages_names_what_to_install(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name.startswith("onnx") else find(name, *rest))
    assert export.main(["no run is looked for", str(tmp_path / "model.onnx")]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err


def test_onnx_gives_what_the_model_gives(tmp_path, run):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    file = tmp_path / "model.onnx"
    assert export.main([str(run), str(file)]) == 0
    evaluator = ReferenceEvaluator(onnx.load(file))
    for size in (1, 5):
        pixels = torch.rand(size, 1, 28, 28)
        (output,) = evaluator.run(["log_probabilities"], {"pixels": pixels.numpy()})
        np.testing.assert_allclose(output, compute_log_probabilities(run, pixels).numpy(), atol=1e-4)


def test_a_run_with_held_out_images_is_evaluated_on_them_and_the_program_counts_either(run, tmp_path, capsys):
    folder = tmp_path / "held"
    text = run_ranks(tmp_path, Train([*TINY, "--train_size", "74", "--test_size", "none", "--holdout", "24", "--run_dir", str(folder)]))
    assert "held-out accuracy" in text
    result = json.loads((folder / "result.json").read_text())
    assert result["holdout/images"] == 24
    assert not any(name.startswith("test/") for name in result)  # one name, one number
    assert evaluate.main([str(folder), "--split", "holdout", "--json", "--threads", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["holdout/confusion_matrix"] == result["holdout/confusion_matrix"]
    assert evaluate.main([str(folder), "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["test/images"] == 1_024
    assert evaluate.main([str(run), "--split", "holdout"]) == 2
    assert "has set no images apart; allowed: test, train" in capsys.readouterr().err
