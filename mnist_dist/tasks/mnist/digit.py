"""The digit in a person's own picture, brought to the form in which MNIST itself was made.

That is the ink, bright on black, fitted into 20 x 20 pixels and centred by its mass in 28 x 28 [LeCun et al., Gradient-based learning
applied to document recognition, 1998]. Pictures are not trusted: what is read, and how much of it, is bounded before anything is decoded.
"""

import contextlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_dist.errors import UserError
from mnist_dist.files import read_file

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
BYTES_MAX = 20_000_000
PIXELS_MAX = 50_000_000
SIDE_MIN = 8  # pixels of the longer side

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
Bytes = NDArray[np.uint8]

_KEPT_SIDE = 2048  # a larger picture is reduced to this at once
_VIEW_SIDE = 200  # the digit is searched at this size: a stroke is several pixels wide, the grain of the paper is averaged away
_CONTRAST_MIN = 0.08  # of the ink to the ground, in the colour where it is greatest (fraction of the full range)
_NOISE_MAX = 0.23  # of the ground, as a part of the contrast: noise alone has 0.3, for its own highest peaks then pass for ink
_LINE_MAX = 0.035  # the thickness of a printed line, as a part of the picture's side: a digit that fills the picture has thicker strokes
_SCANS_MAX = 30  # of a progressive JPEG: usual ones have 10, and each costs as much time as a whole picture
_SEVERAL = "there is more than one thing in it"


class _NoDigitError(Exception):
    """The picture can be decoded, but it does not show one digit; the message says what it shows instead."""


def prepare_image(path: str | Path) -> "Tensor":
    """The picture in file `path` as MNIST would hold it: uint8 [28, 28], a bright digit on black.

    Raises `UserError` for a file that is not a valid picture of an allowed format, is too large, or does not show one digit.
    """
    import torch

    try:
        return torch.from_numpy(_bring_to_form(_decode(path, _read(path))))
    except _NoDigitError as error:
        raise UserError(f"{path} does not show one digit: {error}") from None


def _read(path: str | Path) -> bytes:
    try:
        content = read_file(path, BYTES_MAX)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; expected a picture file") from error
    if not content:
        raise UserError(f"{path} is empty; expected a picture file")
    return content


