"""Draws pictures of MNIST digits as people take them, pictures without a digit or with several, and a folder of pictures by class.

Sizes, pens, grey levels and light are drawn from one generator, so that a seed gives a picture.
"""

import io
import itertools

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont


class Page:
    """A sheet of paper [h, w] on the scale 0 to 1 on which ink, lines and shadows are laid; `box` is where the digit lies."""

    def __init__(self, rng, height, width, paper=None):
        self.rng = rng
        self.grey = np.full((height, width), rng.uniform(0.85, 1) if paper is None else paper)
        self.ink = rng.uniform(0, 0.3)
        self.box = (0, 0, width, height)

    @property
    def side(self):
        return min(self.grey.shape)

    def lay(self, cover, ink=None):
        self.grey = self.grey * (1 - cover) + (self.ink if ink is None else ink) * cover
        return self

    def draw(self, lines, thickness, ink=None, dots=0):
        """Straight lines (x, y, x, y) in pixels, of any thickness and with soft edges; `dots`: the length of a dash, 0 for none."""
        cover = np.zeros(self.grey.shape, np.uint8)
        for line in lines:
            x0, y0, x1, y1 = (float(value) for value in line)
            count = max(1, int(np.hypot(x1 - x0, y1 - y0) / dots)) if dots else 1
            points = np.linspace((x0, y0), (x1, y1), count + 1)
            for start, end in list(itertools.pairwise(points))[:: 2 if dots else 1]:
                ends = [tuple(round(value * 16) for value in point) for point in (start, end)]
                cv2.line(cover, *ends, 255, max(1, round(thickness)), cv2.LINE_AA, 4)
        return self.lay(cover / 255, ink)

    def shade(self, light):
        self.grey = self.grey * light
        return self

    def grain(self, deviation):
        self.grey = self.grey + self.rng.normal(0, deviation, self.grey.shape)
        return self

    def picture(self):
        return Image.fromarray((self.grey.clip(0, 1) * 255).round().astype(np.uint8))


def enlarge(digit, size, pen=0.0):
    """The ink of `digit` uint8 [28, 28], cropped, its longer side `size` pixels: 0 to 1. `pen` widens (or thins) the strokes, of `size`."""
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    digit = np.pad(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    scale = size / (max(digit.shape) - 2)
    shape = (max(1, round(digit.shape[1] * scale)), max(1, round(digit.shape[0] * scale)))
    method = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    cover = np.asarray(Image.fromarray(digit).resize(shape, method), np.float32) / 255
    width = round(abs(pen) * size)
    if width:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width + 1, width + 1))
        if pen > 0:
            cover = cv2.dilate(np.pad(cover, width), kernel)
        elif cv2.erode(cover, kernel).max() > 0.8:
            cover = cv2.erode(cover, kernel)
    return cover.clip(0, 1)


def write(rng, digit, side=None, part=None, pen=0.0, paper=None, square=True, at=None):
    """A page with one digit on it that takes `part` of its side."""
    side = side or int(rng.integers(56, 500))
    cover = enlarge(digit, max(14, round(side * (part or rng.uniform(0.35, 0.7)))), pen)
    height = max(side, cover.shape[0])
    width = max(side if square else round(side * rng.uniform(0.7, 1.8)), cover.shape[1])
    page = Page(rng, height, width, paper)
    y, x = (height - cover.shape[0]) / 2, (width - cover.shape[1]) / 2
    top, left = (
        (round(y * rng.uniform(0.6, 1.4)), round(x * rng.uniform(0.6, 1.4))) if at is None else (round(2 * y * at), round(2 * x * at))
    )
    whole = np.zeros((height, width))
    whole[top : top + cover.shape[0], left : left + cover.shape[1]] = cover
    page.box = (left, top, left + cover.shape[1], top + cover.shape[0])
    return page.lay(whole)


