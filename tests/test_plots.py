"""The pictures and the report of a run: made from its folder alone, complete, legible, and with one clear message where that cannot be."""

import base64
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import TINY, Programs, Train, run_ranks
from torch.utils.data import TensorDataset

from mnist_dist import plots, report
from mnist_dist.config import configure
from mnist_dist.data import load_data
from mnist_dist.errors import UserError
from mnist_dist.figures import calm
from mnist_dist.figures import render as to_png
from mnist_dist.plots import draw_comparison, draw_curves, draw_run
from mnist_dist.reader import read_on
from mnist_dist.record import read_run
from mnist_dist.task import Panel, format_measure
from mnist_dist.tasks.figures import Predictions, draw_confusion, draw_correct, draw_grid, draw_incorrect
from mnist_dist.tasks.mnist import DIGITS, Mnist
from mnist_dist.tasks.mnist.augment import augment, draw_transforms
from mnist_dist.tasks.mnist.pictures import draw_augmented_sample, draw_data_sample
from mnist_dist.weights import load_model

FASHION = Mnist(dataset="fashion_mnist", data_dir="files").class_names
NAMES = {"curves", "confusion_matrix", "data_sample", "augmented_sample", "correct_classification", "incorrect_classification"}


@dataclass(frozen=True)
class TrainAndReport(Train):
    """A training whose process then writes the report, and tells whether that imported pyplot."""

    folder: Path

    def __call__(self):
        code = super().__call__()
        report.write_report(self.folder)
        (self.folder.parent / "has_pyplot").write_text(str("matplotlib.pyplot" in sys.modules))
        return code


