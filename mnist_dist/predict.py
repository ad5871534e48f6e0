"""The program: `python -m mnist_dist.predict runs/NAME picture.png ...` labels a person's own pictures of digits.

A picture is brought to the form in which MNIST itself was made: the ink, bright on black, fitted into 20 x 20 pixels and centred by its
mass in 28 x 28 [LeCun et al., Gradient-based learning applied to document recognition, 1998]. Pictures are not trusted: what is read, and
how much of it, is bounded before anything is decoded. torch is imported only once the options are right.
"""

import argparse
import contextlib
import io
import json
import os
import stat
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from mnist_dist.errors import UserError
from mnist_dist.options import Parser
from mnist_dist.program import make_printable, print_answer

if TYPE_CHECKING:
    from torch import Tensor

    from mnist_dist.weights import TrainedModel

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
BYTES_MAX = 20_000_000
PIXELS_MAX = 50_000_000
SIDE_MIN = 8  # pixels of the longer side

# Data sets of handwritten digits that were all made in the same way.
_DIGITS = ("mnist", "qmnist")

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

_KEPT_SIDE = 2048  # a larger picture is reduced to this at once
_VIEW_SIDE = 160  # the digit is searched at this size: a stroke is several pixels wide, the grain of the paper is averaged away
_CONTRAST_MIN = 0.08  # of the ink to the ground, in the colour where it is greatest (fraction of the full range)
_NOISE_MAX = 0.23  # of the ground, as a part of the contrast: noise alone has 0.3, for its own highest peaks then pass for ink
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _NoDigitError(Exception):
    """The picture is whole, but there is nothing in it to read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 all pictures are labelled, 2 some are not or another mistake of the user, 1 the rest."""
    return print_answer(lambda: _predict(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "mnist_dist.predict",
        f"Label pictures of one digit each ({', '.join(FORMATS)}), in any size and colours, with the weights of a run.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or a .safetensors file that a run wrote")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="picture files")
    parser.add_argument("--json", action="store_true", help="print one JSON array with an object for each picture, in their order")
    return parser.parse_args(arguments)


def _predict(options: argparse.Namespace) -> int:
    import torch

    from mnist_dist.weights import load_model

    trained = load_model(options.run)
    if trained.dataset not in _DIGITS:
        raise UserError(f"the weights of {options.run} were trained on {trained.dataset}; pictures of digits need {' or '.join(_DIGITS)}")
    images: list[Tensor] = []
    answers: list[dict[str, Any]] = []
    for path in options.pictures:
        answer = {"file": path}
        answers.append(answer)
        try:
            images.append(prepare_image(path))
        except UserError as error:
            answer["error"] = str(error)
            print(f"error: {make_printable(str(error))}", file=sys.stderr)
    rows = _classify(trained, torch.stack(images)) if images else []
    good = [answer for answer in answers if "error" not in answer]
    for answer, row in zip(good, rows, strict=True):
        digit, runner_up = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:2]
        answer |= {"digit": digit, "probability": row[digit], "runner_up": runner_up, "runner_up_probability": row[runner_up]}
        answer["probabilities"] = row
    if options.json:
        print(json.dumps(answers, indent=2))
    elif good:
        print(_make_table(good))
    return 0 if len(good) == len(answers) else UserError.exit_code


def _classify(trained: "TrainedModel", images: "Tensor") -> list[list[float]]:
    """The probabilities of the ten digits for each of `images` uint8 [n, 28, 28]."""
    import torch

    from mnist_dist.augment import make_inputs

    with torch.inference_mode():
        parts = [trained.model(make_inputs(part, trained.mean, trained.std)).softmax(dim=1) for part in torch.split(images, 500)]
    return torch.cat(parts).tolist()


def _make_table(answers: list[dict[str, Any]]) -> str:
    names = [make_printable(answer["file"]) for answer in answers]
    width = max(map(len, ["file", *names]))
    lines = [f"{'file':<{width}}  digit  probability  runner-up  probability"]
    for name, answer in zip(names, answers, strict=True):
        lines.append(
            f"{name:<{width}}{answer['digit']:>7}{answer['probability']:>13.2%}{answer['runner_up']:>11}{answer['runner_up_probability']:>13.2%}"
        )
    return "\n".join(lines)