def frame(page, sides="LTRB", thickness=None, inset=None, ink=None):
    rng = page.rng
    height, width = page.grey.shape
    thickness = thickness or max(1, page.side * rng.uniform(0.008, 0.04))
    inset = rng.choice([0, 0, 0.02, 0.05]) * page.side if inset is None else inset
    left, top, right, bottom = page.box
    room = min(left, top, width - right, height - bottom)
    a = min(inset, max(0, room - 2 * thickness)) + thickness / 2 - 0.5
    b, c, over = height - 1 - a, width - 1 - a, thickness if inset else page.side
    ends = {"L": (a, a, a, b), "R": (c, a, c, b), "T": (a, a, c, a), "B": (a, b, c, b)}
    if len(sides) < 4:  # lines of a table go on to the picture's edge
        ends = {"L": (a, -over, a, b + over), "R": (c, -over, c, b + over), "T": (-over, a, c + over, a), "B": (-over, b, c + over, b)}
    return page.draw([ends[side] for side in sides], thickness, rng.uniform(0, 0.5) if ink is None else ink)


def rule(page, squared=False, ink=None, thickness=None, tilt=0.0, dots=0):
    rng = page.rng
    height, width = page.grey.shape
    gap = page.side * rng.uniform(0.08, 0.3)
    thickness = thickness or max(1, page.side * rng.uniform(0.003, 0.012))
    far = height + width
    lines = [(-far, y - far * tilt, far, y + far * tilt) for y in np.arange(rng.uniform(0, gap) - gap, height + gap, gap)]
    if squared:
        lines += [(x + far * tilt, -far, x - far * tilt, far) for x in np.arange(rng.uniform(0, gap) - gap, width + gap, gap)]
    return page.draw(lines, thickness, rng.uniform(0.15, 0.75) if ink is None else ink, dots)


def shadow(page, angle=None, soft=0.0, depth=None):
    """A straight edge through the middle half of the page; on one side of it the light is `depth`."""
    rng = page.rng
    height, width = page.grey.shape
    angle = rng.choice([0, 90, 180, 270]) if angle is None else angle
    y, x = np.mgrid[:height, :width]
    along = (x - width * rng.uniform(0.35, 0.65)) * np.cos(np.radians(angle)) + (y - height * rng.uniform(0.35, 0.65)) * np.sin(
        np.radians(angle)
    )
    step = (along / (soft * page.side) + 0.5).clip(0, 1) if soft else along > 0
    return page.shade(1 - (1 - (depth or rng.uniform(0.35, 0.75))) * step)


def gradient(page, noise=None):
    rng = page.rng
    height, width = page.grey.shape
    y, x = np.mgrid[:height, :width]
    a, b, c = rng.uniform(-0.25, 0.25, 3)
    x, y = x / width - 0.5, y / height - 0.5
    return page.shade(0.75 + a * x + b * y - abs(c) * (x * x + y * y)).grain(rng.uniform(0, 0.03) if noise is None else noise)


def crease(page, whole=True):
    rng = page.rng
    height, width = page.grey.shape
    tilt = rng.uniform(-0.35, 0.35)
    middle, thickness = rng.uniform(0.25, 0.75), max(1, page.side * rng.uniform(0.004, 0.02))
    line = (middle * width - tilt * height, -0.5 * height, middle * width + tilt * height, 1.5 * height)
    if rng.random() < 0.5:
        line = (-0.5 * width, middle * height - tilt * width, 1.5 * width, middle * height + tilt * width)
    return page.draw([line], thickness, page.grey.min() * rng.uniform(0.4, 0.85))


def thumb(page):
    rng = page.rng
    height, width = page.grey.shape
    cover = np.zeros(page.grey.shape, np.uint8)
    corner = (rng.choice([0, width]), rng.choice([0, height]))
    radius = rng.uniform(0.08, 0.16) * page.side
    cv2.ellipse(cover, tuple(map(int, corner)), (int(radius * rng.uniform(1, 1.8)), int(radius)), rng.uniform(0, 180), 0, 360, 255, -1)
    return page.lay(cv2.blur(cover, (3, 3)) / 255, rng.uniform(0, 0.5))