def _decode(path: str | Path, content: bytes) -> Image.Image:
    """The first picture in `content`, upright, in mode RGB, its longer side at most _KEPT_SIDE."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities in metadata that do not matter here; the size is checked below
            picture: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
            # So far only the header has been read.
            width, height = picture.size
            if width * height > PIXELS_MAX:
                raise UserError(f"{path} has {width} x {height} pixels, more than the {PIXELS_MAX:,} that are allowed: reduce it")
            if max(width, height) < SIDE_MIN:
                raise UserError(f"{path} has {width} x {height} pixels, too few to show a digit; expected at least {SIDE_MIN} on one side")
            # This marker starts a scan of a JPEG; its compressed data do not contain it. The name of the format may also be MPO.
            scans = content.count(b"\xff\xda") if content.startswith(b"\xff\xd8") else 1
            if scans > _SCANS_MAX or scans * width * height > 15 * PIXELS_MAX:
                raise UserError(f"{path} is a progressive JPEG of {scans:,} scans, which takes too long to decode: save it as a plain JPEG")
            picture.draft(None, (_KEPT_SIDE, _KEPT_SIDE))  # lets a JPEG be decoded at an eighth, a quarter or half of its size
            picture.load()
            with contextlib.suppress(Exception):  # damaged Exif data say nothing; the picture itself may still be valid
                ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode.startswith("I"):  # 16-bit grey, of which sensors fill few bits: the darkest becomes black, the brightest white
                picture = Image.fromarray(cv2.normalize(np.asarray(picture), np.empty(0), 0, 255, cv2.NORM_MINMAX, cv2.CV_8U))
            mode = "RGBA" if picture.has_transparency_data else "L" if picture.mode == "L" else "RGB"
            picture = _reduce(picture if picture.mode == mode else picture.convert(mode), _KEPT_SIDE)
            return _flatten(picture) if mode == "RGBA" else picture.convert("RGB")
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has more than the {PIXELS_MAX:,} pixels that are allowed: reduce it") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a readable picture, or a damaged one; allowed: {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow raises many kinds, by format and by what is wrong with the file
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"{path} is damaged or cut short: {reason}") from error


def _reduce(picture: Image.Image, side: int) -> Image.Image:
    """`picture` with its longer side at most `side`, each pixel the mean of those that it covers."""
    scale = min(1.0, side / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BOX)


def _flatten(picture: Image.Image) -> Image.Image:
    """An RGBA picture in mode RGB, filled with white or black: with that which makes fewer edges for its contrast, so no outlines."""

    def measure_edges(filled: Image.Image) -> float:
        grey = np.asarray(filled.convert("L"), dtype=np.float32)
        edges = sum(float(np.abs(np.diff(grey, axis=axis)).sum()) for axis in (0, 1))
        contrast = float(np.ptp(grey))
        return edges / contrast if contrast > 255 * _CONTRAST_MIN else np.inf

    grounds = [Image.new("RGBA", picture.size, colour) for colour in ("white", "black")]
    return min((Image.alpha_composite(ground, picture).convert("RGB") for ground in grounds), key=measure_edges)


def _bring_to_form(picture: Image.Image) -> Bytes:
    """The digit in an RGB picture, as MNIST has it: uint8 [28, 28]."""
    grey = _make_grey(picture)
    far = _bring_to_size(grey)
    ink = _find_ink(far, np.ones(far.shape, np.bool_), max(far.shape) / 4)
    # Once more from near: with more pixels for a small digit, and a ground that follows the light more closely.
    scale = max(grey.shape) / max(far.shape)
    left, top, width, height = (round(length * scale) for length in cv2.boundingRect((ink > 0).astype(np.uint8)))
    margin = round(0.35 * max(width, height))
    cut = slice(max(0, top - margin), top + height + margin), slice(max(0, left - margin), left + width + margin)
    found = cv2.resize(cv2.dilate((ink > 0).astype(np.uint8), np.ones((5, 5))), grey.shape[::-1])[cut]
    near = _bring_to_size(grey[cut])
    stroke = 2 * _measure_depths(ink > 0.4).max() * scale * max(near.shape) / max(found.shape)
    ink = _find_ink(near, cv2.resize(found, near.shape[::-1]) > 0, float(stroke))
    left, top, width, height = cv2.boundingRect((ink > 0).astype(np.uint8))
    return _center(ink[top : top + height, left : left + width])


def _make_grey(picture: Image.Image) -> Bytes:
    """The colour of an RGB picture in which the ink differs most from its ground [h, w], inverted where the ink is the brighter."""
    best, chosen, inverted = 0.0, picture.convert("L"), False
    for colour in (chosen, *picture.split()):
        view = np.asarray(_reduce(colour, _VIEW_SIDE))
        # In a wide neighbourhood, most is ground.
        half = max(1, int(0.35 * max(view.shape)))
        ground = cv2.medianBlur(np.pad(view, half, "symmetric"), 2 * half + 1)[half:-half, half:-half]
        differences = ground.astype(np.float64) - view
        contrast = float(np.sort(np.abs(differences), axis=None)[-max(3, differences.size // 500) :].mean())
        if contrast > 1.2 * best:  # all colours together, which come first, have less noise than one
            best, chosen, inverted = contrast, colour, bool((differences**3).sum() < 0)
    return 255 - np.asarray(chosen) if inverted else np.asarray(chosen)


def _bring_to_size(grey: Bytes) -> Bytes:
    """`grey` [h, w] with its longer side near _VIEW_SIDE. A small picture is enlarged in blocks: lines and gaps are measured in pixels."""
    blocks = max(1, _VIEW_SIDE // max(grey.shape))
    return np.asarray(_reduce(Image.fromarray(grey), _VIEW_SIDE)).repeat(blocks, axis=0).repeat(blocks, axis=1)


def _measure_depths(mask: Mask) -> Floats:
    """How far each pixel of `mask` [h, w] lies from what is outside of it: in the middle of a stroke, half its width."""
    return np.asarray(cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1], np.float32)


def _find_ink(grey: Bytes, area: Mask, width: float) -> Floats:
    """How much ink there is in each pixel of `grey` [h, w]: 0 for the ground, about 1 for a stroke.

    The strokes are at most `width` pixels wide; what lies outside of `area` does not belong to the digit. Raises `_NoDigitError`.
    """
    # The ground is what remains when all is filled that is dark and narrower than the kernel. The edges of shadows stay where they are.
    half = int(width + 3)
    padded = np.pad(cv2.medianBlur(grey, 3), half, "edge")
    ground = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, np.ones((2 * half + 1, 2 * half + 1)))[half:-half, half:-half].astype(np.float32)
    # Light falls on ink and paper alike, so their ratio counts. The bound keeps the noise of what is nearly black small.
    signal, noise = _normalize((ground - grey) / np.maximum(ground, 64), area)
    # Lines may be darker than the ink: without them the scale is another.
    signal, noise = _normalize(_erase_lines(signal, max(0.2, 3 * noise)), area)
    threshold = max(0.4, 3 * noise)
    kept = _choose_parts((signal > threshold) & area)
    # The soft edges of the strokes belong to the ink, too. What is farther away and faint is lines of the paper, shadows, traces of JPEG.
    reach = max(1, round(max(cv2.boundingRect(kept.astype(np.uint8))[2:]) / 16))
    near = cv2.dilate(kept.astype(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1))) > 0
    faint = signal[~near & (signal < threshold)]
    floor = max(0.06, 3 * noise, float(np.percentile(faint, 98)) if faint.size else 0.0)
    return np.where(near, ((signal - floor) / (1 - floor)).clip(0, 1), 0)


def _normalize(signal: Floats, area: Mask) -> tuple[Floats, float]:
    """`signal` [h, w] with the ground at 0 and the darkest ink in `area` at 1, and the noise of the ground on that scale."""
    most = np.sort(signal[area])[-max(3, signal.size // 1000) :].mean()
    rest = signal[signal < most / 2]
    if most < _CONTRAST_MIN or not rest.size:
        raise _NoDigitError("it is of one colour nearly all over")
    ground = np.median(rest)
    signal = (signal - ground) / (most - ground)
    noise = 1.4826 * float(np.median(np.abs(signal[signal < 0.5])))  # from the median deviation to the standard deviation
    if noise > _NOISE_MAX:
        raise _NoDigitError("it is too uneven, or too noisy")
    return signal, noise


def _erase_lines(signal: Floats, threshold: float) -> Floats:
    """`signal` [h, w] without the thin straight lines that go from edge to edge, of ruled paper, tables, creases. Strokes across them stay.

    In a picture turned by the angle of a line, the line is a few rows that are filled from end to end between rows that are not.
    """
    height, width = signal.shape
    side, size = max(height, width), int(np.hypot(height, width)) + 2
    mask = cv2.dilate(np.where(signal > threshold, 255, 0).astype(np.uint8), np.ones((3, 3)))
    rim, beside = side // 25, max(2, side // 50)
    if mask.sum() == mask[rim : height - rim, rim : width - rim].sum():
        return signal  # nothing comes near the edge
    lines = np.zeros_like(mask)
    for angle, chords in enumerate(_measure_chords(width, height, size)):
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1)
        turn[:, 2] += (size - width) / 2, (size - height) / 2
        turned = cv2.warpAffine(mask, turn, (size, size))
        turned = cv2.morphologyEx(turned, cv2.MORPH_CLOSE, np.ones((1, max(3, rim))))  # joins dots
        filled = cv2.reduce(turned, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[:, 0] / 255 / np.maximum(chords, 1)
        bounds = np.flatnonzero(np.diff((filled > 0.95) & (chords > 0.8 * min(height, width)), prepend=False, append=False))
        for first, end in bounds.reshape(-1, 2).tolist():
            # A stroke that fills the picture is wider than a line: some of it lies beside these rows.
            if end - first <= 3 + _LINE_MAX * side and max(filled[first - beside], filled[(end - 1 + beside) % size]) < 0.5:
                ends = cv2.invertAffineTransform(turn) @ [[0, size], [(first + end - 1) / 2] * 2, [1, 1]]
                left, right = np.rint(ends).astype(int).T.tolist()
                cv2.line(lines, left, right, 255, end - first + 2)
    values = signal[(lines > 0) & (signal > threshold)]
    if not values.size:
        return signal
    # A stroke that is darker than the line can still be seen in it; any other is filled in from both sides.
    level = float(np.percentile(values, 80))
    lines[signal > level + max(0.25, (1 - level) / 2)] = 0
    return cv2.inpaint((signal.clip(0, 1) * 255).astype(np.uint8), lines, 3, cv2.INPAINT_TELEA).astype(np.float32) / 255


def _measure_chords(width: int, height: int, size: int) -> Floats:
    """How much of each row of a square of side `size` a picture in its middle covers, turned by 0 to 179 degrees [180, size]."""
    angle = np.radians(np.arange(180))[:, None]
    row = np.arange(size) - (size - 1) / 2
    begin, end = np.full((180, size), -np.inf), np.full((180, size), np.inf)
    # Along the row, one coordinate of the picture grows with the cosine and the other with the sine.
    for length, along, across in ((width, np.cos(angle), -np.sin(angle)), (height, np.sin(angle), np.cos(angle))):
        along = np.where(np.abs(along) < 1e-9, 1e-9, along)
        bounds = np.sort([(side * length / 2 - across * row) / along for side in (-1, 1)], axis=0)
        begin, end = np.maximum(begin, bounds[0]), np.minimum(end, bounds[1])
    return np.maximum(end - begin, 0)


def _choose_parts(mask: Mask) -> Mask:
    """The connected parts of `mask` [h, w] that form one digit: without specks, frames, underlines, and what comes in over the edge."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    left, top, width, height, area = stats.T
    area[0] = 0  # the ground
    for part in np.flatnonzero(area > 0.05 * area.max()):
        if _is_frame(labels == part):
            area[part] = 0
    rim = max(mask.shape) // 50
    edges = (left <= rim, top <= rim, left + width + rim >= mask.shape[1], top + height + rim >= mask.shape[0])
    touched = np.sum(edges, axis=0)
    inside = np.where(touched, 0, area)
    main = inside.argmax()
    if inside[main] > 0.1 * area.max():
        longest, shortest = np.maximum(width, height), np.minimum(width, height)
        for part in np.flatnonzero((area > 0.3 * inside[main]) & (touched == 1) & (shortest > 0.25 * longest[main])):
            if 2 * _measure_depths(labels == part).max() < 0.35 * longest[part]:  # no thumb, but strokes
                raise _NoDigitError(_SEVERAL)
        area = inside
    main = area.argmax()
    area = np.where((width > 5 * height) & (top >= top[main] + height[main]), 0, area)  # an underline
    kept = area > 0.05 * area.max()
    if not kept.any():
        raise _NoDigitError("there are only lines in it")
    _check_digit(kept[labels], int(kept.sum()))
    return kept[labels]


