"""One self-contained page of a run: `python -m mnist_dist.report runs/NAME` writes `report.html` into its folder.

It loads nothing: the pictures are in it. The same run gives the same bytes.
"""

if __name__ == "__main__":
    import sys

    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()

    from mnist_dist.program import run_module

    sys.exit(run_module("mnist_dist.report"))


import base64
import os
import struct
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import torch

from mnist_dist.config import Config
from mnist_dist.console import format_duration
from mnist_dist.errors import RunError, UserError
from mnist_dist.evaluation import describe
from mnist_dist.figures import having_default_style, render
from mnist_dist.files import describe_error, write_atomically
from mnist_dist.options import spell
from mnist_dist.plots import (
    COMPARISON_FILE,
    draw_comparison,
    draw_run,
    is_comparison,
    list_compared,
    name_samples,
    open_run,
    print_written,
    save_drawing,
)
from mnist_dist.record import REPORT_FILE, Run, is_number, pick_measures, read_run
from mnist_dist.source import Unknown
from mnist_dist.task import Data, Panel, format_measure

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


def write_report(
    run_dir: Path,
    device: torch.device | str = "cpu",
    config: Config | None = None,
    data: Data | None = None,
    task: str | None = None,
    data_dir: str | None = None,
) -> list[Path]:
    """Write `report.html` of a run, and its pictures into the folder `plots`: the paths of all, that of the page first.

    `config` and `data` may be at hand; `task` is the name by which the user names its code, `data_dir` where its data are now.

    Raises `UserError` where `run_dir` is no run folder or is damaged, `RunError` where the files cannot be written.
    """
    run = read_run(run_dir, config) if config is not None else open_run(run_dir, task, data_dir)
    drawing = draw_run(run, device, data)
    pictures = save_drawing(run, drawing)
    path = run.path / REPORT_FILE
    try:
        write_atomically(path, make_page(run, drawing.panels, drawing.left_out).encode(errors="replace"))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    return [path, *pictures]


