"""Everyday pictures, of many kinds: they are read or refused, and hardly ever given a wrong label with confidence."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from pictures import BLANK, CLEAN, EVERYDAY, SEVERAL, draw
from PIL import Image

from mnist_dist.errors import UserError
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.tasks.mnist.digit import prepare_image
from mnist_dist.weights import load_model

pytestmark = pytest.mark.timeout(1800)  # the first test trains the model
COUNT = 60  # pictures of each kind in the long trial
REFUSED = "does not show one digit"


def save(picture, path):
    picture.save(path, **({"transparency": picture.info["transparency"]} if "transparency" in picture.info else {}))
    return path


@pytest.fixture(scope="module")
def test_split():
    return Mnist().load().test


def measure_likeness(image, original):
    """The correlation of two images, one of them moved by at most two pixels: to where the centre is rounded is a matter of chance."""
    places = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    return max(np.corrcoef(np.roll(image, place, (0, 1)).ravel(), original.ravel())[0, 1] for place in places)


@pytest.mark.parametrize(
    "kind", [kind if place % 4 == 0 else pytest.param(kind, marks=pytest.mark.slow) for place, kind in enumerate(EVERYDAY)]
)
def test_an_everyday_picture_becomes_the_digit_again(tmp_path, test_split, kind):
    likenesses = []
    images = test_split.tensors[0].numpy()
    for index in range(6):
        picture, number = draw(kind, index, images, seed=1)
        try:
            image = prepare_image(save(picture, tmp_path / "picture.png"))
        except UserError as error:
            assert REFUSED in str(error)
            continue
        likenesses.append(measure_likeness(image.numpy(), images[number]))
    assert len(likenesses) >= 4, "too many are refused"
    assert sum(likeness < 0.6 for likeness in likenesses) <= 1  # where a line lay on a stroke
    assert np.median(likenesses) > 0.75


@pytest.mark.parametrize("kind", [*BLANK, *(kind for kind in SEVERAL if kind != "scribble")])
def test_a_page_without_one_digit_is_refused(tmp_path, test_split, kind):
    for index in range(4):
        picture, _ = draw(kind, index, test_split.tensors[0].numpy(), seed=1)
        with pytest.raises(UserError, match=REFUSED):
            prepare_image(save(picture, tmp_path / "picture.png"))


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("width", [10, 24])
def test_an_upright_bar_is_a_digit_and_a_line_from_edge_to_edge_is_none(tmp_path, width, light):
    page = np.full((200, 160), 20 if light else 235, np.uint8)
    page[40:160, 70 : 70 + width] = 235 if light else 20
    Image.fromarray(page).save(tmp_path / "bar.png")
    image = prepare_image(tmp_path / "bar.png")
    assert image[4:24].any(1).all()
    assert image.any(0).sum() <= 20 * width / 120 + 2
    page[:, 70:76] = page[100, 70]
    page[:, 76:] = page[0, 0]
    Image.fromarray(page).save(tmp_path / "line.png")
    with pytest.raises(UserError, match=REFUSED):
        prepare_image(tmp_path / "line.png")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    # On one thread: another test runs beside this one.
    options = ["--config", "fast", "--threads", "1", "--run_dir", str(folder), "--wandb", "disabled", "--report", "false"]
    subprocess.run([sys.executable, "-m", "mnist_dist.train", *options], check=True, timeout=1500)
    return load_model(folder)


def count_answers(kind, split, model, path):
    """Right, wrong with a probability above 0.5, wrong with a lower one, refused."""
    counts = dict.fromkeys(("right", "wrong", "unsure", "refused"), 0)
    images, labels = split.tensors
    for index in range(COUNT):
        picture, number = draw(kind, index, images.numpy(), seed=2)
        try:
            image = prepare_image(save(picture, path))
        except UserError as error:
            assert REFUSED in str(error)
            counts["refused"] += 1
            continue
        with torch.inference_mode():
            probability, digit = model.model(model.task.make_inputs((image[None], None))[0]).softmax(1)[0].max(0)
        right = number is not None and digit == labels[number]
        counts["right" if right else "wrong" if probability > 0.5 else "unsure"] += 1
    print(f"{kind:24} {counts}")
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLEAN)
def test_clean_pictures_are_read(tmp_path, test_split, model, kind):
    counts = count_answers(kind, test_split, model, tmp_path / "picture.png")
    assert counts["right"] >= COUNT - 4, counts
    assert counts["wrong"] <= 2, counts  # as many as among the images of MNIST themselves, some of which are hard


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERYDAY)
def test_everyday_pictures_are_read_or_refused(tmp_path, test_split, model, kind):
    counts = count_answers(kind, test_split, model, tmp_path / "picture.png")
    assert counts["wrong"] <= 1, counts
    assert counts["right"] >= 0.8 * COUNT, counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BLANK, *SEVERAL])
def test_pictures_without_one_digit_are_refused(tmp_path, test_split, model, kind):
    counts = count_answers(kind, test_split, model, tmp_path / "picture.png")
    if kind == "scribble":  # one in ten may look like a digit
        assert counts["wrong"] <= 0.1 * COUNT, counts
    else:
        assert counts["refused"] == COUNT, counts