def _is_frame(part: Mask) -> bool:
    contours, _ = cv2.findContours(part.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    area = cv2.contourArea(contours[0])
    width, height = cv2.minAreaRect(contours[0])[1]
    return min(width, height) > 8 and area > 0.9 * width * height and part.sum() < 0.5 * area


def _check_digit(mask: Mask, count: int) -> None:
    """Raise `_NoDigitError` where the `count` parts in `mask` [h, w] do not look like one digit. Of MNIST's, a few in a thousand fail."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    longest, area, depths = max(width, height), int(mask.sum()), _measure_depths(mask)
    margins = left, top, mask.shape[1] - left - width, mask.shape[0] - top - height

    def join(part: float) -> NDArray[Any]:
        """The heights of the parts that remain where gaps are closed up to `part` of the digit's size, the highest first."""
        reach = max(2, round(part * np.sqrt(width * height)))
        joined = cv2.dilate(np.pad(mask, reach).astype(np.uint8), np.ones((reach, reach)))
        return np.sort(cv2.connectedComponentsWithStats(joined)[2][1:, cv2.CC_STAT_HEIGHT])[::-1]

    contours, (hierarchy,) = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    loops = [cv2.contourArea(contour) for contour, (*_, parent) in zip(contours, hierarchy, strict=True) if parent >= 0]
    # A gap in a stroke is narrow. What is farther away may be a detached bar of the digit, which is low.
    heights = join(0.08)
    for wrong, reason in (
        (count > 6 or len(heights) > 4 or len(join(0.2)) > 1 or (heights[1:] > 0.5 * heights[0]).any(), _SEVERAL),
        (width > 2 * height, "what is in it is wider than a digit"),
        (min(margins) <= max(mask.shape) // 100 and max(margins) > 0.3 * max(mask.shape), "what is in it goes over the edge"),
        (2 * depths.max() > 0.55 * longest or (width > height / 2 and area > 0.75 * width * height), "there is only a blot in it"),
        # The mean depth in a stroke is a quarter of its width, and its area over its width is its length.
        (area / (4 * depths[mask].mean()) > 3 * longest, "what is in it has more strokes than a digit"),
        (sum(loop > 0.006 * longest**2 for loop in loops) > 2, "what is in it has more loops than a digit"),
    ):
        if wrong:
            raise _NoDigitError(reason)


def _center(ink: Floats) -> Bytes:
    """`ink` with a longer side of 20 pixels in 28 x 28, its centre of mass as near to row 14 and column 14 as whole pixels allow."""
    scale = 20 / max(ink.shape)
    method = Image.Resampling.BOX if scale <= 1 else Image.Resampling.BICUBIC
    size = max(1, round(ink.shape[1] * scale)), max(1, round(ink.shape[0] * scale))
    small = np.asarray(Image.fromarray(ink.astype(np.float32)).resize(size, method))
    # A thin stroke covers a pixel of this size only in part; those of MNIST are all bright.
    small = (small / small.max()).clip(0, 1)
    middle = [np.average(places, weights=small) for places in np.indices(small.shape)]
    top, left = (min(max(0, round(14 - at)), 28 - length) for at, length in zip(middle, small.shape, strict=True))
    image = np.zeros((28, 28), dtype=np.uint8)
    image[top : top + small.shape[0], left : left + small.shape[1]] = (small * 255).round()
    return image