def underline(page):
    rng = page.rng
    left, _, right, bottom = page.box
    height = page.grey.shape[0]
    gap, thickness = rng.uniform(0.06, 0.12) * page.side, max(1, page.side * rng.uniform(0.01, 0.03))
    y = min(height - thickness, bottom + gap)
    reach = rng.uniform(0, 0.15) * page.side
    return page.draw([(left - reach, y, right + reach, y + rng.uniform(-0.01, 0.01) * page.side)], thickness, page.ink)


def stain(page, count=1):
    rng = page.rng
    height, width = page.grey.shape
    for _ in range(count):
        cover = np.zeros(page.grey.shape, np.uint8)
        radius = page.side * (rng.uniform(0.05, 0.2) if count == 1 else rng.uniform(0.004, 0.015))
        middle = (int(rng.uniform(0.1, 0.9) * width), int(rng.uniform(0.1, 0.9) * height))
        cv2.ellipse(cover, middle, (max(1, int(radius * rng.uniform(0.7, 1.4))), max(1, int(radius))), rng.uniform(0, 180), 0, 360, 255, -1)
        page.lay(cv2.GaussianBlur(cover, (0, 0), max(0.6, radius * 0.15)) / 255, rng.uniform(0.1, 0.7))
    return page


def break_strokes(page):
    """A gap in the strokes, as a dry pen leaves it."""
    rng = page.rng
    left, top, right, bottom = page.box
    x, y, angle = rng.uniform(left, right), rng.uniform(top, bottom), rng.uniform(0, np.pi)
    reach = 2 * page.side
    paper = float(np.median(page.grey))
    line = (x - reach * np.cos(angle), y - reach * np.sin(angle), x + reach * np.cos(angle), y + reach * np.sin(angle))
    return page.draw([line], max(1, (bottom - top) * rng.uniform(0.03, 0.07)), paper)


def invert(page):
    page.grey = 1 - page.grey
    return page


def tint(page):
    """Ink and paper of two colours with enough contrast."""
    rng = page.rng
    while True:
        dark, light = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
        if np.abs(dark - light).max() > 0.4:
            break
    return Image.fromarray(((dark + (light - dark) * page.grey.clip(0, 1)[..., None]) * 255).round().astype(np.uint8))


def color_lines(page, digit_ink):
    """Red or blue lines, the digit in dark blue or black."""
    rng = page.rng
    lines = Page(rng, *page.grey.shape, 1.0)
    rule(lines, squared=rng.random() < 0.5, ink=0.0)
    lined = lines.grey[..., None]
    line = np.array([[0.9, 0.3, 0.3], [0.4, 0.55, 0.9]][rng.integers(2)])
    paper = lined * 0.96 + (1 - lined) * line
    cover = ((page.grey.max() - page.grey) / np.ptp(page.grey))[..., None]
    return Image.fromarray(((paper * (1 - cover) + np.array(digit_ink) * cover).clip(0, 1) * 255).astype(np.uint8))


def cut_out(page, kind):
    """White made transparent, in the ways that image programs have."""
    grey = (page.grey.clip(0, 1) * 255).astype(np.uint8)
    grey = ((grey - grey.min()) * (255 / np.ptp(grey))).astype(np.uint8)
    if kind == "trns":
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, "PNG", transparency=255)
        return Image.open(buffer)
    if kind == "trns, white ink":
        buffer = io.BytesIO()
        Image.fromarray(255 - grey).save(buffer, "PNG", transparency=0)
        return Image.open(buffer)
    colour, alpha = {
        "ink": (np.zeros_like(grey), 255 - grey),
        "white ink": (np.full_like(grey, 255), 255 - grey),
        "grey": (grey, 255 - grey),
        "hard": (grey, np.where(grey > 250, 0, 255).astype(np.uint8)),
        "half": (grey, np.where(grey > 127, 0, 255).astype(np.uint8)),
        "white ink, hard": (255 - grey, np.where(grey > 250, 0, 255).astype(np.uint8)),
    }[kind]
    return Image.fromarray(np.dstack([colour, colour, colour, alpha]))


