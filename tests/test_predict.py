"""A person's own pictures: brought to MNIST's form whatever they look like, or refused in one line, whatever they are."""

import functools
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from processes import run_ranks
from safetensors.torch import save_file

from mnist_dist import predict
from mnist_dist.errors import UserError
from mnist_dist.model import build_model
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.tasks.mnist.augment import make_inputs
from mnist_dist.tasks.mnist.digit import prepare_image

Resampling = Image.Resampling
METADATA = {"dataset": "mnist", "mean": "0.13066", "std": "0.308108"}


@functools.cache
def digits():
    """One test image of each digit, uint8 [28, 28]."""
    images, labels = Mnist().load().test.tensors
    return [images[int((labels == digit).nonzero()[5])].numpy() for digit in range(10)]


def enlarge(digit, side=224, method=Resampling.BICUBIC):
    return Image.fromarray(digit).resize((side, side), method)


def invert(picture):
    return picture.point(lambda value: 255 - value)


def paint(digit, ink, ground):
    cover = np.asarray(enlarge(digit), float)[..., None] / 255
    return Image.fromarray((np.array(ground) * (1 - cover) + np.array(ink) * cover).astype(np.uint8))


def place(digit, width, height, left, top):
    canvas = Image.new("L", (width, height), 255)
    canvas.paste(invert(enlarge(digit, 112)), (left, top))
    return canvas


def take_photo(digit, noise=8.0):
    """Ink on paper that is lit from one side and lies on a dark table whose edge is in the picture."""
    rng = np.random.default_rng(int(digit[10:18].sum()))
    cover = np.zeros((450, 600))
    cover[75:375, 150:450] = np.asarray(enlarge(digit, 300).filter(ImageFilter.GaussianBlur(1.5)), float) / 255
    y, x = np.mgrid[:450, :600] / 450
    light = 90 + 90 * x + 35 * y - 25 * (x - 0.6) ** 2
    light[:, :45] = 50
    grey = light * (1 - 0.75 * cover) + rng.normal(0, noise, cover.shape)
    return Image.fromarray((grey[..., None] * [1, 0.96, 0.88]).clip(0, 255).astype(np.uint8))


def write_on_grid(digit):
    paper = np.full((400, 400, 3), [250, 250, 240], float)
    paper[::40], paper[:, ::40] = [190, 205, 235], [190, 205, 235]
    cover = np.zeros((400, 400, 1))
    cover[90:314, 90:314, 0] = np.asarray(enlarge(digit), float) / 255
    return Image.fromarray((paper * (1 - cover) + np.array([20, 30, 110]) * cover).astype(np.uint8))


def add_dust(digit):
    picture = 255 - np.asarray(enlarge(digit).crop((-40, -40, 264, 264)))
    for x, y in ((8, 10), (290, 12), (150, 6), (12, 295), (280, 270)):
        picture[y : y + 4, x : x + 4] = 20
    return Image.fromarray(picture)


def cut_out(digit, ink, side=224):
    """The ink alone, the rest transparent and, as drawing programs leave it, black."""
    cover = np.asarray(enlarge(digit, side))
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[cover > 0] = [*ink, 0]
    pixels[..., 3] = cover
    return Image.fromarray(pixels)


def round_corners(digit):
    card = paint(digit, (30, 30, 30), (245, 240, 235)).convert("RGBA")
    y, x = np.mgrid[-1:1:224j, -1:1:224j]
    card.putalpha(Image.fromarray(np.where(x**2 + y**2 < 1.2, 255, 0).astype(np.uint8)))
    return card


def crop_to_ink(picture):
    return picture.crop(picture.getbbox())


# Name: (how to make the picture, largest mean difference to the original over the ten digits, of 255)
STYLES = {
    "as it is": (Image.fromarray, 2),
    "enlarged in blocks": (lambda digit: enlarge(digit, 280, Resampling.NEAREST), 5),
    "smooth": (lambda digit: enlarge(digit, 280), 8),
    "dark on light": (lambda digit: invert(enlarge(digit)), 8),
    "large": (lambda digit: invert(enlarge(digit, 1500)), 8),
    "12 pixels": (lambda digit: invert(Image.fromarray(digit).resize((12, 12), Resampling.BOX)), 18),
    "17 pixels": (lambda digit: Image.fromarray(digit).resize((17, 17), Resampling.BOX), 13),
    "without margin": (lambda digit: crop_to_ink(enlarge(digit)), 8),
    "wide canvas": (lambda digit: place(digit, 1800, 200, 1300, 50), 9),
    "in a corner": (lambda digit: place(digit, 700, 500, 0, 0), 9),
    "red on blue": (lambda digit: paint(digit, (200, 30, 30), (40, 60, 200)), 8),
    "red on green of the same grey": (lambda digit: paint(digit, (200, 20, 20), (20, 112, 20)), 8),
    "yellow on white": (lambda digit: paint(digit, (240, 220, 0), (255, 255, 255)), 8),
    "pale": (lambda digit: paint(digit, (170,) * 3, (205,) * 3), 8),
    "black ink on nothing": (lambda digit: cut_out(digit, (0, 0, 0)), 8),
    "white ink on nothing": (lambda digit: cut_out(digit, (255, 255, 255)), 8),
    "bold ink on nothing": (lambda digit: crop_to_ink(cut_out(digit, (90, 20, 20))), 8),
    "card with round corners": (round_corners, 8),
    "photo": (take_photo, 12),
    "noisy photo": (lambda digit: take_photo(digit, 20.0), 13),
    "squared paper": (write_on_grid, 13),
    "dust": (add_dust, 8),
    "palette": (lambda digit: invert(enlarge(digit)).convert("P"), 8),
    "one bit": (lambda digit: invert(enlarge(digit)).point(lambda value: 255 * (value > 127)).convert("1"), 13),
    "grey with alpha": (lambda digit: invert(enlarge(digit)).convert("LA"), 8),
    "twelve of sixteen bits": (lambda digit: Image.fromarray(np.asarray(enlarge(digit)).astype(np.uint16) * 16), 8),
}


def measure_distance(image, original):
    """Mean absolute difference of two images, one of them moved by at most a pixel: where to round the centre is a matter of chance."""
    image, original = torch.as_tensor(image).float(), torch.as_tensor(original).float()
    return min((image.roll((y, x), (0, 1)) - original).abs().mean().item() for y in (-1, 0, 1) for x in (-1, 0, 1))


def find_centre(image):
    weights = image.double() / image.sum()
    return (weights.sum(1) @ torch.arange(28.0).double()).item(), (weights.sum(0) @ torch.arange(28.0).double()).item()


OFTEN = ("as it is", "photo", "squared paper", "one bit")


@pytest.mark.parametrize("style", [style if style in OFTEN else pytest.param(style, marks=pytest.mark.slow) for style in STYLES])
def test_a_picture_of_an_mnist_digit_becomes_that_digit_again(tmp_path, style):
    make, most = STYLES[style]
    distances = []
    for digit in digits():
        make(digit).save(tmp_path / "digit.png", compress_level=1)
        image = prepare_image(tmp_path / "digit.png")
        assert (image.shape, image.dtype) == ((28, 28), torch.uint8)
        assert image.max() == 255
        assert max(abs(place - 14) for place in find_centre(image)) <= 0.75
        distances.append(measure_distance(image, digit))
    assert sum(distances) / len(distances) < most, distances
    assert max(distances) < 3 * most


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_every_format_is_read(tmp_path, mode):
    picture = invert(enlarge(digits()[5])).convert("RGB").convert(mode)
    picture.save(tmp_path / "poor.jpg", quality=40)
    picture.save(tmp_path / "progressive.jpg", progressive=True)
    if mode != "CMYK":  # which of these only JPEG can hold
        for name in ("digit.png", "digit.gif", "digit.bmp", "digit.webp"):
            picture.save(tmp_path / name)
        picture.save(tmp_path / "lossless.webp", lossless=True)
    for path in tmp_path.iterdir():
        assert measure_distance(prepare_image(path), digits()[5]) < 10, path


def test_a_photo_is_turned_as_its_exif_data_say(tmp_path):
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what the camera did: the inverse of what the viewer has to do
    for orientation, turn in turns.items():
        picture = enlarge(digits()[4]).convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = orientation
        (picture if turn is None else picture.transpose(Image.Transpose(turn))).save(tmp_path / "digit.jpg", exif=exif)
        assert measure_distance(prepare_image(tmp_path / "digit.jpg"), digits()[4]) < 12, orientation


def test_of_an_animation_the_first_picture_counts(tmp_path):
    frames = [enlarge(digits()[digit]) for digit in (3, 8)]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
        assert measure_distance(prepare_image(tmp_path / name), digits()[3]) < 10


def encode(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def forge_png(width, height):
    """A PNG of a few bytes whose header tells of a huge picture."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def make_noise(deviation):
    return Image.fromarray(np.random.default_rng(0).normal(128, deviation, (200, 200)).clip(0, 255).astype(np.uint8))


def add_scans(count):
    """A progressive JPEG whose last scan is repeated: little to read, much to decode."""
    content = encode(enlarge(digits()[0]), "JPEG", progressive=True)
    scan, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:end] + content[scan:end] * count + content[end:]


REFUSED = {
    "text.png": (lambda: b"this is no picture\n", "is not a readable picture"),
    "empty.png": (lambda: b"", "is empty"),
    "half.png": (lambda: (content := encode(take_photo(digits()[0])))[: len(content) // 2], "damaged or cut short"),
    "half.jpg": (lambda: (content := encode(take_photo(digits()[0]), "JPEG"))[: len(content) // 2], "damaged or cut short"),
    "half.bmp": (lambda: (content := encode(enlarge(digits()[0]), "BMP"))[: len(content) // 2], "damaged or cut short"),
    "half.gif": (lambda: (content := encode(enlarge(digits()[0]), "GIF"))[: len(content) // 2], "damaged or cut short"),
    "half.webp": (lambda: (content := encode(enlarge(digits()[0]), "WEBP"))[: len(content) // 2], "readable|damaged or cut short"),
    "header.png": (lambda: encode(enlarge(digits()[0]))[:20], "readable|damaged or cut short"),
    "bomb.png": (lambda: forge_png(60_000, 60_000), r"more than the 50,000,000"),
    "wide bomb.png": (lambda: forge_png(2**31 - 1, 1), r"more than the 50,000,000"),
    "small bomb.png": (lambda: forge_png(7_100, 7_100), "7100 x 7100 pixels, more than the 50,000,000"),
    "heavy.png": (lambda: encode(enlarge(digits()[0])) + bytes(20_000_000), "more than the 20,000,000 that are read"),
    "tiff.png": (lambda: encode(enlarge(digits()[0]), "TIFF"), "allowed: PNG, JPEG, GIF, BMP, WEBP"),
    "script.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "allowed: PNG, JPEG, GIF, BMP, WEBP"),
    "pixel.png": (lambda: encode(Image.new("L", (1, 1))), "1 x 1 pixels, too few"),
    "scans.jpg": (lambda: add_scans(2000), "a progressive JPEG of 2,006 scans"),
    "black.png": (lambda: encode(Image.new("L", (100, 100))), "does not show one digit"),
    "thread.png": (lambda: encode(Image.new("L", (50_000, 1), 9)), "does not show one digit"),
    "gradient.png": (lambda: encode(Image.linear_gradient("L")), "does not show one digit"),
    "grain.png": (lambda: encode(make_noise(5)), "does not show one digit"),
    "noise.png": (lambda: encode(make_noise(60)), "does not show one digit"),
    "glass.png": (lambda: encode(Image.new("RGBA", (100, 100))), "does not show one digit"),
    "blank photo.jpg": (
        lambda: encode(take_photo(np.zeros((28, 28), np.uint8)).crop((45, 0, 600, 450)), "JPEG"),
        "does not show one digit",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_of_a_digit_is_refused_in_one_line(tmp_path, name):
    make, message = REFUSED[name]
    (tmp_path / name).write_bytes(make())
    start = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        prepare_image(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1
    assert time.process_time() - start < 5


@pytest.mark.timeout(20)
def test_only_regular_files_are_read_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, message in {
        tmp_path / "fifo.png": "not a regular file",
        tmp_path: "is a folder",
        "/dev/zero": "not a regular file",
        tmp_path / "loop.png": "cannot be read",
        tmp_path / "missing.png": "No such file",
        tmp_path / ("x" * 5000): "cannot be read",
        "nul\0byte.png": "cannot be the name of a file",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare_image(name)
    encoded = encode(enlarge(digits()[7]))
    (tmp_path / "real.png").write_bytes(encoded)
    (tmp_path / "link.png").symlink_to("real.png")
    assert measure_distance(prepare_image(tmp_path / "link.png"), digits()[7]) < 10


@dataclass(frozen=True)
class PrepareMutants:
    """1,000 damaged pictures, one after the other, in a process of its own whose memory is watched."""

    folder: Path

    def __call__(self):
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        dice = random.Random(0)
        picture = enlarge(digits()[6], 56)
        kinds = [("PNG", {}), ("JPEG", {}), ("BMP", {}), ("GIF", {}), ("WEBP", {})]
        seeds = [encode(picture.convert(mode), kind, **options) for kind, options in kinds for mode in ("L", "RGB")]
        seeds += [encode(picture.convert("P")), encode(cut_out(digits()[6], (0, 0, 0), 56), "WEBP"), encode(picture.convert("LA"))]
        path = self.folder / "mutant"
        answered = refused = 0
        for count in range(1000):
            content = bytearray(seeds[count % len(seeds)])
            for _ in range(dice.choice((1, 1, 2, 5, 20))):
                # Half of the hits go to the header, where sizes and offsets stand.
                place = dice.randrange(min(len(content), 64) if dice.random() < 0.5 else len(content))
                content[place] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
            if dice.random() < 0.2:
                del content[dice.randrange(len(content)) :]
            path.write_bytes(content)
            try:
                image = prepare_image(path)
                assert (image.shape, image.dtype) == ((28, 28), torch.uint8)
                answered += 1
            except UserError as error:
                assert len(str(error).splitlines()) == 1, error
                refused += 1
        grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(json.dumps({"answered": answered, "refused": refused, "cpu_s": time.process_time() - start, "grown_mib": grown_mib}))


@pytest.mark.slow
def test_a_thousand_damaged_pictures_do_no_harm(tmp_path):
    result = json.loads(run_ranks(tmp_path, PrepareMutants(tmp_path)).strip().splitlines()[-1])
    assert result["answered"] + result["refused"] == 1000
    assert min(result["answered"], result["refused"]) > 200  # both ways are taken
    assert result["grown_mib"] < 400
    assert result["cpu_s"] < 20


@dataclass(frozen=True)
class Prepare:
    """One picture, in a process of its own whose memory is watched."""

    path: Path

    def __call__(self):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        image = prepare_image(self.path)
        print(image.sum().item(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_the_largest_picture_takes_bounded_memory(tmp_path, mode):
    path = tmp_path / "large.png"
    picture = Image.new("P", (7000, 7000), 0)
    picture.putpalette([255, 255, 255, 0, 0, 90])
    picture.paste(1, (3000, 1000, 3800, 6000))
    picture.convert(mode).save(path, compress_level=1)
    ink, grown_mib = run_ranks(tmp_path, Prepare(path)).split()
    assert 20 * 3 * 230 < int(ink) <= 20 * 3 * 255  # the bar is 6.25 times as high as wide
    assert float(grown_mib) < 400


def make_weights():
    return {name: tensor.contiguous() for name, tensor in build_model(Mnist(), 3).state_dict().items()}


@pytest.fixture
def weights(tmp_path):
    save_file(make_weights(), tmp_path / "model.safetensors", METADATA)
    return tmp_path / "model.safetensors"


def test_the_program_answers_for_each_picture_and_names_the_bad_ones(tmp_path, weights, capsys):
    names = ["seven.png", "bad\x1b[31m.png", "four.png"]
    paths = [str(tmp_path / name) for name in names]
    enlarge(digits()[7]).save(paths[0])
    Path(paths[1]).write_text("no picture")
    invert(enlarge(digits()[4])).save(paths[2])

    assert predict.main([str(tmp_path), *paths, "--json"]) == 2
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1
    assert "\x1b" not in output.err
    assert output.err.startswith("error: ")
    answers = json.loads(output.out)
    assert [answer["file"] for answer in answers] == paths
    assert set(answers[1]) == {"file", "error"}
    with torch.no_grad():
        images = torch.stack([prepare_image(paths[0]), prepare_image(paths[2])])
        expected = build_model(Mnist(), 3)(make_inputs(images, 0.13066, 0.308108)).softmax(1)
    for answer, row in zip((answers[0], answers[2]), expected, strict=True):
        assert answer["probabilities"] == pytest.approx(row.tolist(), abs=1e-5)
        assert [answer["digit"], answer["runner_up"]] == row.topk(2).indices.tolist()
        assert [answer["probability"], answer["runner_up_probability"]] == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)

    # The file of weights itself serves as well; as a table, in which all that is asked for stands.
    assert predict.main([str(weights), paths[0], paths[2]]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == [
        paths[0],
        str(answers[0]["digit"]),
        f"{answers[0]['probability']:.2%}",
        str(answers[0]["runner_up"]),
        f"{answers[0]['runner_up_probability']:.2%}",
    ]
    assert predict.main([str(weights), paths[1]]) == 2
    assert capsys.readouterr().out == ""


def test_the_normalisation_is_that_of_the_file(tmp_path, weights, capsys):
    enlarge(digits()[2]).save(tmp_path / "two.png")
    predict.main([str(weights), str(tmp_path / "two.png"), "--json"])
    save_file(make_weights(), weights, {**METADATA, "mean": "0.9"})
    one = json.loads(capsys.readouterr().out)
    predict.main([str(weights), str(tmp_path / "two.png"), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["probabilities"] != pytest.approx(one[0]["probabilities"], abs=1e-4)


def test_programs_answer_a_mistake_and_a_call_for_help_without_torch():
    code = """if True:
        import contextlib, io, sys
        from mnist_dist import evaluate, export, predict
        for program in (evaluate, export, predict):
            with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
                program.main(["--help"])
            assert program.__name__ in output.getvalue()
            assert program.main(["--nonsense"]) == 2
        assert "torch" not in sys.modules
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 3


@pytest.mark.slow
def test_a_reader_that_leaves_and_a_full_disk_end_without_a_traceback(tmp_path, weights):
    enlarge(digits()[1]).save(tmp_path / "one.png")
    command = [sys.executable, "-m", "mnist_dist.predict", str(weights), str(tmp_path / "one.png")]
    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    programs = [subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) for output in (writing, full)]
    errors = [program.communicate(timeout=60)[1] for program in programs]
    os.close(writing)
    os.close(full)
    assert [program.returncode for program in programs] == [1, 1]
    assert errors[0] == ""
    assert errors[1].startswith("error: the answer cannot be given: ")
    assert len(errors[1].splitlines()) == 1


def damage_weights(name):
    tensors = make_weights()
    metadata = dict(METADATA)
    if name == "another shape":
        tensors["conv1.bias"] = torch.zeros(3)
    elif name == "missing tensor":
        del tensors["linear2.weight"]
    elif name == "surplus tensor":
        tensors["extra"] = torch.zeros(1)
    elif name == "half precision":
        tensors["conv1.bias"] = tensors["conv1.bias"].half()
    elif name == "not finite":
        tensors["conv1.bias"][0] = float("inf")
    elif name == "no metadata":
        metadata = {}
    elif name == "std of zero":
        metadata["std"] = "0"
    elif name == "mean of words":
        metadata["mean"] = "about 0.1"
    elif name == "data that are a list":
        metadata["dataset"] = "[1]"
    elif name == "unknown data":
        metadata["dataset"] = "cats\x1b"
    elif name == "clothes":
        metadata["dataset"] = "fashion_mnist"
    return tensors, metadata


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("another shape", "conv1.bias is [3], expected [32]"),
        ("missing tensor", "linear2.weight is missing"),
        ("surplus tensor", "extra is [1], expected no such tensor"),
        ("half precision", "expected finite float32 values"),
        ("not finite", "expected finite float32 values"),
        ("no metadata", "does not say its dataset, mean, std"),
        ("std of zero", "its std is '0'"),
        ("mean of words", "its mean is 'about 0.1'"),
        ("data that are a list", "its dataset is '[1]'"),
        ("unknown data", "its dataset is 'cats\\x1b'"),
        ("clothes", "trained on fashion_mnist"),
    ],
)
def test_weights_that_are_not_ours_are_refused(tmp_path, capsys, name, message):
    enlarge(digits()[1]).save(tmp_path / "one.png")
    tensors, metadata = damage_weights(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata or None)
    assert predict.main([str(tmp_path), str(tmp_path / "one.png")]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert len(output.err.splitlines()) == 1
    assert output.out == ""


def test_weights_that_are_missing_or_torn_are_refused(tmp_path, weights, capsys):
    content = weights.read_bytes()
    weights.with_name("torn.safetensors").write_bytes(content[:-100])
    weights.with_name("text.safetensors").write_text("weights")
    (tmp_path / "unfinished").mkdir()
    for path, message in {
        "torn.safetensors": "not a valid .safetensors file",
        "text.safetensors": "not a valid .safetensors file",
        "unfinished": "holds no model.safetensors",
        "nowhere": "neither a run folder nor a file of weights",
    }.items():
        assert predict.main([str(tmp_path / path), "one.png"]) == 2
        assert message in capsys.readouterr().err