def prepare_image(path: str | Path) -> "Tensor":
    """The picture in file `path` as MNIST would hold it: uint8 [28, 28], a bright digit on black.

    Raises `UserError` for what is no whole picture of an allowed format, is too large, or shows nothing that stands out.
    """
    import torch

    try:
        return torch.from_numpy(_bring_to_form(_decode(path, _read(path))))
    except _NoDigitError as error:
        raise UserError(f"{path} holds no digit that stands out: {error}") from None


def _read(path: str | Path) -> bytes:
    """The bytes of a regular file of at most BYTES_MAX. Never waits, as a plain open of a FIFO would."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
                raise UserError(f"{path} is {kind}; a picture file is wanted")
            content = file.read(BYTES_MAX + 1)
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a picture file is wanted") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{str(path)!r} cannot be the name of a file") from error
    if not content:
        raise UserError(f"{path} is empty; a picture file is wanted")
    if len(content) > BYTES_MAX:
        raise UserError(f"{path} has more than {BYTES_MAX:,} bytes, the most that is allowed: reduce the picture")
    return content


def _decode(path: str | Path, content: bytes) -> Image.Image:
    """The first picture in `content`, upright, in mode RGB, its longer side at most _KEPT_SIDE."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities in metadata that do not matter here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
            # So far only the header has been read.
            width, height = picture.size
            if width * height > PIXELS_MAX:
                raise UserError(f"{path} has {width} x {height} pixels, more than the {PIXELS_MAX:,} that are allowed: reduce it")
            if max(width, height) < SIDE_MIN:
                raise UserError(
                    f"{path} has {width} x {height} pixels, too few to show a digit; at least {SIDE_MIN} on one side are wanted"
                )
            size = _fit(picture.size, _KEPT_SIDE)
            picture.draft(None, size)  # lets a JPEG be decoded at an eighth, a quarter or half of its size
            picture.load()
            orientation = _read_orientation(picture)
            picture = _spread_deep_grey(picture) if picture.mode.startswith("I") else picture
            mode = "RGBA" if picture.has_transparency_data else "L" if picture.mode == "L" else "RGB"
            picture = picture if picture.mode == mode else picture.convert(mode)
            picture = _flatten(_reduce(picture, _KEPT_SIDE))
            return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture
    except (UserError, _NoDigitError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} has more than the {PIXELS_MAX:,} pixels that are allowed: reduce it") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no picture that can be read, or a damaged one; allowed: {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow raises many kinds, by format and by what is wrong with the file
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"{path} is damaged or cut short: {reason}") from error


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _reduce(picture: Image.Image, side: int) -> Image.Image:
    """`picture` with its longer side at most `side`, each pixel the mean of those that it covers."""
    size = _fit(picture.size, side)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BOX)


def _read_orientation(picture: Image.Image) -> int:
    with contextlib.suppress(Exception):  # damaged Exif data says nothing; the picture itself may still be whole
        return int(picture.getexif()[ExifTags.Base.Orientation])
    return 1


def _spread_deep_grey(picture: Image.Image) -> Image.Image:
    """A picture of 16-bit grey in 8 bits, its darkest grey black and its brightest white: sensors fill few of the 16 bits."""
    values = np.asarray(picture).clip(0, 65_535).astype(np.uint16)
    darkest, brightest = int(values.min()), int(values.max())
    table = (np.arange(65_536) - darkest).clip(0, brightest - darkest) * (255 / max(1, brightest - darkest))
    return Image.fromarray(table.astype(np.uint8)[values])