def jpeg(picture, quality):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(quality))
    return Image.open(buffer)


def tight(page, margin=0):
    left, top, right, bottom = page.box
    page.grey = page.grey[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin]
    return page


CUT_OUTS = ("ink", "white ink", "grey", "hard", "half", "white ink, hard", "trns", "trns, white ink")


def _cut(rng, digit):
    page = write(rng, digit, paper=1.0, part=rng.uniform(0.4, 0.95))
    return cut_out(tight(page) if rng.random() < 0.3 else page, CUT_OUTS[rng.integers(len(CUT_OUTS))])


# Pictures that are read today, and must be in future.
CLEAN = {
    "as MNIST": lambda rng, digit: Image.fromarray(digit),
    "margins": lambda rng, digit: write(rng, digit, square=False).picture(),
    "wide margins": lambda rng, digit: write(
        rng, digit, side=int(rng.integers(300, 800)), part=rng.uniform(0.1, 0.3), square=False
    ).picture(),
    "tight": lambda rng, digit: tight(write(rng, digit)).picture(),
    "tight, light on dark": lambda rng, digit: invert(tight(write(rng, digit))).picture(),
    "nearly tight": lambda rng, digit: tight(write(rng, digit, part=0.7), int(rng.integers(1, 8))).picture(),
    "light on dark": lambda rng, digit: invert(write(rng, digit)).picture(),
    "photo": lambda rng, digit: jpeg(gradient(write(rng, digit)).picture(), rng.integers(50, 95)),
    "noise": lambda rng, digit: write(rng, digit).grain(rng.uniform(0.03, 0.08)).picture(),
    "colours": lambda rng, digit: tint(write(rng, digit)),
    "cut out": _cut,
    "poor JPEG": lambda rng, digit: jpeg(write(rng, digit).picture(), rng.integers(15, 50)),
    "thin pen": lambda rng, digit: write(rng, digit, side=int(rng.integers(200, 600)), pen=-0.06).picture(),
    "thick pen": lambda rng, digit: write(rng, digit, pen=rng.uniform(0.03, 0.06)).picture(),
    "pale": lambda rng, digit: (page := write(rng, digit)) and Image.fromarray((150 + page.grey * 60).astype(np.uint8)),
    "tiny": lambda rng, digit: write(rng, digit, side=int(rng.integers(20, 40)), part=0.75).picture(),
    "huge": lambda rng, digit: write(rng, digit, side=int(rng.integers(1200, 2500))).picture(),
    "dust": lambda rng, digit: stain(write(rng, digit), 5).picture(),
}


