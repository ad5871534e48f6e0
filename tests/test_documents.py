"""The documents: their sentences, links, commands, numbers, the tree of files and the tables of options."""

import ast
import importlib
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
import textwrap

import pytest
from cluster import ROOT

from benchmarks.common import name_settings
from launch.request import Request
from launch.submit import Chain
from launch.sweep import Sweep
from mnist_dist.config import make_config
from mnist_dist.console import format_duration
from mnist_dist.errors import UserError
from mnist_dist.options import Parser, trait

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
DOCUMENTS = [*PAGES, "benchmarks/README.md"]
WORDS_MAX = 30
README_LINES_MAX = 120
# Words of a foreign ear, and the plain English that stands in their place.
ODD = {
    r"\b(is|are) wanted\b": "expected",
    r"\bwholly?\b(?= (checkpoint|row|run)s?\b)": "valid, complete, finished",
    r"\bgo(es)? on (from|there)\b": "resumes from",
    r"\bwithout a word\b": "without recording why",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bin any world\b": "on any number of processes",
    r"\bwhatever its world\b": "on any number of processes",
    r"\bsays? so\b": "prints why",
    r"\bsilent wrong\b": "silent errors",
    r"\btells the command\b": "prints the command",
    r"\bof the (test )?images right\b": "accuracy",
    r"\b(makes|made) of (it|them|yours)\b": "name the thing",
}
# Lines of docs/options.md that may come before their option.
ANNOUNCED: set[str] = set()
# Every file in these has a line in the tree of CONTRIBUTING.md.
FOLDERS = ["mnist_dist", "mnist_dist/tasks", "mnist_dist/tasks/mnist", "launch", "slurm", "configs", "examples", "tests"]


def read(name):
    return (ROOT / name).read_text()


def list_paragraphs(text):
    """The paragraphs and list entries of a page: no headings, tables, pictures or code."""
    paragraph = []
    for line in [*text.splitlines(), ""]:
        starts_entry = re.match(r"\s*([-*]|\d+\.) ", line)
        is_prose = line.strip() and not re.match(r"#|\||!\[| {4}", line)
        if not is_prose or starts_entry:
            if paragraph:
                yield " ".join(paragraph)
            paragraph = []
        if is_prose:
            paragraph.append(re.sub(r"^\s*([-*]|\d+\.) ", "", line).strip())


def list_sentences(text):
    for paragraph in list_paragraphs(text):
        plain = re.sub(r"`[^`]*`", "code", paragraph)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain).replace("*", "")
        yield from re.split(r"(?<=[.?!])\s+", plain)


def list_commands(text):
    """The lines of code blocks that are commands of this package."""
    return [line.strip() for line in text.splitlines() if re.match(r" {4}python -m (mnist_dist|launch)\.", line)]


def find_section(text, title):
    """The part of a page below a heading."""
    start = text.index(f"\n## {title}\n")
    return text[start : text.find("\n## ", start + 1) if "\n## " in text[start + 1 :] else None]


def read_own_task():
    """The file that docs/your_own_model.md has its reader write."""
    text = read("docs/your_own_model.md")
    start = text.index("    import torch\n")
    lines = itertools.takewhile(lambda line: not line or line.startswith("    "), text[start:].splitlines())
    return textwrap.dedent("\n".join(lines)).strip() + "\n"


def list_rows(text):
    """The cells of all tables of a page."""
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("-: ")]