def make_page(run: Run, panels: Sequence[Panel], left_out: Sequence[str]) -> str:
    """The page as HTML."""
    by_title: dict[str, str] = {}
    for panel in panels:
        by_title[panel.title] = by_title.get(panel.title, "") + _show(panel)
    titles_and_contents = [
        *((escape(title), content) for title, content in by_title.items()),
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
    total, result = _describe_total(run.config), run.result
    if result is None:
        step = max([row["step"] for row in run.rows], default=0)
        return f"Not finished: the record ends at step {step:,} of {total}.", {}
    on, task = run.config.evaluated_on, run.config.task
    measures = pick_measures(result, run.config.evaluated_split)
    names = dict.fromkeys((task.best, "loss"))
    described = describe(task, measures) if not isinstance(task, Unknown) else ""
    return f"Finished after {result['step']:,} steps: {on} {described}.".replace(f": {on} .", "."), {
        **{f"{on} {name.replace('_', ' ')}": format_measure(name, measures[name]) for name in names},
        "training time": format_duration(result["elapsed_s"]),
        f"{task.samples} per second": f"{result['images_per_s']:,.0f}",
        "processes": f"{result['world_size']:,} ({result.get('device', '?')}, {result.get('precision', '?')})",
    }


def _show(panel: Panel) -> str:
    """A panel as HTML."""
    content = ""
    if panel.figure is not None:
        png = render(panel.figure)
        width, height = struct.unpack(">II", png[16:24])  # the header of a PNG file
        shape = ' class="square"' if 0.8 < width / height < 1.25 else ""
        picture = base64.b64encode(png).decode()
        content = (
            f'<div class="scroll"><img src="data:image/png;base64,{picture}" alt="{escape(panel.name.replace("_", " "))}"{shape}></div>\n'
        )
    below = f"<figcaption>{escape(panel.caption)}</figcaption>\n" if panel.caption else ""
    figure = f"<figure>\n{content}{below}</figure>\n" if content else ""
    return figure + (_table(*panel.table) if panel.table is not None else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    columns = zip(*rows, strict=True) if rows else [("",)] * len(head)
    kinds = [' class="number"' if all(type(value) in (int, float) for value in column) else "" for column in columns]

    def line(cell: str, values: Sequence[object]) -> str:
        cells = [f"<{cell}{kind}>{escape(spell(value))}</{cell}>" for kind, value in zip(kinds, values, strict=True)]
        return f"<tr>{''.join(cells)}</tr>\n"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>\n<thead>{line("th", head)}</thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def _options_table(config: Config) -> str:
    values, fields = config.values(), config.fields()
    return _table(
        ("option", "value", "meaning"),
        [
            ("task", config.task.name, "what is trained"),
            *((name, values[name], field.description or "") for name, field in fields.items()),
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
        unknown = "not noted: killed, or a lost node" if number < len(run.starts) else "still running, or killed"
        rows.append([*(start.get(name, "") for name in names), reasons.get(number, unknown)])
    return _table([*names, "ended"], rows)


def write_comparison(run_dirs: Sequence[Path], task: str | None = None) -> Path:
    """Write `compare.html`, one page about several runs, beside the folder of the first; its path.

    `task` is the name by which the user names the code of their task.

    Raises `UserError` where one is no run folder, is damaged or is named twice, or where somebody's own file has that name; `RunError`
    where it cannot be written.
    """
    paths = [path.resolve() for path in run_dirs]
    if twice := [path for number, path in enumerate(paths) if path in paths[:number]]:
        raise UserError(f"{twice[0]} is named twice; expected different runs to compare")
    runs = [open_run(run_dir, task) for run_dir in run_dirs]
    path = run_dirs[0].absolute().parent / COMPARISON_FILE
    try:
        if os.path.lexists(path) and not is_comparison(path):
            raise UserError(f"{path} exists and is not a page of this program: move it away")
        write_atomically(path, make_comparison(runs).encode(errors="replace"))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {describe_error(error)}") from error
    return path


@having_default_style()
def make_comparison(runs: Sequence[Run]) -> str:
    """The page as HTML: results, curves over each other, and the options in which the runs differ."""
    names = _name_apart([run.path for run in runs])
    measures = list_compared(runs)
    rows = [(name, *_describe_result(run, measures)) for name, run in zip(names, runs, strict=True)]
    shown = [measure.replace("_", " ") for measure in measures]
    header = ("run", "state", *shown, "step", "training time", f"{name_samples(runs)}/s", "processes", "starts")
    dumps = [run.config.values() for run in runs]
    options = dict.fromkeys(option for dump in dumps for option in dump if option != "run_dir")
    differing = [option for option in options if len({str(dump.get(option)) for dump in dumps}) > 1]
    picture = _show(Panel("Curves", "curves", figure=draw_comparison(names, runs)))
    sections = [("Results", _table(header, rows)), ("Curves", picture)]
    if differing:
        differences = [(option, *(dump.get(option, "") for dump in dumps)) for option in differing]
        sections.append(("Options that differ", _table(("option", *names), differences)))
    return _PAGE.substitute(
        title=f"{len(runs)} runs",
        path=escape(", ".join(str(run.path) for run in runs)),
        status="" if differing else "All options are the same.",
        facts="",
        sections="\n".join(f"<section>\n<h2>{title}</h2>\n{content}</section>" for title, content in sections),
    )


def _describe_total(config: Config) -> str:
    return f"{config.total_steps:,}" if config.has_sizes else "an unknown number"


def _name_apart(paths: Sequence[Path]) -> list[str]:
    """A name for each folder: its own where these differ, else the whole path."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _describe_result(run: Run, measures: Sequence[str]) -> tuple[str, ...]:
    result, config = run.result or {}, run.config
    last = run.rows[-1] if run.rows else {}
    found = result or next((row for row in reversed(run.rows) if config.best in row), {})
    values = {name: found.get(f"{config.evaluated_split}/{name}") for name in measures}
    speed = result.get("images_per_s", last.get("train/images_per_s"))
    start = run.starts[-1] if run.starts else {}
    return (
        "finished" if run.result else "not finished",
        *(f"{format_measure(name, value)} ({config.evaluated_on})" if is_number(value) else "" for name, value in values.items()),
        f"{result.get('step', last.get('step', 0)):,} of {_describe_total(config)}",
        format_duration(result["elapsed_s"]) if result else "",
        "" if speed is None else f"{speed:,.0f}",
        " ".join(str(start[name]) for name in ("world_size", "device", "precision") if name in start),
        str(len(run.starts)),
    )


def _write(run_dirs: list[Path], task: str | None, data_dir: str | None) -> list[Path]:
    return [write_comparison(run_dirs, task)] if run_dirs[1:] else write_report(run_dirs[0], task=task, data_dir=data_dir)[:1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 written, 2 a user's mistake, 1 the rest."""
    description = "Write report.html of a run into its folder, at any time; of several runs, compare.html beside the first."
    return print_written("mnist_dist.report", description, arguments, _write)