# Pictures as people take them.
EVERYDAY = {
    "cell": lambda rng, digit: frame(write(rng, digit)).picture(),
    "cell, as dark": lambda rng, digit: (page := write(rng, digit)) and frame(page, ink=page.ink).picture(),
    "two sides": lambda rng, digit: frame(write(rng, digit), rng.choice(["LT", "LB", "RT", "RB", "LR", "TB"])).picture(),
    "one side or three": lambda rng, digit: frame(write(rng, digit), rng.choice(["L", "T", "R", "B", "LTR", "LTB"])).picture(),
    "frame at the edge": lambda rng, digit: frame(
        tight(write(rng, digit, side=int(rng.integers(56, 200)), part=0.6), int(rng.integers(8, 16))), inset=0, thickness=rng.integers(1, 5)
    ).picture(),
    "box": lambda rng, digit: frame(write(rng, digit, part=rng.uniform(0.3, 0.5)), inset=rng.uniform(20, 60)).picture(),
    "cell, tilted": lambda rng, digit: (
        frame(write(rng, digit, part=0.45), inset=0).picture().rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC, fillcolor=230)
    ),
    "light in a dark cell": lambda rng, digit: invert(frame(write(rng, digit))).picture(),
    "ruled": lambda rng, digit: rule(write(rng, digit)).picture(),
    "ruled, tilted": lambda rng, digit: rule(write(rng, digit), tilt=rng.uniform(-0.06, 0.06)).picture(),
    "ruled, thin pen": lambda rng, digit: rule(write(rng, digit, side=int(rng.integers(200, 600)), pen=-0.04)).picture(),
    "squared": lambda rng, digit: rule(write(rng, digit), squared=True).picture(),
    "dotted lines": lambda rng, digit: rule(write(rng, digit), dots=rng.uniform(3, 8)).picture(),
    "coloured lines": lambda rng, digit: color_lines(write(rng, digit), rng.choice([[0.1, 0.1, 0.1], [0.1, 0.1, 0.5]])),
    "margin line": lambda rng, digit: (
        (page := write(rng, digit))
        and page.draw(
            [(x := page.box[0] - page.rng.uniform(0.02, 0.08) * page.side, -page.side, x, 3 * page.side)], max(1, page.side * 0.01), 0.4
        ).picture()
    ),
    "shadow": lambda rng, digit: shadow(write(rng, digit)).grain(rng.uniform(0, 0.02)).picture(),
    "shadow, diagonal": lambda rng, digit: shadow(write(rng, digit), rng.uniform(0, 360)).grain(rng.uniform(0, 0.02)).picture(),
    "shadow, soft": lambda rng, digit: shadow(write(rng, digit), rng.uniform(0, 360), rng.uniform(0.05, 0.4)).grain(0.01).picture(),
    "dark corner": lambda rng, digit: thumb(write(rng, digit, part=0.45)).picture(),
    "underline": lambda rng, digit: underline(write(rng, digit, part=0.5)).picture(),
    "crease": lambda rng, digit: crease(write(rng, digit)).picture(),
    "broken strokes": lambda rng, digit: break_strokes(write(rng, digit)).picture(),
    "ruled in shadow": lambda rng, digit: shadow(rule(write(rng, digit))).picture(),
}


