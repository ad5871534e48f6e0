"""What a check of a cluster has found: one line for a person, and the file in which a program reads it. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mnist_dist.errors import UserError
from mnist_dist.files import read_file, write_atomically

WORDS = ("ok", "WARN", "SLOW", "WRONG")

_BYTES_MAX = 16 << 20
_FINDINGS_MAX = 10_000


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    check: str  # such as "joined"
    word: str  # one of WORDS
    measured: str  # what was seen, one line
    next_step: str = ""  # what to do, one line
    values: dict[str, Any] = field(default_factory=dict)  # the same for a program


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write them as a list in JSON, complete or not at all. Raises OSError."""
    write_atomically(path, (json.dumps([asdict(finding) for finding in findings], indent=1) + "\n").encode())


def read_findings(path: Path) -> list[Finding]:
    """Read what `write_findings` wrote. Raises `UserError` where the file is absent, or anything else."""
    try:
        rows = json.loads(read_file(path, _BYTES_MAX))
    except OSError as error:
        raise UserError(f"the findings {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or len(rows) > _FINDINGS_MAX or not all(_is_finding(row) for row in rows):
        raise UserError(f"{path} is not a list of findings; expected a file that `python -m mnist_dist.probe --answer` wrote")
    return [Finding(**row) for row in rows]


def _is_finding(row: object) -> bool:
    if not isinstance(row, dict) or set(row) != {each.name for each in fields(Finding)}:
        return False
    texts = [row[name] for name in ("check", "word", "measured", "next_step")]
    return all(isinstance(text, str) for text in texts) and row["word"] in WORDS and isinstance(row["values"], dict)