PICTURED = ["--train_size", "50", "--batch_size", "12"]  # enough samples for every picture to be full


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a tiny run, with its pictures and its report. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run_ranks(folder.parent, TrainAndReport([*TINY, *PICTURED, "--label_smoothing", "0.1", "--run_dir", str(folder)], folder))
    return folder


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the same run, without pictures and report."""
    folder = tmp_path / "tiny"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("plots", "report.html"))
    return folder


def render(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.array(Image.open(buffer).convert("RGB"))


def read_texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_finished_run_gets_all_pictures_and_none_is_blank(finished):
    paths = sorted((finished / "plots").iterdir())
    assert {path.name for path in paths} == {f"{name}.png" for name in NAMES}
    for path in paths:
        image = Image.open(path)
        assert image.format == "PNG"
        assert 1000 <= image.width <= 1500
        assert 250 <= image.height <= 1500
        pixels = np.array(image.convert("L"))
        assert 0.04 < (pixels < 250).mean() < 0.95
        assert len(np.unique(pixels)) > 20


def test_no_global_state_of_matplotlib_is_used(finished):
    assert (finished.parent / "has_pyplot").read_text() == "False"


def test_the_pictures_come_from_the_weights_and_the_data_of_the_run(finished):
    run = read_run(finished)
    config, data = load_data(run.config)
    images, labels = data.test.tensors
    predictions = Predictions.collect(config.task, load_model(finished).model, read_on(data.test, config, torch.device("cpu")))
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts.index_put_((labels, predictions.classes), torch.tensor(1), accumulate=True)
    assert counts.tolist() == run.result["test/confusion_matrix"]
    picture = np.array(Image.open(finished / "plots" / "incorrect_classification.png").convert("RGB"))
    assert (picture == render(draw_incorrect(images.__getitem__, predictions, DIGITS))).all()


def test_predicting_leaves_the_model_as_it_was():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10), torch.nn.Dropout(0.99))
    images, labels = torch.randint(256, (700, 28, 28), dtype=torch.uint8), torch.arange(700) % 10
    task = Mnist().with_facts({"mean": 0.5, "std": 0.5})
    predictions = Predictions.collect(task, model, zip(images.split(500), labels.split(500), strict=True))
    assert model.training
    expected = model[:2]((images.unsqueeze(1) / 255 - 0.5) / 0.5).softmax(dim=1).max(dim=1)
    assert torch.equal(predictions.labels, labels)
    assert torch.equal(predictions.classes, expected.indices)
    torch.testing.assert_close(predictions.probabilities, expected.values)


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_a_grid_shows_every_pixel(kind):
    # Neither black nor white is in them: a grid that stretched their contrast would show other greys.
    images = torch.randint(40, 200, (13, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = render(draw_grid(images if kind == "uint8" else images.float() / 255, ["a"] * 13, "title"))
    cell = picture[18 * 4 :, 6 * 4 :][: 28 * 4, : 28 * 4, 0]
    for row in range(4):
        assert np.abs(cell[row::4, ::4].astype(int) - images[0].numpy().astype(int)).max() <= 1
    cell = picture[18 * 4 :, (6 + 2 * 34) * 4 :][: 28 * 4, : 28 * 4, 0]
    assert np.abs(cell[1::4, 2::4].astype(int) - images[2].numpy().astype(int)).max() <= 1


def test_a_grid_needs_a_caption_for_each_image():
    with pytest.raises(ValueError):
        draw_grid(torch.zeros(3, 28, 28), ["one", "two"], "title")


def test_the_data_sample_shows_each_class_and_copes_with_missing_ones():
    split = Mnist(dataset="synthetic").load().train
    images, _ = split.tensors
    assert read_texts(draw_data_sample(split, DIGITS))[:-2] == [str(i % 10) for i in range(50)]
    few = TensorDataset(images[:4], torch.tensor([7, 2, 7, 2]))
    figure = draw_data_sample(few, FASHION)
    assert read_texts(figure)[:4] == ["Pullover", "Sneaker", "Pullover", "Sneaker"]
    assert (figure.axes[0].images[1].get_array() == images[0].numpy()).all()


def test_the_augmented_sample_is_what_the_augmentation_of_the_task_makes():
    task = Mnist(dataset="synthetic", rotation=30)
    split = task.load().train
    second = split.tensors[0][1]
    images = [image.get_array() for image in draw_augmented_sample(split, task.limits).axes[0].images]
    expected = augment(second.expand(10, -1, -1), draw_transforms(task.limits, 0, 0, 50)[10:20])
    assert (images[10] == second.numpy() / np.float32(255)).all()
    assert all((image == variant.numpy()).all() for image, variant in zip(images[11:20], expected[1:, 0], strict=True))
    plain = Mnist(dataset="synthetic", rotation=0, shear=0, scale=0, shift=0)
    images = [image.get_array() for image in draw_augmented_sample(split, plain.limits).axes[0].images]
    assert np.abs(images[19] - images[10]).max() < 1e-4


def read_grey(place):
    """The picture of a sample that shows by its grey which one it is."""
    return torch.full((28, 28), place, dtype=torch.uint8)


def test_wrong_predictions_come_hardest_first():
    probabilities = torch.tensor([0.99, 0.5, 0.98, 0.9, 0.3, 0.9, 0.97, 0.7])
    predictions = Predictions(torch.arange(8), torch.tensor([0, 9, 2, 9, 9, 9, 6, 9]), probabilities)
    assert predictions.find_hardest().tolist() == [3, 5, 7, 1, 4]  # of equal ones, the first first
    figure = draw_incorrect(read_grey, predictions, DIGITS)
    assert read_texts(figure)[:5] == ["3 → 9\n90.0%", "5 → 9\n90.0%", "7 → 9\n70.0%", "1 → 9\n50.0%", "4 → 9\n30.0%"]
    assert [image.get_array()[0, 0] for image in figure.axes[0].images] == [3, 5, 7, 1, 4]
    assert "5 of 8" in read_texts(figure)[-1]
    figure = draw_correct(read_grey, predictions, DIGITS)
    assert read_texts(figure)[:3] == ["0\n99.0%", "2\n98.0%", "6\n97.0%"]
    assert [image.get_array()[0, 0] for image in figure.axes[0].images] == [0, 2, 6]
    assert read_texts(draw_incorrect(read_grey, predictions, FASHION))[0] == "Dress\n→ Boot\n90.0%"


def test_names_of_classes_are_shown_as_they_are_and_in_their_place():
    names = ["$1-$2", "cost $\\frac$ each", "class number 11", "class number 12", "\u65e5\u672c"]
    figure = draw_incorrect(read_grey, Predictions(torch.arange(5), (torch.arange(5) + 1) % 5, torch.ones(5)), names)
    assert [text.split("\n")[0] for text in read_texts(figure)[:5]] == [
        "$1-$2",
        "cost \u2026each",
        "class\u2026r 11",
        "class\u2026r 12",
        names[4],
    ]
    matrix = draw_confusion([[1] * 5] * 5, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_png(figure).startswith(b"\x89PNG")
        assert to_png(matrix).startswith(b"\x89PNG")
    labels = matrix.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == names
    columns = [matrix.axes[0].transData.transform((place, 0))[0] for place in range(5)]
    for label, column in zip(labels, columns, strict=True):  # it ends below its own column
        assert abs(label.get_window_extent().x1 - column) < (columns[1] - columns[0]) / 4


def test_the_lowest_panel_of_each_column_has_numbers_below_it(monkeypatch):
    rows, curves = [{"step": 1, "train/loss": 1.0, "train/learning_rate": 0.1}], plots.list_curves([], configure())
    for count, lowest in ((3, [False, True, True]), (4, [False, False, True, True])):
        monkeypatch.setattr(plots, "list_curves", lambda *_, count=count: curves[:count])
        figure = draw_curves(rows, configure())
        render(figure)
        panels = [axes for axes in figure.axes if axes.axison]
        assert [any(label.get_visible() and label.get_text() for label in axes.get_xticklabels()) for axes in panels] == lowest


def test_of_many_wrong_predictions_the_hardest_are_shown():
    labels = torch.arange(120) % 10
    figure = draw_incorrect(read_grey, Predictions(labels, (labels + 1) % 10, torch.arange(120) / 120), DIGITS)
    assert [image.get_array()[0, 0] for image in figure.axes[0].images] == list(range(119, 69, -1))
    assert "120 of 120, of which the 50 most confident" in read_texts(figure)[-1]


def test_no_wrong_or_no_right_prediction_is_said():
    labels = torch.arange(5)
    all_right, all_wrong = Predictions(labels, labels, torch.ones(5)), Predictions(labels, labels + 1, torch.ones(5))
    assert read_texts(draw_incorrect(read_grey, all_right, DIGITS)) == ["Wrong predictions", "None: all 5 are right."]
    assert read_texts(draw_correct(read_grey, all_wrong, DIGITS)) == ["Right predictions", "None: all 5 are wrong."]
    assert (render(draw_incorrect(read_grey, all_right, DIGITS)) < 250).any()


def test_the_curves_show_the_rows():
    rows = [{"step": step, "train/loss": 2.0 / step, "train/learning_rate": 0.1} for step in (50, 100, 150)]
    rows[1] |= {"test/loss": 0.5, "test/accuracy": 0.75}
    figure = draw_curves(rows, configure())
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Training loss", "Test loss", "Test accuracy", "Learning rate"]
    lines = [axes.lines[0].get_xydata().tolist() for axes in figure.axes]
    assert lines[0] == [[50, 2 / 50], [100, 2 / 100], [150, 2 / 150]]
    assert lines[1:3] == [[[100, 0.5]], [[100, 0.75]]]
    assert figure.axes[1].lines[0].get_marker() == "o"  # a line of one point would be invisible
    assert figure.axes[2].get_title(loc="right") == "last 75.00%"
    assert read_texts(figure) == []


@pytest.mark.parametrize("rows", [[], [{"step": 7, "train/loss": float("nan"), "train/learning_rate": 1e-7}]])
def test_few_or_odd_rows_are_drawn_all_the_same(rows):
    figure = draw_curves(rows, configure())
    assert render(figure).std() > 0
    assert read_texts(figure) == ["not measured yet"] * (2 if rows else 4)


def test_one_error_is_seen_beside_a_large_diagonal():
    confusion = [[10_000 * (true == predicted) for predicted in range(10)] for true in range(10)]
    confusion[5][3], confusion[9][4] = 1, 2
    colours = draw_confusion(confusion, DIGITS).axes[0].images[0].get_array()
    assert len({tuple(colours[i, i]) for i in range(10)}) == 1
    zero, one, two, right = (colours[cell][:3].sum() for cell in ((3, 5), (5, 3), (9, 4), (5, 5)))
    assert zero == 3  # white
    assert two < one < zero - 0.3
    assert two < right - 0.3
    assert colours[5, 5][2] > colours[5, 5][0]  # bluish: no shade of the errors
    texts = read_texts(draw_confusion(confusion, DIGITS))
    assert (texts[5 * 10 + 3], texts[3 * 10 + 5], texts[55]) == ("1", "", "10,000")


def test_the_program_prints_what_it_wrote(run_dir, capsys):
    assert plots.main([str(run_dir)]) == 0
    output = capsys.readouterr()
    assert sorted(output.out.split()) == sorted(str(run_dir / "plots" / f"{name}.png") for name in NAMES)
    assert output.err == ""


def test_of_an_unfinished_run_the_rest_is_drawn(run_dir, capsys):
    (run_dir / "result.json").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "tra')  # the row that is being written
    assert [row["step"] for row in read_run(run_dir).rows] == list(range(1, 11))
    assert report.main([str(run_dir)]) == 0
    output = capsys.readouterr()
    assert output.out.split() == [str(run_dir / "report.html")]
    assert output.err == "left out what the model makes of its samples: the run is not finished\n"
    assert {path.stem for path in (run_dir / "plots").iterdir()} == {"curves", "data_sample", "augmented_sample"}
    page = Page((run_dir / "report.html").read_text())
    assert "Not finished: the record ends at step 10 of 10." in page.text
    assert "the run is not finished" in page.text
    assert len(page.pictures) == 3


def test_where_the_data_set_is_not_there_the_rest_is_drawn_and_nothing_is_fetched(run_dir, capsys, monkeypatch):
    asked = []

    def load(*arguments):
        asked.append(arguments)
        raise UserError("no such files")

    monkeypatch.setattr("mnist_dist.tasks.mnist.data.load_dataset", load)
    (run_dir / "config.yaml").write_text(configure(dataset="fashion_mnist", data_dir="nowhere", download=True).to_yaml())
    assert plots.main([str(run_dir)]) == 0
    assert asked == [("fashion_mnist", "nowhere", False)]
    assert "no such files" in capsys.readouterr().err
    assert {path.stem for path in (run_dir / "plots").iterdir()} == {"curves", "confusion_matrix"}
    (run_dir / "result.json").unlink()
    (run_dir / "metrics.jsonl").unlink()
    assert plots.main([str(run_dir)]) == 2
    assert "error: left out curves: metrics.jsonl has no rows yet" in capsys.readouterr().err


def without(path, name):
    values = json.loads(path.read_text())
    del values[name]
    return json.dumps(values)


DAMAGES = {
    "no config": ("config.yaml", lambda path: None, "is not a run folder"),
    "an unknown option": ("config.yaml", lambda path: path.read_text() + "epoch: 3\n", "no option 'epoch'"),
    "a row that is no JSON": ("metrics.jsonl", lambda path: path.read_text().replace("}", "", 1), "line 1 "),
    "a row without a step": ("metrics.jsonl", lambda path: '{"step": 1}\n{"loss": 1}\n', "line 2 "),
    "a start that is no object": ("starts.jsonl", lambda path: "[]\n", "line 1 "),
    "an empty result": ("result.json", lambda path: "", "no valid step"),
    "a result without its loss": ("result.json", lambda path: without(path, "test/loss"), "no valid test/loss"),
    "a result without its matrix": ("result.json", lambda path: without(path, "test/confusion_matrix"), "no valid test/confusion_matrix"),
    "no weights": ("model.safetensors", lambda path: None, "holds no model.safetensors"),
    "torn weights": ("model.safetensors", lambda path: "torn", "is not a valid .safetensors file"),
}


@pytest.mark.parametrize("main", [plots.main, report.main], ids=["plots", "report"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_message_and_nothing_is_written(run_dir, capsys, damage, main):
    name, change, message = DAMAGES[damage]
    content = change(run_dir / name)
    (run_dir / name).unlink()
    if content is not None:
        (run_dir / name).write_text(content)
    before = sorted(run_dir.rglob("*"))
    assert main([str(run_dir)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert name in output.err
    assert message in output.err
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "a\0b"])
def test_a_folder_that_is_none_is_a_users_mistake(tmp_path, capsys, name):
    assert plots.main([str(tmp_path / name)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("main", [plots.main, report.main], ids=["plots", "report"])
def test_a_wrong_command_line_is_a_users_mistake(capsys, main):
    assert main([]) == main(["one", "--two"]) == 2
    assert "RUN_DIR" in capsys.readouterr().err


@pytest.mark.parametrize(("main", "in_the_way"), [(plots.main, "plots"), (report.main, "report.html/folder")])
def test_a_place_that_cannot_be_written_is_one_message(run_dir, capsys, monkeypatch, main, in_the_way):
    def draw(run, *_):
        return plots.Drawing([Panel("Curves", "curves", figure=draw_curves(run.rows, run.config))], [])

    monkeypatch.setattr(plots, "draw_run", draw)
    monkeypatch.setattr(report, "draw_run", plots.draw_run)
    path = run_dir / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert main([str(run_dir)]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert str(run_dir / in_the_way.split("/")[0]) in output.err
    assert not list(run_dir.rglob("*.tmp"))


class Page(HTMLParser):
    """What a browser would make of a page, as far as the tests ask."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.tags, self.sources, self.texts, self.rows = html, [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action", "poster")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(self.texts)

    @property
    def pictures(self):
        prefix = "data:image/png;base64,"
        assert all(source.startswith(prefix) for source in self.sources)
        return [base64.b64decode(source.removeprefix(prefix), validate=True) for source in self.sources]