def blank(rng):
    side = int(rng.integers(100, 500))
    page = Page(rng, side, int(side * rng.uniform(0.7, 1.5)))
    page.box = (side // 2,) * 4
    return page


def text(rng, lines):
    page = blank(rng)
    height, width = page.grey.shape
    sheet = Image.new("L", (width, height), 0)
    size = height / (lines + 1)
    for line in range(lines):
        words = "".join(rng.choice(list("abcdefghiklmnoprstuvwABCDEGHKMNR    ")) for _ in range(60))
        ImageDraw.Draw(sheet).text((5, size * (line + 0.4)), words, 255, ImageFont.load_default(size * 0.7))
    return page.lay(np.asarray(sheet) / 255)


def scribble(rng):
    page = blank(rng)
    height, width = page.grey.shape
    points = rng.uniform(0.15, 0.85, (int(rng.integers(12, 25)), 2)) * (width, height)
    curve = np.stack([np.interp(np.linspace(0, len(points) - 1, 800), np.arange(len(points)), points[:, axis]) for axis in (0, 1)], 1)
    curve = cv2.blur(curve, (1, 25)).reshape(-1, 1, 2)
    cover = np.zeros(page.grey.shape, np.uint8)
    cv2.polylines(
        cover, [(curve * 16).round().astype(np.int32)], False, 255, max(1, round(page.side * rng.uniform(0.01, 0.03))), cv2.LINE_AA, 4
    )
    return page.lay(cover / 255)


# Pictures without a digit: name -> function of the generator.
BLANK = {
    "plain": lambda rng: blank(rng).grain(rng.uniform(0, 0.02)).picture(),
    "photo of nothing": lambda rng: jpeg(gradient(blank(rng)).picture(), 85),
    "creased": lambda rng: jpeg(crease(gradient(blank(rng), rng.uniform(0, 0.01))).picture(), 85),
    "blank ruled": lambda rng: rule(blank(rng)).picture(),
    "blank ruled, tilted": lambda rng: rule(blank(rng), tilt=rng.uniform(-0.06, 0.06)).picture(),
    "blank squared": lambda rng: rule(blank(rng), squared=True).picture(),
    "blank dotted": lambda rng: rule(blank(rng), dots=rng.uniform(3, 8)).picture(),
    "one line": lambda rng: rule(blank(rng), thickness=rng.uniform(2, 8)).picture(),
    "half in shadow": lambda rng: shadow(blank(rng), rng.choice([0, 90, 30, 60, 200])).grain(rng.uniform(0, 0.02)).picture(),
    "soft shadow": lambda rng: shadow(blank(rng), rng.uniform(0, 360), rng.uniform(0.05, 0.4)).grain(0.01).picture(),
    "stain": lambda rng: stain(blank(rng)).picture(),
    "speckles": lambda rng: stain(blank(rng), int(rng.integers(5, 60))).picture(),
    "empty cell": lambda rng: frame(blank(rng), rng.choice(["LTRB", "LT", "LR", "TB"])).picture(),
    "corner": lambda rng: thumb(blank(rng)).picture(),
    "ruled in shadow, blank": lambda rng: shadow(rule(blank(rng))).picture(),
}

# Pictures with too much: name -> function of the generator and three digits.
SEVERAL = {
    "two digits": lambda rng, digits: row(rng, digits[:2]),
    "three digits": lambda rng, digits: row(rng, digits),
    "two rows": lambda rng, digits: row(rng, digits[:2], upright=True),
    "two digits, ruled": lambda rng, digits: row(rng, digits[:2], rule),
    "two digits in a cell": lambda rng, digits: row(rng, digits[:2], frame),
    "line of text": lambda rng, digits: text(rng, 1).picture(),
    "text": lambda rng, digits: text(rng, int(rng.integers(2, 8))).picture(),
    "scribble": lambda rng, digits: scribble(rng).picture(),
}


def row(rng, digits, then=None, upright=False):
    size = int(rng.integers(50, 200))
    covers = [enlarge(digit, size) for digit in digits]
    gap, margin = round(size * rng.uniform(0.15, 0.6)), round(size * rng.uniform(0.2, 0.6))
    axis = 0 if upright else 1
    length = sum(cover.shape[axis] for cover in covers) + gap * (len(covers) - 1) + 2 * margin
    across = max(cover.shape[1 - axis] for cover in covers) + 2 * margin
    whole = np.zeros((length, across) if upright else (across, length))
    start = margin
    for cover in covers:
        height, width = cover.shape
        first = (start, margin) if upright else (margin, start)
        whole[first[0] : first[0] + height, first[1] : first[1] + width] = cover
        start += cover.shape[axis] + gap
    page = Page(rng, *whole.shape).lay(whole)
    page.box = (margin, margin, page.grey.shape[1] - margin, page.grey.shape[0] - margin)
    return (then(page) if then else page).picture()


def draw(kind, index, images, seed=0):
    """Picture `index` of `kind` and the number, in uint8 `images` [n, 28, 28], of the digit that it shows; None where it shows not one."""
    rng = np.random.default_rng([seed, *kind.encode(), index])
    numbers = rng.integers(len(images), size=3)
    if kind in BLANK:
        return BLANK[kind](rng), None
    if kind in SEVERAL:
        return SEVERAL[kind](rng, images[numbers]), None
    return {**CLEAN, **EVERYDAY}[kind](rng, images[numbers[0]]), int(numbers[0])


def write_classes(folder, counts=(("train", 16), ("test", 5)), names=("blue", "green", "red")):
    """Noise with a tint, by which a class can be told, as PNG files in folder/SPLIT/CLASS; of many sizes."""
    rng = np.random.default_rng(0)
    for split, count in counts:
        for label, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 100, (40 + number, 36 + 2 * label, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder
