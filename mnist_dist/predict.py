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

import cv2
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
Bytes = NDArray[np.uint8]

_KEPT_SIDE = 2048  # a larger picture is reduced to this at once
_VIEW_SIDE = 200  # the digit is searched at this size: a stroke is several pixels wide, the grain of the paper is averaged away
_CONTRAST_MIN = 0.08  # of the ink to the ground, in the colour where it is greatest (fraction of the full range)
_NOISE_MAX = 0.23  # of the ground, as a part of the contrast: noise alone has 0.3, for its own highest peaks then pass for ink
_GROUND_KERNEL = 2
_LINE_MAX = 0.035
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
    """The picture in mode RGB, what is transparent filled with that of white and black which has the fewer edges for its contrast."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    view = _reduce(picture, _VIEW_SIDE)

    def measure_edges(fill: int) -> float:
        grey = np.pad(np.asarray(_fill(view, fill).convert("L"), float), 1, constant_values=fill)
        contrast = np.ptp(grey)
        edges = np.abs(np.diff(grey, axis=0)).sum() + np.abs(np.diff(grey, axis=1)).sum()
        return float(edges / contrast) if contrast > 255 * _CONTRAST_MIN else np.inf

    return _fill(picture, min((255, 0), key=measure_edges))


def _fill(picture: Image.Image, fill: int) -> Image.Image:
    ground = Image.new("RGB", picture.size, (fill, fill, fill))
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def _bring_to_form(picture: Image.Image) -> Bytes:
    """The digit in an RGB picture, as MNIST has it: uint8 [28, 28]."""
    grey = _make_grey(picture)
    view = _shrink(grey)
    ink = _find_ink(view, np.ones(view.shape, bool), max(view.shape) / 4)
    scale = max(grey.shape) / max(view.shape)
    left, top, right, bottom = (round(edge * scale) for edge in _find_box(ink))
    margin = round(0.35 * max(right - left, bottom - top))
    area = slice(max(0, top - margin), bottom + margin), slice(max(0, left - margin), right + margin)
    # Once more from near: with more pixels for a small digit, and a ground that follows the light more closely.
    near = _shrink(grey[area])
    mask = cv2.dilate(cv2.resize(np.uint8(ink > 0), grey.shape[::-1])[area], np.ones((3, 3)))
    width = _measure_width(ink > 0.4) * scale * max(near.shape) / max(mask.shape)
    ink = _find_ink(near, cv2.resize(mask, near.shape[::-1]) > 0, width)
    left, top, right, bottom = _find_box(ink)
    return _centre(_fit_into_box(ink[top:bottom, left:right]))


def _shrink(grey: Bytes) -> Bytes:
    """`grey` [h, w] with its longer side near _VIEW_SIDE; a small picture is enlarged in blocks, for lines and gaps are measured in pixels."""
    blocks = max(1, _VIEW_SIDE // max(grey.shape))
    return np.asarray(_reduce(Image.fromarray(grey), _VIEW_SIDE)).repeat(blocks, axis=0).repeat(blocks, axis=1)


def _measure_width(mask: Mask) -> float:
    """The width of the widest stroke in `mask` [h, w]."""
    return 2 * float(cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5).max())


def _make_grey(picture: Image.Image) -> Bytes:
    """The colour of an RGB picture in which the ink differs most from its ground [h, w], turned so that the ink is the darker."""
    view = _reduce(picture, _VIEW_SIDE)
    size = max(view.size) | 1
    edge = size // 2
    best, name = 0.0, "L"
    for colour, one in zip("LRGB", (view.convert("L"), *view.split()), strict=True):
        values = np.asarray(one)
        # In a wide neighbourhood, most is ground.
        ground = cv2.medianBlur(cv2.copyMakeBorder(values, edge, edge, edge, edge, cv2.BORDER_REFLECT), size)[edge:-edge, edge:-edge]
        difference = ground.astype(float) - values
        contrast = np.sort(np.abs(difference), axis=None)[-max(3, difference.size // 500) :].mean()
        if colour == "L":
            contrast *= 1.2  # all three colours together have less noise than one
        if contrast > abs(best):
            best, name = np.copysign(contrast, (difference**3).sum()), colour
    grey = np.asarray(picture.convert("L") if name == "L" else picture.getchannel(name))
    return 255 - grey if best < 0 else grey


def _find_ink(grey: Bytes, area: Mask, width: float) -> Floats:
    """How much ink there is in each pixel of `grey` [h, w], whose strokes are at most `width` pixels wide: 0 is the ground, about 1 a stroke.

    Raises `_NoDigitError`.
    """
    # The ground is what remains when all that is dark and narrower than the kernel is filled up. Edges of shadows stay where they are.
    size = int(_GROUND_KERNEL * width + 5) | 1
    padded = cv2.copyMakeBorder(cv2.medianBlur(grey, 3), *[size // 2] * 4, cv2.BORDER_REPLICATE)
    ground = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, np.ones((size, size), np.uint8)).astype(np.float32)[size // 2 : -(size // 2), size // 2 : -(size // 2)]
    signal, noise = _normalize((ground - grey) / np.maximum(ground, 64))
    signal, noise = _normalize(np.where(area, _erase_lines(signal, max(0.2, 3 * noise)), 0))
    threshold = max(0.4, 3 * noise)
    kept = _choose_parts(signal > threshold)
    left, top, right, bottom = _find_box(kept)
    near = cv2.dilate(kept.astype(np.uint8), np.ones((3, 3)), iterations=max(1, round(max(right - left, bottom - top) / 16))) > 0
    floor = max(0.06, 3 * noise)
    return np.where(near & (signal > floor), ((signal - floor) / (1 - floor)).clip(0, 1), 0)


def _normalize(signal):
    most = np.sort(signal, axis=None)[-max(3, signal.size // 1000) :].mean()
    rest = signal[signal < most / 2]
    if most < _CONTRAST_MIN or not rest.size:
        raise _NoDigitError("it is of one colour nearly all over")
    low = np.median(rest)
    signal = (signal - low) / (most - low)
    noise = 1.4826 * float(np.median(np.abs(signal[signal < 0.5])))  # from the median deviation to the standard deviation
    if noise > _NOISE_MAX:
        raise _NoDigitError("it is too uneven, or too noisy")
    return signal, noise


def _erase_lines(signal: Floats, threshold: float) -> Floats:
    """`signal` [h, w] without thin straight lines that go from edge to edge: of ruled paper, tables, creases. Strokes that they cross stay."""
    height, width = signal.shape
    side = max(height, width)
    size = int(np.hypot(height, width)) + 2
    mask = cv2.dilate(np.where(signal > threshold, 255, 0).astype(np.uint8), np.ones((3, 3)))
    dash = np.ones((1, max(3, side // 25)))
    beside = max(2, side // 50)
    lines = np.zeros_like(mask)
    for angle in range(180):
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
        turn[:, 2] += (size - width) / 2, (size - height) / 2
        turned = cv2.morphologyEx(cv2.warpAffine(mask, turn, (size, size)), cv2.MORPH_CLOSE, dash)
        chords = cv2.warpAffine(np.full_like(mask, 255), turn, (size, size)).sum(axis=1)
        parts = turned.sum(axis=1) / np.maximum(chords, 255)
        back = cv2.invertAffineTransform(turn)
        edges = np.flatnonzero(np.diff((parts > 0.95) & (chords > 255 * 0.8 * min(height, width)), prepend=False, append=False))
        for start, end in edges.reshape(-1, 2):
            # A stroke that fills the picture is wider: some of it lies beside the line.
            if end - start <= 3 + _LINE_MAX * side and max(parts[start - beside], parts[(end - 1 + beside) % size]) < 0.5:
                ends = [tuple(np.rint(back @ [x, (start + end - 1) / 2, 1]).astype(int).tolist()) for x in (0, size - 1)]
                cv2.line(lines, *ends, 255, int(end - start) + 2)
    if not lines.any():
        return signal
    # A stroke that is darker than the line is still to be seen in it.
    level = float(np.percentile(signal[(lines > 0) & (signal > threshold)], 80))
    lines[signal > level + max(0.25, (1 - level) / 2)] = 0
    return cv2.inpaint((signal.clip(0, 1) * 255).astype(np.uint8), lines, 3, cv2.INPAINT_TELEA).astype(np.float32) / 255


def _choose_parts(mask: Mask) -> Mask:
    """The connected parts of `mask` [h, w] that form one digit: without specks, frames, and what comes in over the edge."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    left, top, width, height, area = stats.T
    mass = area.astype(float)
    mass[0] = 0
    mass[[part for part in range(1, count) if _is_frame(labels == part)]] = 0
    close = max(mask.shape) // 50
    ends = left + width + close >= mask.shape[1], top + height + close >= mask.shape[0]
    touched = sum([left <= close, top <= close, *ends], np.zeros(count, int))
    inside = np.where(touched > 0, 0, mass)
    if inside.max() > 0.1 * mass.max():
        size = max(width[inside.argmax()], height[inside.argmax()])
        for part in np.flatnonzero((mass > 0.3 * inside.max()) & (touched == 1)):
            if min(width[part], height[part]) > 0.25 * size and _measure_width(labels == part) < 0.35 * max(width[part], height[part]):
                raise _NoDigitError("there is more than one thing in it")
        mass = inside
    main = int(mass.argmax())
    mass[(width > 5 * height) & (top >= top[main] + height[main])] = 0  # an underline
    if mass.max() == 0:
        raise _NoDigitError("there are only lines in it")
    chosen = mass > 0.05 * mass.max()
    if chosen.sum() > 6:
        raise _NoDigitError("there is more than one thing in it")
    kept = chosen[labels]
    _check_digit(kept)
    return kept


