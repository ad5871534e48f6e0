"""Figures: their colours, their layout, and the bytes of their files. The same figure gives the same bytes.

Drawn with matplotlib's objects, never with pyplot: there is no global state, no window and no display.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mnist_dist.errors import RunError, first_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

INK, MUTED, LINE = "#1f2328", "#656d76", "#d8dee4"
BLUE, ORANGE, GREY = "#0969da", "#bc4c00", "#8c959f"
DPI = 150
PNG_START = b"\x89PNG\r\n\x1a\n"
COLUMNS, SHOWN = 10, 50  # pictures in a row, and in all, of one grid
_ZOOM = 3


@contextlib.contextmanager
def having_default_style() -> Iterator[None]:
    """Draw with matplotlib's own settings, whatever the user has set for other figures. Raises `RunError` where matplotlib fails."""
    # No figure here needs a backend, and the name of one that there is not would end the import.
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)  # lines about settings that do not count here, or a home where it can keep nothing
    try:
        import matplotlib.style
    except Exception as error:  # it wants a folder to write to
        raise RunError(f"no picture can be drawn, because matplotlib fails: {first_line(error)}") from error
    finally:
        logger.setLevel(level)
        os.environ |= {} if backend is None else {"MPLBACKEND": backend}
    if backend is not None:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # as it would have been, for who uses it in this process
    with matplotlib.style.context("default"):
        yield


def make_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, whose parts are laid out when it is drawn."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))


def calm(axes: "Axes", title: str) -> None:
    """Leave of the frame and the grid what helps to read the values."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(color=LINE, labelcolor=MUTED, labelsize=9)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def render(figure: Any) -> bytes:
    """The bytes of the PNG file of a figure; those of a file as they are."""
    if isinstance(figure, bytes):
        return figure
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a letter that the font lacks is drawn as a box, as anybody sees
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def render_pixels(pixels: "Tensor") -> bytes:
    """A PNG file of pixels uint8 [height, width] or [height, width, 3], enlarged; by Pillow alone, in milliseconds."""
    from PIL import Image

    image = Image.fromarray(pixels.cpu().numpy())
    buffer = io.BytesIO()
    image.resize((image.width * _ZOOM, image.height * _ZOOM), Image.Resampling.NEAREST).save(buffer, format="png")
    return buffer.getvalue()