def test_the_report_is_whole_and_loads_nothing(finished):
    html = (finished / "report.html").read_text()
    page = Page(html)
    assert sorted(page.pictures) == sorted(path.read_bytes() for path in (finished / "plots").iterdir())
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [word for word in ("http:", "https:", "url(", "@import", "src=//") if word in html]
    assert "default-src 'none'" in html
    result = json.loads((finished / "result.json").read_text())
    accuracy = f"{result['test/accuracy']:.2%}"
    for word in (accuracy, f"{result['test/loss']:.4f}", f"test accuracy {accuracy} ({result['test/errors']} of 30 wrong)."):
        assert word in page.text
    assert ["torch", result["versions"]["torch"]] in page.rows
    assert ["train_size", "50"] in [row[:2] for row in page.rows]
    assert ["data_dir", "none"] in [row[:2] for row in page.rows]
    assert ["download", "false"] in [row[:2] for row in page.rows]


def test_the_report_counts_each_class_and_each_start(run_dir):
    confusion = [[0] * 10 for _ in range(10)]
    confusion[0][0], confusion[1][1], confusion[1][8], confusion[1][7] = 5, 1000, 12, 3
    result = json.loads((run_dir / "result.json").read_text()) | {"test/confusion_matrix": confusion}
    (run_dir / "result.json").write_text(json.dumps(result))
    (run_dir / "starts.jsonl").write_text('{"time": "early", "step": 0}\n{"time": "late", "step": 6, "host": "node7"}\n')
    run = read_run(run_dir)
    rows = Page(report.make_page(run, draw_run(run).panels, [])).rows
    assert ["0", "5", "0", "100.00%", "none"] in rows
    assert ["1", "1015", "15", "98.52%", "8 (12)"] in rows
    assert ["2", "0", "0", "no images", "none"] in rows
    starts = rows[rows.index(["time", "step", "host", "ended"]) :][1:3]
    assert [start[:3] for start in starts] == [["early", "0", ""], ["late", "6", "node7"]]


@pytest.mark.parametrize(("holdout", "what"), [pytest.param(0, "Test", marks=pytest.mark.slow), (20, "Held-out")])
def test_the_report_says_which_images_it_counts(run_dir, holdout, what):
    run = read_run(run_dir)
    config = run.config.replace(holdout=holdout, test_size=None)
    result = {name.replace("test/", f"{config.evaluated_split}/"): value for name, value in run.result.items()}
    run = dataclasses.replace(run, config=config, result=result)
    assert f"{what} images by class" in Page(report.make_page(run, draw_run(run).panels, [])).text


def test_what_comes_from_files_is_text_in_the_report(run_dir):
    nasty = "<script>alert('1')</script>&amp;\"$title"
    folder = run_dir.rename(run_dir.parent / "<b>&\"'")
    config = (folder / "config.yaml").read_text().splitlines()
    (folder / "config.yaml").write_text("\n".join([*config, f"wandb_project: {json.dumps(nasty)}"]).replace("wandb_project: null\n", ""))
    result = json.loads((folder / "result.json").read_text()) | {"versions": {nasty: nasty}, "device": nasty, "precision": nasty}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "starts.jsonl").write_text(json.dumps({"step": 0, nasty: nasty}) + "\n")
    buffer = io.BytesIO()
    Image.new("L", (9, 9)).save(buffer, format="png")
    panels = [Panel(nasty, nasty, figure=buffer.getvalue(), caption=nasty), Panel(nasty, "table", table=([nasty], [[nasty]]))]
    page = Page(report.make_page(read_run(folder), panels, [nasty]))
    assert not {"script", "b"} & set(page.tags)
    # The option, name and value of a version, device, precision, name and value of a start, left out; title, caption, head and cell.
    assert page.text.count(nasty) == 12
    assert "<b>&\"'" in page.text