def _flatten(picture: Image.Image) -> Image.Image:
    """The picture in mode RGB, what is transparent filled with a colour from which the digit stands out."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    pixels = np.asarray(_reduce(picture, _VIEW_SIDE)).reshape(-1, 4)
    visible = pixels[pixels[:, 3] > pixels[:, 3].max() / 2, :3]
    if not len(visible):
        raise _NoDigitError("it is transparent all over")
    low, high = np.percentile(visible, (2, 98), axis=0)
    if len(visible) > len(pixels) / 2 and (high - low).max() > 255 * _CONTRAST_MIN:
        # Ink and paper are both there, only some corners are missing.
        fill = tuple(int(value) for value in np.median(visible, axis=0))
    else:  # the ink alone
        fill = (255, 255, 255) if visible.mean() < 128 else (0, 0, 0)
    ground = Image.new("RGB", picture.size, fill)
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def _bring_to_form(picture: Image.Image) -> NDArray[np.uint8]:
    """The digit in an RGB picture, as MNIST has it: uint8 [28, 28]."""
    view = _reduce(picture, _VIEW_SIDE)
    ink = _find_ink(view)
    # Once more from near: with more pixels for a small digit, and a ground that has changed less.
    left, top, right, bottom = _find_box(ink)
    across, down = picture.width / view.width, picture.height / view.height
    margin = 0.35 * max((right - left) * across, (bottom - top) * down)
    box = (
        max(0, int(left * across - margin)),
        max(0, int(top * down - margin)),
        min(picture.width, int(right * across + margin) + 1),
        min(picture.height, int(bottom * down + margin) + 1),
    )
    if box != (0, 0, *picture.size):
        with contextlib.suppress(_NoDigitError):  # then what was seen from afar has to do
            ink = _find_ink(_reduce(picture.crop(box), _VIEW_SIDE))
    left, top, right, bottom = _find_box(ink)
    return _centre(_fit_into_box(ink[top:bottom, left:right]))


def _find_ink(view: Image.Image) -> Floats:
    """How much ink there is in each pixel [h, w] of an RGB picture: 0 for the ground, about 1 for a stroke. Raises `_NoDigitError`."""
    pixels = np.asarray(view, dtype=np.float32) / 255
    border = np.concatenate([pixels[[0, -1]].reshape(-1, 3), pixels[:, [0, -1]].reshape(-1, 3)])
    # A plain ground has the colour of most of the border. On a photo it changes from place to place. The truth is what leaves less noise.
    grounds = (np.median(border, axis=0), _fit_ground(pixels))
    signals = [_measure_signal(pixels - ground) for ground in grounds]
    signal, noise = min((signal for signal in signals if signal is not None), key=lambda pair: pair[1], default=(pixels[..., 0], np.inf))
    if noise == np.inf:
        raise _NoDigitError("it is of one colour nearly all over")
    if noise > _NOISE_MAX:
        raise _NoDigitError("it is too uneven, or too noisy")
    threshold = max(0.4, 3 * noise)
    kept = _choose_strokes(signal, threshold)
    # The soft edges of the strokes belong to the ink, too. What is farther away and faint is lines of the paper, shadows, traces of JPEG.
    left, top, right, bottom = _find_box(kept)
    near = kept
    for _ in range(max(1, round(max(right - left, bottom - top) / 16))):
        near = _spread(near)
    faint = signal[~near & (signal < threshold)]
    floor = max(3 * noise, float(np.percentile(faint, 98)) if faint.size else 0.0)
    return np.where(near & (signal > max(0.06, floor)), ((signal - floor) / (1 - floor)).clip(0, 1), 0)


def _fit_ground(pixels: Floats) -> Floats:
    """The surface of second degree in x and y that lies nearest to `pixels` [h, w, 3] by the sum of absolute distances.

    Unlike that of the squares, this sum lets ink and other outliers pull little.
    """
    height, width, _ = pixels.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    stride = max(1, max(height, width) // 40)
    some = terms[::stride, ::stride].reshape(-1, 6)
    surface = np.empty(pixels.shape)
    for colour in range(3):
        values = pixels[::stride, ::stride, colour].reshape(-1).astype(np.float64)
        distances = np.abs(values - np.median(values))
        for _ in range(20):  # iteratively reweighted least squares
            weighted = some / np.maximum(distances, 1e-3)[:, None]
            coefficients = np.linalg.lstsq(weighted.T @ some, weighted.T @ values, rcond=1e-9)[0]
            distances = np.abs(values - some @ coefficients)
        surface[..., colour] = terms @ coefficients
    return surface


def _measure_signal(differences: Floats) -> tuple[Floats, float] | None:
    """What lies on the ground, 1 being the ink [h, w], and the noise of the ground on that scale; None where nothing differs enough.

    `differences` [h, w, 3] from the ground may be to the dark or to the bright side, or in hue alone: the ink is what differs most.
    """
    distances = np.abs(differences).max(axis=-1)
    count = max(3, distances.size // 1000)
    most = np.sort(distances, axis=None)[-count:].mean()
    ink = np.median(differences[distances >= 0.6 * most], axis=0)
    if np.abs(ink).max() < _CONTRAST_MIN:
        return None
    signal = differences @ ink / (ink @ ink)
    rest = np.abs(signal[np.abs(signal) < 0.5])
    return signal, 1.4826 * float(np.median(rest)) if rest.size else np.inf  # from the median deviation to the standard deviation


def _choose_strokes(signal: Floats, threshold: float) -> Mask:
    """The connected parts of `signal` [h, w] above `threshold` that belong to the digit: no specks, no edge of the paper."""
    mask = signal > threshold
    labels = _label_parts(mask)
    edge = np.zeros(mask.shape)
    edge[[0, -1]] = edge[:, [0, -1]] = 1
    # One entry for each label; the ground, whose label is 0, has no mass.
    mass = np.bincount(labels.ravel(), weights=(signal * mask).ravel())
    along_edge = np.bincount(labels.ravel(), weights=edge.ravel()) > 0.3 * min(mask.shape)
    if (mass * ~along_edge).max() > 0.05 * mass.max():
        mass[along_edge] = 0
    if mass.max() <= 0:
        raise _NoDigitError("it is of one colour nearly all over")
    return (mass > 0.05 * mass.max())[labels]


def _label_parts(mask: Mask) -> NDArray[np.int64]:
    """A number for each pixel [h, w]: 0 outside of `mask`, the same for two pixels of it that are connected."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    for _ in range(4 * sum(mask.shape)):  # no stroke of a digit is longer; a longer one falls into parts, which does no harm
        grown = _spread(labels) * mask
        if np.array_equal(grown, labels):
            break
        labels = grown
    return labels


