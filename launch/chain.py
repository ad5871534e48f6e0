"""The program that a job of a chain runs first: whether the jobs before it have left anything to do. Imports no torch.

    python -m launch.chain 12:13 [options of the training]

Exit status 0: nothing is left, and why is printed; 1: the run is to go on; 2: a mistake.
"""

import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from launch.runs import read_own_note
from mnist_dist.config import parse_command_line
from mnist_dist.errors import RunError, UserError
from mnist_dist.program import print_answer
from mnist_dist.record import read_ends, read_result, read_starts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    return print_answer(lambda: _answer(list(sys.argv[1:] if arguments is None else arguments)))


def _answer(words: list[str]) -> int:
    if not words or not re.fullmatch(r"\d{1,18}(:\d{1,18})*", words[0]):
        raise UserError(f"CHAIN is {''.join(words[:1])!r:.80}; expected the numbers of the jobs before this one, such as 12:13")
    run_dir = Path(parse_command_line(words[1:]).run_dir)
    reason = find_reason(run_dir, words[0].split(":"))
    if reason is None:
        return 1
    print(f"{run_dir} {reason}: this job of its chain has nothing to do")
    return 0


def find_reason(run_dir: Path, jobs: Collection[str]) -> str | None:
    """Why no further job of a chain is needed: the run is finished, or one of `jobs` found what would come again. None where one is.

    A run that was stopped, killed, or lost a rank or a node goes on. Raises `UserError` for a damaged record.
    """
    if read_result(run_dir, None) is not None:
        return "is finished"
    end = read_own_note(run_dir, "end")
    if end.get("job") not in jobs:
        return None  # of before the chain: whoever submitted that has seen it
    if end.get("status") == UserError.exit_code:
        return f"has failed for good in job {end['job']}, by a mistake that its log names"
    starts, last = read_starts(run_dir), (read_ends(run_dir) or [{}])[-1]
    of_job = last.get("start") == len(starts) > 0 and starts[-1].get("job") == end["job"]  # and no end that an earlier job recorded
    if end.get("status") == RunError.exit_code and of_job and last.get("lasting") is True:
        return f"has failed for good in job {end['job']} ({last['why']})"
    return None


if __name__ == "__main__":
    sys.exit(main())
