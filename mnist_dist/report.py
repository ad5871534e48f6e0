"""One self-contained page of a run: `python -m mnist_dist.report runs/NAME` writes `report.html` into its folder.

It loads nothing: the pictures are in it. The same run gives the same bytes.
"""

if __name__ == "__main__":
    from mnist_dist.program import end_on_interrupt

    end_on_interrupt()


import base64
import logging
import os
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import torch

from mnist_dist.config import Config
from mnist_dist.console import format_duration
from mnist_dist.errors import RunError, UserError
from mnist_dist.files import describe_error, read_file, write_atomically
from mnist_dist.plots import draw_comparison, draw_run, print_written, render, save_figures
from mnist_dist.record import PLOTS, REPORT_FILE, Run, read_run

COMPARISON_FILE = "compare.html"
_GENERATOR = b'<meta name="generator" content="mnist_dist">'
_COMPARISON_BYTES_MAX = 64 << 20

_log = logging.getLogger(__name__)

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="mnist_dist">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1f2328; --muted: #59636e; --line: #d8dee4; --paper: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --muted: #9198a1; --line: #30363d; --paper: #0d1117; --card: #161b22; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.2rem; }
p { margin: .5rem 0; }
.muted, figcaption { color: var(--muted); font-size: .9rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
dl div { padding: .6rem .9rem; border-radius: .5rem; background: var(--card); }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
figure { margin: 0 0 1.5rem; }
img { display: block; width: 100%; min-width: 36rem; height: auto; border-radius: .5rem; background: #ffffff; }
img.square { max-width: 40rem; min-width: 26rem; }
figcaption { margin-top: .4rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; overflow-wrap: normal; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
.number { text-align: right; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="muted">$path</p>
<p>$status</p>
<dl>
$facts
</dl>
</header>
<main>
$sections
</main>
</body>
</html>
""")


def write_report(run_dir: Path, device: torch.device | str = "cpu") -> Path:
    """Write the pictures of a run into its folder `plots`, and `report.html` with all of them; the path of the latter.

    Raises `UserError` where `run_dir` is no run folder or is damaged, `RunError` where the files cannot be written.
    """
    run = read_run(run_dir)
    drawing = draw_run(run, device)
    for sentence in drawing.left_out:
        _log.warning("left out %s", sentence)
    pictures = {path.stem: path.read_bytes() for path in save_figures(drawing.figures, run.path / PLOTS)}
    path = run.path / REPORT_FILE
    try:
        write_atomically(path, make_page(run, pictures, drawing.left_out).encode(errors="replace"))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def make_page(run: Run, pictures: dict[str, bytes], left_out: Sequence[str]) -> str:
    """The page as HTML. `pictures`: the bytes of PNG files by the names in `mnist_dist.plots`."""

    def show(*names: str) -> str:
        return "".join(_figure(name, pictures[name], run.config) for name in names if name in pictures)

    titles_and_contents = [
        ("Curves", show("curves")),
        (f"{run.config.evaluated_on.capitalize()} images by class", show("confusion_matrix") + _class_table(run)),
        ("Predictions", show("incorrect_classification", "correct_classification")),
        ("Training images", show("data_sample", "augmented_sample")),
        ("Left out", "".join(f"<p>{escape(sentence)}</p>\n" for sentence in left_out)),
        ("Starts", _starts_table(run)),
        ("Options", _options_table(run.config)),
        ("Versions", _versions_table(run)),
    ]
    sections = [f"<section>\n<h2>{title}</h2>\n{content}</section>" for title, content in titles_and_contents if content]
    status, facts = _summarize(run)
    return _PAGE.substitute(
        title=escape(run.path.resolve().name),
        path=escape(str(run.path)),
        status=escape(status),
        facts="\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()),
        sections="\n".join(sections),
    )


def _summarize(run: Run) -> tuple[str, dict[str, str]]:
    total, result = run.config.total_steps, run.result
    if result is None:
        step = max([row["step"] for row in run.rows], default=0)
        return f"Not finished: the record ends at step {step:,} of {total:,}.", {}
    accuracy, loss, errors, images = (result[f"{run.config.evaluated_split}/{name}"] for name in ("accuracy", "loss", "errors", "images"))
    wrong = f"{errors:,} of {images:,} {run.config.evaluated_on} images are wrong"
    return f"Finished after {result['step']:,} steps: {wrong}.", {
        f"{run.config.evaluated_on} accuracy": f"{accuracy:.2%}",
        f"{run.config.evaluated_on} loss": f"{loss:.4f}",
        "training time": format_duration(result["elapsed_s"]),
        "images per second": f"{result['images_per_s']:,.0f}",
        "processes": f"{result['world_size']:,} ({result.get('device', '?')}, {result.get('precision', '?')})",
    }


def _caption(name: str, config: Config) -> str:
    if name == "curves":
        return (
            f"The training loss is of augmented images and has label smoothing {config.label_smoothing:g}; "
            f"the {config.evaluated_on} loss has neither: compare each with itself alone."
        )
    if name == "incorrect_classification":
        return "Computed again in float32: where two classes are nearly equal, the count may differ from the run's own."
    return ""


def _figure(name: str, png: bytes, config: Config, caption: str | None = None) -> str:
    image = f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{name.replace("_", " ")}"'
    shape = ' class="square"' if name == "confusion_matrix" else ""
    caption = _caption(name, config) if caption is None else caption
    below = f"<figcaption>{escape(caption)}</figcaption>\n" if caption else ""
    return f'<figure>\n<div class="scroll">{image}{shape}></div>\n{below}</figure>\n'


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    kinds = [' class="number"' if all(isinstance(value, int | float) for value in column) else "" for column in zip(*rows, strict=True)]

    def line(cell: str, values: Sequence[object]) -> str:
        cells = [f"<{cell}{kind}>{escape(str(value))}</{cell}>" for kind, value in zip(kinds, values, strict=True)]
        return f"<tr>{''.join(cells)}</tr>\n"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>\n<thead>{line("th", head)}</thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def _class_table(run: Run) -> str:
    if run.result is None:
        return ""
    rows = []
    for label, counts in enumerate(run.result[f"{run.config.evaluated_split}/confusion_matrix"]):
        images, wrong = sum(counts), sum(counts) - counts[label]
        other = max((i for i in range(len(counts)) if i != label), key=counts.__getitem__)
        taken_for = f"{run.config.class_names[other]} ({counts[other]})" if wrong else "none"
        rows.append((run.config.class_names[label], images, wrong, f"{1 - wrong / images:.2%}" if images else "no images", taken_for))
    return _table(("class", "images", "wrong", "accuracy", "most often taken for (times)"), rows)


def _options_table(config: Config) -> str:
    values = config.model_dump(mode="json")
    words = {None: "none", True: "true", False: "false"}
    return _table(
        ("option", "value", "meaning"),
        [
            (name, words[values[name]] if isinstance(values[name], bool | None) else str(values[name]), field.description)
            for name, field in type(config).model_fields.items()
        ],
    )


def _versions_table(run: Run) -> str:
    versions = (run.result or {}).get("versions")
    return _table(("package", "version"), list(versions.items())) if versions and isinstance(versions, dict) else ""


def _starts_table(run: Run) -> str:
    if not run.starts:
        return ""
    names = list(dict.fromkeys(name for start in run.starts for name in start))
    reasons = {end["start"]: end["why"] for end in run.ends}
    rows = []
    for number, start in enumerate(run.starts, start=1):
        unknown = "not noted: killed, or a lost node" if number < len(run.starts) else "it goes on, or was killed"
        rows.append([*(start.get(name, "") for name in names), reasons.get(number, unknown)])
    return _table([*names, "ended"], rows)


def write_comparison(run_dirs: Sequence[Path]) -> Path:
    """Write `compare.html`, one page about several runs, beside the folder of the first; its path.

    Raises `UserError` where one is no run folder, is damaged or is named twice, or where somebody's own file has that name; `RunError`
    where it cannot be written.
    """
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise UserError("a run is named twice; expected different runs to compare")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    path = run_dirs[0].absolute().parent / COMPARISON_FILE
    try:
        if os.path.lexists(path) and _GENERATOR not in read_file(path, _COMPARISON_BYTES_MAX)[:500]:
            raise UserError(f"{path} exists and is not a page of this program: move it away")
        write_atomically(path, make_comparison(runs).encode(errors="replace"))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {describe_error(error)}") from error
    return path


def make_comparison(runs: Sequence[Run]) -> str:
    """The page as HTML: results, curves over each other, and the options in which the runs differ."""
    names = _name_apart([run.path for run in runs])
    rows = [(name, *_describe_result(run)) for name, run in zip(names, runs, strict=True)]
    header = ("run", "state", "accuracy", "loss", "step", "training time", "images/s", "processes", "starts")
    dumps = [run.config.model_dump(mode="json") for run in runs]
    differing = [option for option in dumps[0] if option != "run_dir" and len({str(dump[option]) for dump in dumps}) > 1]
    picture = _figure("curves", render(draw_comparison(names, runs)), runs[0].config, "")
    sections = [("Results", _table(header, rows)), ("Curves", picture)]
    if differing:
        differences = [(option, *(dump[option] for dump in dumps)) for option in differing]
        sections.append(("Options that differ", _table(("option", *names), differences)))
    return _PAGE.substitute(
        title=f"{len(runs)} runs",
        path=escape(", ".join(str(run.path) for run in runs)),
        status="" if differing else "All options are the same.",
        facts="",
        sections="\n".join(f"<section>\n<h2>{title}</h2>\n{content}</section>" for title, content in sections),
    )


def _name_apart(paths: Sequence[Path]) -> list[str]:
    """A name for each folder: its own where these differ, else the whole path."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _describe_result(run: Run) -> tuple[str, ...]:
    result, split = run.result or {}, run.config.evaluated_split
    last = run.rows[-1] if run.rows else {}
    evaluated = [row for row in run.rows if f"{split}/accuracy" in row]
    accuracy, loss = ((result or (evaluated[-1] if evaluated else {})).get(f"{split}/{name}") for name in ("accuracy", "loss"))
    speed = result.get("images_per_s", last.get("train/images_per_s"))
    start = run.starts[-1] if run.starts else {}
    return (
        "finished" if run.result else "not finished",
        "" if accuracy is None else f"{accuracy:.2%} ({run.config.evaluated_on})",
        "" if loss is None else f"{loss:.4f}",
        f"{result.get('step', last.get('step', 0)):,} of {run.config.total_steps:,}",
        format_duration(result["elapsed_s"]) if result else "",
        "" if speed is None else f"{speed:,.0f}",
        " ".join(str(start[name]) for name in ("world_size", "device", "precision") if name in start),
        str(len(run.starts)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 written, 2 a user's mistake, 1 the rest."""
    description = "Write report.html of a run into its folder, at any time; of several runs, compare.html beside the first."
    return print_written(
        "mnist_dist.report", description, arguments, lambda runs: [write_comparison(runs) if runs[1:] else write_report(runs[0])]
    )


if __name__ == "__main__":
    sys.exit(main())