def test_a_table_without_rows_is_its_head(run_dir):
    page = Page(report.make_page(read_run(run_dir), [Panel("none", "none", table=(["left", "right"], []))], []))
    assert "right" in page.text


def test_the_same_run_gives_the_same_report(run_dir, finished):
    html = report.write_report(run_dir)[0].read_text()
    assert html.replace(str(run_dir), str(finished)) == (finished / "report.html").read_text()


def test_the_report_names_why_each_start_ended(run_dir):
    (run_dir / "starts.jsonl").write_text("".join(json.dumps({"time": f"t{n}", "step": n, "host": "node7"}) + "\n" for n in range(3)))
    (run_dir / "ends.jsonl").write_text('{"step": 1, "start": 1, "why": "stopped by Ctrl-C, saved"}\n')
    rows = Page(report.make_page(read_run(run_dir), [], [])).rows
    place = rows.index(["time", "step", "host", "ended"])
    assert [row[-1] for row in rows[place + 1 : place + 4]] == [
        "stopped by Ctrl-C, saved",
        "not noted: killed, or a lost node",
        "still running, or killed",
    ]


def test_the_report_can_be_drawn_while_the_run_goes_on(run_dir):
    (run_dir / "result.json").unlink()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:10])
    assert report.main([str(run_dir)]) == 0
    assert "Not finished: the record ends at step 3" in (run_dir / "report.html").read_text()