def _spread(values: NDArray[Any]) -> NDArray[Any]:
    """For each of `values` [h, w] the highest among it and its eight neighbours; none is negative."""
    padded = np.pad(values, 1)
    rows = np.maximum(np.maximum(padded[:-2], padded[2:]), padded[1:-1])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 2:]), rows[:, 1:-1])


def _find_box(ink: Floats | Mask) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is not zero; the last two lie just outside."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _fit_into_box(ink: Floats) -> Floats:
    """`ink` with its longer side brought to 20 pixels and its brightest to 1."""
    scale = 20 / max(ink.shape)
    size = (max(1, round(ink.shape[1] * scale)), max(1, round(ink.shape[0] * scale)))
    method = Image.Resampling.BOX if scale <= 1 else Image.Resampling.BICUBIC
    small = np.asarray(Image.fromarray(ink.astype(np.float32)).resize(size, method))
    # A thin stroke covers a pixel of this size only in part; those of MNIST are all bright.
    return (small / small.max()).clip(0, 1)


def _centre(ink: Floats) -> NDArray[np.uint8]:
    """`ink` of at most 20 x 20 in 28 x 28, its centre of mass as near to row 14 and column 14 as whole pixels allow."""
    height, width = ink.shape
    row = np.arange(height) @ ink.sum(axis=1) / ink.sum()
    column = np.arange(width) @ ink.sum(axis=0) / ink.sum()
    top = min(max(0, round(14 - row)), 28 - height)
    left = min(max(0, round(14 - column)), 28 - width)
    image = np.zeros((28, 28), dtype=np.uint8)
    image[top : top + height, left : left + width] = (ink * 255).round()
    return image


if __name__ == "__main__":
    sys.exit(main())
