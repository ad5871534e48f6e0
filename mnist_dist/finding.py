"""What a check found: a word, what was measured, and the next step; and files of these. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mnist_dist.errors import UserError
from mnist_dist.files import describe_error, read_file, write_atomically

WORDS = ("ok", "WARN", "SLOW", "WRONG")
_BYTES_MAX = 16 << 20


@dataclass(frozen=True)
class Finding:
    """One line of a page: what a check measured, and what to do about it."""

    check: str  # e.g. "gradients", "curve"
    word: str  # one of WORDS
    measured: str  # what was seen, one line
    next_step: str = ""  # what to do, one line
    values: dict[str, Any] = field(default_factory=dict)


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write a JSON list with one object for each finding, atomically. Raises OSError."""
    write_atomically(path, (json.dumps([asdict(finding) for finding in findings], indent=1) + "\n").encode())


def read_findings(path: Path) -> list[Finding]:
    """The findings in a file that `write_findings` wrote. Raises `UserError` for any other file."""
    try:
        items = json.loads(read_file(path, _BYTES_MAX))
    except OSError as error:
        raise UserError(f"the findings {path} cannot be read: {describe_error(error)}") from error
    except (ValueError, RecursionError):
        items = None
    if not isinstance(items, list) or not all(isinstance(item, dict) and _is_finding(item) for item in items):
        raise UserError(f"{path} is not a list of findings; expected a file that --answer wrote")
    return [Finding(**item) for item in items]


def _is_finding(item: dict[str, Any]) -> bool:
    texts = ("check", "word", "measured", "next_step")
    return (
        {*item} == {*texts, "values"}
        and all(isinstance(item[name], str) for name in texts)
        and item["word"] in WORDS
        and isinstance(item["values"], dict)
    )