def _is_frame(part: Mask) -> bool:
    contours, _ = cv2.findContours(part.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    area = cv2.contourArea(contours[0])
    width, height = cv2.minAreaRect(contours[0])[1]
    return bool(min(width, height) > 8 and area > 0.9 * width * height and part.sum() < 0.5 * area)


def _check_digit(mask: Mask) -> None:
    """Raise `_NoDigitError` where `mask` [h, w] does not look like one digit. The bounds let pass all but a few in a thousand of MNIST's."""
    count, _, stats, _ = cv2.connectedComponentsWithStats(_grow(mask, 0.08))
    heights = np.sort(stats[1:, cv2.CC_STAT_HEIGHT])
    # The parts of a digit with a gap in its stroke lie near each other; a detached bar is low.
    if count > 5 or cv2.connectedComponents(_grow(mask, 0.2))[0] > 2 or (count > 2 and heights[-2] > 0.5 * heights[-1]):
        raise _NoDigitError("there is more than one thing in it")
    left, top, right, bottom = _find_box(mask)
    width, height = right - left, bottom - top
    longest = max(width, height)
    if width > 2 * height:
        raise _NoDigitError("what is in it is wider than a digit")
    margins = left, top, mask.shape[1] - right, mask.shape[0] - bottom
    if min(margins) == 0 and max(margins) > 0.3 * max(mask.shape):
        raise _NoDigitError("what is in it goes over the edge")
    if _measure_width(mask) > 0.55 * longest or (width > height / 2 and mask.sum() > 0.75 * width * height):
        raise _NoDigitError("there is only a blot in it")
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)
    if mask.sum() / (4 * depth[depth > 0].mean()) > 3.2 * longest:
        raise _NoDigitError("what is in it has more strokes than a digit")
    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    loops = [cv2.contourArea(contour) for contour, (*_, parent) in zip(contours, hierarchy[0], strict=True) if parent >= 0]
    if sum(area > 0.003 * longest**2 for area in loops) > 3:
        raise _NoDigitError("what is in it has more loops than a digit")


def _grow(mask: Mask, part: float) -> Bytes:
    """`mask` [h, w] with gaps closed that are narrower than `part` of the height or width of what is in it."""
    left, top, right, bottom = _find_box(mask)
    reach = max(2, round(part * np.sqrt((right - left) * (bottom - top))))
    return cv2.dilate(np.pad(mask, reach).astype(np.uint8), np.ones((reach, reach), np.uint8))


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