def test_what_is_counted_as_a_sentence():
    text = "# A title\n\nOne `a b c` two. Slurm 22.05 is\none.\n- Three [a link](b.md) four.\n\n    code here.\n\n| a | b |\n\n1. Five?\n"
    assert list(list_sentences(text)) == ["One code two.", "Slurm 22.05 is one.", "Three a link four.", "Five?"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_sentence_is_long(name):
    # What a benchmark prints above and below its table is no prose.
    text = re.sub(r"^(Intel|AMD|matrix products|- The loop reaches).*$", "", read(name), flags=re.MULTILINE)
    long = [sentence for sentence in list_sentences(text) if len(sentence.split()) > WORDS_MAX]
    assert not long, long


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_words_are_plain(name):
    text = " ".join(read(name).split())
    found = [(match[0], plain) for odd, plain in ODD.items() for match in re.finditer(odd, text, re.IGNORECASE)]
    assert not found, found


@pytest.mark.parametrize("folder", [*FOLDERS, "benchmarks"])
def test_the_words_of_code_are_plain(folder):
    for path in (ROOT / folder).glob("*"):
        if path.suffix in (".py", ".sh", ".yaml") and path.name != "test_documents.py":
            text = re.sub(r"\s*\n\s*#?\s*", " ", path.read_text())
            found = [match[0] for odd in ODD for match in re.finditer(odd, text, re.IGNORECASE)]
            assert not found, (path.name, found)


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= README_LINES_MAX


def find_anchors(text):
    """The anchors of the headings of a page, by the rule of the sites that show it."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name):
    text = re.sub(r"`[^`]*`", "", read(name))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        assert not link.startswith("http"), link
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.resolve().is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in find_anchors(target.read_text()), link


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#]+)\)", read("README.md")))
    assert {*PAGES[1:], "benchmarks/README.md"} <= linked


def list_tree():
    """The paths in the tree of CONTRIBUTING.md."""
    folder, paths = "", []
    for line in find_section(read("CONTRIBUTING.md"), "The files").splitlines():
        match = re.match(r" {4}(  )?((?:[\w./]+, )*[\w./]+)(  |$)", line)
        if match is None:
            continue
        names = match[2].split(", ")
        if match[1] is None:
            folder = names[0] if names[0].endswith("/") else ""
        paths += [folder + name if match[1] else name for name in names]
    return paths


def test_the_tree_of_files_is_complete():
    paths = list_tree()
    assert len(paths) == len(set(paths))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    files = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.*")]
    missing = {str(path.relative_to(ROOT)) for path in files if path.is_file()} - set(paths)
    assert not missing, missing


def read_option_tables():
    """The default and the mark of a recipe of each option in docs/options.md, by name."""
    rows = [row for row in list_rows(read("docs/options.md")) if row[0].startswith("`")]
    names = [row[0].split("`")[1] for row in rows]
    assert len(names) == len(set(names))
    return {name: (row[1], row[0].endswith("*")) for name, row in zip(names, rows, strict=True)}


def test_every_option_is_in_the_tables():
    documented = read_option_tables()
    fields = make_config({}).fields() | Request.model_fields | Chain.model_fields | Sweep.model_fields
    assert set(fields) - set(documented) == set(), "options without a line in docs/options.md"
    assert set(documented) - set(fields) <= ANNOUNCED, "lines in docs/options.md without an option"
    for name, field in fields.items():
        shown, is_recipe = documented[name]
        value = {None: "none", True: "true", False: "false"}.get(field.default) if isinstance(field.default, bool | None) else field.default
        assert shown == (f"{value:g}" if isinstance(value, float) else str(value)), name
        assert is_recipe == (name in make_config({}).fields() and trait(field, "recipe")), name


COMMANDS = sorted({command for name in PAGES for command in list_commands(read(name))})


class ParsedError(BaseException):
    """Raised where a program has understood its command line, so that it does nothing more."""


def stop_here(*_, **__):
    raise ParsedError


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, monkeypatch, tmp_path, capsys):
    _, _, program, *words = shlex.split(command, comments=True)
    parse = Parser.parse_known_args

    def stop(self, *arguments, **named):
        namespace, unknown = parse(self, *arguments, **named)
        assert not unknown, unknown
        stop_here(namespace)

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if "my_task.py" in words:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my_task.py").write_text(read_own_task())
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    module = importlib.import_module(program)
    if ("--cluster", "local") in itertools.pairwise(words):  # its request is checked before the run folder is looked at
        monkeypatch.setattr(module, "Page" if program == "launch.prove" else "read_state", stop_here)
        with pytest.raises(ParsedError):
            module.main(words)
    elif program in ("launch.submit", "launch.sweep", "launch.prove"):
        assert module.main([*words, "--dry_run"]) == 0, capsys.readouterr().err
    elif program == "mnist_dist.train":
        with pytest.raises(SystemExit) as ended:
            importlib.import_module("mnist_dist.config").parse_command_line([*words, "--print_config"])
        assert ended.value.code == 0
    elif program in ("mnist_dist.check", "mnist_dist.verify"):
        monkeypatch.setattr(module, "resolve_config", stop_here)
        with pytest.raises(ParsedError):
            module.main(words)
    else:
        monkeypatch.setattr(Parser, "parse_known_args", stop)
        with pytest.raises(ParsedError):
            module.main(words)


def test_a_command_that_is_wrong_is_found(monkeypatch, tmp_path, capsys):
    for command in (
        "python -m mnist_dist.evaluate",
        "python -m launch.submit --config smoke --batch_size 2 --nodes 3",
        "python -m launch.jobs --jsn",
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception, UserError)):
            test_every_command_is_understood(command, monkeypatch, tmp_path, capsys)
        monkeypatch.undo()


@pytest.mark.slurm
def test_the_commands_for_a_cluster_work_there(cluster, tmp_path):
    lines = find_section(read("README.md"), "On your cluster").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("    ")]
    assert len(commands) == 3
    answers = []
    for command in commands:
        words = [sys.executable if word == "python" else word for word in command]
        environ = {**cluster, "PYTHONPATH": str(ROOT)}
        answers.append(subprocess.run(words, env=environ, cwd=tmp_path, text=True, capture_output=True, timeout=200))
        assert answers[-1].returncode == 0, answers[-1]
    assert "ok    curve: 40 steps on 4 processes" in answers[0].stdout
    assert "runs/smoke: finished, step 60 of 60" in answers[2].stdout


# The numbers of the README


def read_raw(name, *numbers, machine=("Intel(R) Xeon(R) Processor", 2, None), precision="bf16"):
    lines = read(f"benchmarks/results/{name}.jsonl").splitlines()
    rows = [json.loads(lines[number - 1]) for number in numbers]
    machines = {(*(row["machine"][name] for name in ("cpu", "cores", "gpu")), row["precision"]) for row in rows}
    assert machines == {(*machine, precision)}
    return rows


def median_ratio(above, below):
    pairs = [one / other for one, other in zip(above, below, strict=True)]
    return statistics.median(above) / statistics.median(below), min(pairs), max(pairs)


def test_the_numbers_of_the_readme_are_in_the_raw_rows():
    accuracy, fast, gpu, loop, scaling = list_rows(find_section(read("README.md"), "Numbers"))[1:]

    for (name, *cells), first in ((accuracy, 166), (fast, 171)):
        assert cells[1].startswith(f"{first} to {first + 4} of")
        rows = read_raw("accuracy", *range(first, first + 5), machine=("Intel(R) Xeon(R) Processor", 2, None), precision="bf16")
        assert {row["seed"] for row in rows} == {*range(5)}
        [config] = {row["settings"]["config"] for row in rows}
        assert f"`--config {config}`" in name
        # The rows are of the recipe as it is now.
        assert {name_settings(row["settings"]) for row in rows} == {config}
        accuracies = [row["test/accuracy"] * 100 for row in rows]
        assert cells[0] == f"{statistics.mean(accuracies):.2f} % (mean of 5 seeds; lowest {min(accuracies):.2f} %)"
        recipe = rows[0]["settings"]["recipe"]
        assert name.endswith(f"after {recipe['steps']} steps" if recipe["steps"] else f"after {recipe['epochs']} epochs")

    assert gpu[2].startswith("9 of")
    [row] = read_raw("throughput", 9, machine=("Intel(R) Xeon(R) Processor", 16, "NVIDIA H100 80GB HBM3"))
    rates = [round(1 / each["loop"], -3) for each in row["rounds"]]
    shown = f"{statistics.median(rates):,.0f} images/s ({len(rates)} rounds, seed 0; {min(rates):,.0f} to {max(rates):,.0f})"
    assert (row["settings"]["config"], gpu[1]) == ("gpu", shown)

    assert loop[2].startswith("15 of")
    [row] = read_raw("throughput", 15)
    rounds = row["rounds"]
    ratio, least, most = median_ratio([each["bare"] for each in rounds], [each["loop"] for each in rounds])  # seconds an image
    assert loop[1] == f"{ratio:.2f} ({len(rounds)} rounds, seed 0; {least:.2f} to {most:.2f})"

    assert scaling[2].startswith("11 and 15 of")
    ratios = []
    for row, batch_size in zip(read_raw("scaling", 11, 15), (64, 512), strict=True):
        assert row["settings"]["batch_size"] == batch_size
        one, two = ([each["worlds"][size]["loop"] for each in row["rounds"]] for size in ("1", "2"))
        ratios.append(median_ratio(one, two)[0])
    assert scaling[1] == f"{ratios[0]:.2f} at batch 64, {ratios[1]:.2f} at batch 512 (7 rounds, seed 0)"


def find_references(text):
    """Of each reference to raw rows, the results file and the numbers of the rows; and the bullet, table row or paragraph that has it."""
    for chunk in (" ".join(lines.split()) for lines in re.split(r"\n(?=[-|])|\n\n", text)):
        for name, numbers in re.findall(r"\(results/(\w+)\.jsonl\)((?:(?:,? and|,| with)? \d+(?: to \d+)?)+)", chunk):
            ranges = [(int(first), int(last or first)) for first, last in re.findall(r"(\d+)(?: to (\d+))?", numbers)]
            yield name, [number for first, last in ranges for number in range(first, last + 1)], chunk


def test_the_raw_rows_that_the_benchmarks_name_are_of_the_machine_they_name():
    text = read("benchmarks/README.md")
    references = [
        *((*reference, "Intel") for reference in find_references(find_section(text, "Conclusions"))),  # unless another one is named
        *((*reference, "H100") for reference in find_references(find_section(text, "gpu"))),
    ]
    assert len(references) >= 15
    for name, numbers, chunk, usual in references:
        machines = {usual, *(machine for machine in ("EPYC", "H100") if machine in chunk)}
        lines = read(f"benchmarks/results/{name}.jsonl").splitlines()
        assert max(numbers) <= len(lines), (name, numbers)
        for number in numbers:
            machine = json.loads(lines[number - 1])["machine"]
            shown = machine["gpu"] or machine["cpu"]
            assert any(machine in shown for machine in machines), (name, number, shown)


def test_the_example_of_the_readme_is_in_the_raw_rows():
    row = json.loads(read("benchmarks/results/accuracy.jsonl").splitlines()[165])
    wrong, duration = row["test/errors"], format_duration(row["elapsed_s"])
    speed = row["step"] * row["settings"]["recipe"]["batch_size"] / row["elapsed_s"]
    line = f"finished: test accuracy {row['test/accuracy']:.2%} ({wrong} of 10000 wrong) after {row['step']} steps, "
    assert f"{line}{duration}, {speed:,.0f} images/s" in read("README.md")


# The layers of docs/design.md


def read_imports(path):
    """The modules of this project that a module imports at once."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
        elif isinstance(node, ast.Import):
            names += [each.name for each in node.names]
    return {name.split(".")[1] for name in names if re.match(r"(mnist_dist|launch)\.", name)}


def test_modules_depend_on_their_own_layer_or_lower_ones():
    rows = list_rows(find_section(read("docs/design.md"), "How modules depend"))[1:]
    layers = {name: index for index, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row[1]) if name != "launch"}
    files = {path.stem: path for folder in ("mnist_dist", "launch") for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}
    assert set(layers) == set(files)
    for name, layer in layers.items():
        wrong = {imported for imported in read_imports(files[name]) & set(layers) if layers[imported] < layer}
        assert not wrong, f"{name} imports {wrong}"
    # A task is found by its name: none but the program for digits knows one.
    assert [name for name, path in files.items() if "tasks" in read_imports(path)] == ["predict"]