def test_runs_are_compared_on_one_page(run_dir, capsys):
    other = shutil.copytree(run_dir, run_dir.parent / "other")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("checkpoint_every: 500", "checkpoint_every: 7"))
    (other / "result.json").unlink()
    assert report.main([str(run_dir), str(other)]) == 0
    path = run_dir.parent / "compare.html"
    assert capsys.readouterr().out == f"{path}\n"
    page = Page(path.read_text())
    results = [row for row in page.rows if row[0] in (run_dir.name, "other")]
    assert [row[1] for row in results] == ["finished", "not finished"]
    assert results[1][4].endswith(" of 10")
    assert ["checkpoint_every", "500", "7"] in page.rows
    assert len(page.sources) == 1
    assert page.sources[0].startswith("data:image/png")
    assert report.main([str(run_dir), str(other)]) == 0  # drawn again
    for text in ("mine", "<!DOCTYPE html>\n<html>mine</html>\n"):
        path.write_text(text)
        assert report.main([str(run_dir), str(other)]) == 2
        assert path.read_text() == text
        assert "move it away" in capsys.readouterr().err
    assert report.main([str(run_dir), f"{run_dir}/"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_a_comparison_leaves_out_a_measure_that_is_no_number(run_dir):
    other = shutil.copytree(run_dir, run_dir.parent / "lists")
    run = read_run(other)
    run = dataclasses.replace(run, result=run.result | {"test/loss": [0.5, 0.25]})
    rows = Page(report.make_comparison([read_run(run_dir), run])).rows
    [header] = [row for row in rows if row[:2] == ["run", "state"]]
    assert [row[header.index("loss")] == "" for row in rows if row[0] in (run_dir.name, "lists") and row[1] == "finished"] == [False, True]


def test_pictures_are_not_written_through_a_link(run_dir, tmp_path, capsys):
    other = shutil.copytree(run_dir, tmp_path / "other", ignore=shutil.ignore_patterns("plots"))
    (tmp_path / "mine").mkdir()
    (other / "plots").symlink_to(tmp_path / "mine")
    assert plots.main([str(other)]) == 1
    assert f"cannot be written to {other}/plots: it is a link to {tmp_path}/mine" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_comparison_of_equal_names_shows_the_whole_paths(run_dir, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "elsewhere" / run_dir.name)
    rows = Page(report.make_comparison([read_run(run_dir), read_run(other)])).rows
    assert [row[0] for row in rows if "finished" in row] == [str(run_dir), str(other)]


def test_a_comparison_shows_names_as_they_are(run_dir):
    names = ["_begins as matplotlib's own", "$x^ {", "plain"]  # the second is no TeX
    figure = draw_comparison(names, [read_run(run_dir)] * len(names))
    calm(figure.axes[0], names[1])
    render(figure)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == names


@pytest.mark.slow
def test_runs_of_different_tasks_are_compared_each_by_its_own_measures(run_dir, tmp_path):
    forecast = str(Path(__file__).parents[1] / "examples/forecast.py")
    other = tmp_path / "forecast"
    arguments = ["--task", forecast, "--steps", "2", "--batch_size", "8", "--report", "true", "--wandb", "disabled", "--threads", "1"]
    run_ranks(tmp_path, Train([*arguments, "--run_dir", str(other)]))
    own = Page((other / "report.html").read_text()).rows
    [place] = [number for number, row in enumerate(own) if row[-1:] == ["ended"]]
    assert own[place + 1][-1] == "finished"  # the page that the run itself has drawn
    assert report.main([str(run_dir), str(other), "--task", str(tmp_path / "nowhere.py")]) == 2
    for runs in ([run_dir, other], [other, run_dir]):
        assert report.main([str(path) for path in runs]) == 0
        page = Page((runs[0].parent / "compare.html").read_text())
        [header] = [row for row in page.rows if row[:2] == ["run", "state"]]
        assert set(header[2:5]) == {"accuracy", "absolute error", "loss"}
        [row] = [row for row in page.rows if row[0] == "forecast"]
        assert row[header.index("accuracy")] == ""
        assert row[header.index("absolute error")].endswith(" (test)")
        assert "samples/s" in header  # neither images nor series


SETTINGS = """
text.usetex: True
font.size: 20
savefig.dpi: 30
lines.linewidth: 9
no.setting: 1
"""


@pytest.mark.slow
def test_a_report_has_its_bytes_whatever_matplotlib_was_told(run_dir, tmp_path):
    (tmp_path / "matplotlibrc").write_text(SETTINGS)
    pictures = []
    for environ in ({}, {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "Qt4Agg", "HOME": "/dev/null"}):
        command = [sys.executable, "-m", "mnist_dist.report", str(run_dir)]
        answer = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        assert not {"mkdir", "Bad"} & {*answer.stderr.split()}  # what matplotlib says of a home or a setting
        pictures.append({path.name: path.read_bytes() for path in [run_dir / "report.html", *(run_dir / "plots").iterdir()]})
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_a_matplotlib_that_fails_is_one_message(run_dir):
    code = "import sys; sys.modules['matplotlib.style'] = None; from mnist_dist.report import main; sys.exit(main([sys.argv[1]]))"
    answer = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True)
    assert (answer.returncode, answer.stderr.count("\n")) == (1, 1), answer.stderr
    assert answer.stderr.startswith("error: no picture can be drawn, because matplotlib fails: ")


@pytest.mark.slow
def test_all_runs_of_a_folder_are_compared_again_and_again(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "other")
    for _ in range(2):
        assert report.main([str(path) for path in sorted(tmp_path.iterdir())]) == 0
    assert plots.main([str(path) for path in sorted(tmp_path.iterdir())]) == 0
    (tmp_path / "compare.html").write_text("precious")
    assert report.main([str(path) for path in sorted(tmp_path.iterdir())]) == 2
    assert "compare.html" in capsys.readouterr().err


def test_measures_are_shown_with_the_digits_that_tell_them_apart():
    shown = [format_measure("error", value) for value in (0.12345, -999.5, 125_412.3, 125_449.0, 2.5e10)]
    assert shown == ["0.1235", "-999.5000", "125,412.3", "125,449.0", "2.5e+10"]
    assert format_measure("accuracy", 0.98765) == "98.77%"


TABLE = """
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from mnist_dist.task import Data, Panel, Task


class Table(Task):
    width: int = 3

    def load(self):
        table = torch.tensor([[float(cell) for cell in line.split(",")] for line in Path(self.data_dir, "table.csv").open()])
        return Data(TensorDataset(table[:24, :-1], table[:24, -1]), TensorDataset(table[24:, :-1], table[24:, -1]))

    def build_model(self):
        return nn.Sequential(nn.Linear(3, self.width), nn.GELU(), nn.Linear(self.width, 1))

    def losses(self, model, batch, drawn):
        return (model(batch[0]).flatten() - batch[1]).square()

    def draw_report(self, data, model, batches, measures):
        return [Panel("Test rows", "rows", table=(["rows"], [[f"{len(data.test)} rows"]]))]
"""


@pytest.mark.slow
def test_a_run_can_be_asked_when_its_code_or_its_data_have_moved(tmp_path):
    code, data, run, moved = (tmp_path / name for name in ("table.py", "data", "run", "moved"))

    def ask(*lines, expect=0):
        """What programs print in a process of their own, as the code changes, and the text of the page."""
        text = run_ranks(tmp_path, Programs([[str(word) for word in line] for line in lines]), expect=expect)
        return text, Page((run / "report.html").read_text()).text

    code.write_text(TABLE)
    data.mkdir()
    (data / "table.csv").write_text("".join(f"{n},{n % 3},{n % 5},{n / 30}\n" for n in range(31)))
    arguments = ["--task", code, "--steps", "4", "--batch_size", "8", "--wandb", "disabled", "--threads", "1", "--run_dir", run]
    assert "7 rows" in ask(["train", *arguments, "--data_dir", data])[1]
    data.rename(moved)
    model = tmp_path / "model.pt2"
    text, page = ask(["report", run], ["export", run, model], expect=2)
    assert "7 rows" not in page
    assert text.count("FileNotFoundError") == 2
    assert "7 rows" in ask(*([*line, "--data_dir", moved] for line in (["plots", run], ["report", run], ["export", run, model])))[1]
    code.write_text(TABLE.replace("width", "wide"))
    for path, why in ((code, "there is no option 'width'"), (tmp_path / "other.py", "is no file any more: name where it is now by --task")):
        code.rename(path)
        text, page = ask(["report", run, "--data_dir", moved], ["plots", run], ["evaluate", run, "--data_dir", moved], expect=2)
        assert "7 rows" not in page
        assert (page + text).count(f"what task {code} itself draws: ") == 3
        assert (page + text).count(why) == 4
    (moved / "table.py").write_text(TABLE)
    assert "7 rows" in ask(["report", run, "--data_dir", moved, "--task", moved / "table.py"])[1]
