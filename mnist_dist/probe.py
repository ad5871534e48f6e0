"""Is this machine, or this cluster, fit for training? `python -m mnist_dist.probe CHECK`, or the same under any launcher of ranks.

The ranks meet as those of a training do. Each check makes findings: what was measured, whether that is well, and what to do. Rank zero
prints them and writes the file of `--answer`.
"""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mnist_dist.config import configure
from mnist_dist.errors import RunError, UserError, first_line
from mnist_dist.files import check_free_name
from mnist_dist.finding import Finding, write_findings
from mnist_dist.options import Parser, path_argument
from mnist_dist.program import importing, make_printable, print_answer
from mnist_dist.starter import find_size, start_ranks
from mnist_dist.world import World, find_world

CHECKS = ("joined", "agree", "exchange", "speed", "files")
TIMEOUT_S = 120.0

_VERDICT_S = 10.0  # the ranks need so long to find out which of them is silent
_CLEANING_S = 5.0


@dataclass
class Answer:
    """Where the findings of a check go: rank zero prints them and writes the file. Once only."""

    check: str
    path: Path | None
    is_main: bool
    made: list[Path] = field(default_factory=list)  # folders to remove where the check does not end
    _given: threading.Lock = field(default_factory=threading.Lock)

    def give(self, findings: Sequence[Finding]) -> None:
        """Print and write findings. Raises OSError."""
        if not self.is_main or not self._given.acquire(blocking=False):
            return
        for finding in findings:
            print(f"{finding.word:<5}  {finding.check}: {finding.measured}" + (f"; {finding.next_step}" if finding.next_step else ""))
        sys.stdout.flush()
        if self.path is not None:
            write_findings(self.path, findings)


def probe(check: str, answer: Path | None, folder: Path | None, timeout_s: float) -> int:
    """Do one of `CHECKS` as a rank of the world that the launcher describes; the exit status: 1 where something is wrong.

    Raises `UserError` for a mistake of the user, and `RunError` where the check did not come to an end.
    """
    world = find_world(os.environ)
    if (check == "files") != (folder is not None):
        raise UserError(f"--folder is {folder or 'not given'}; expected with the check files, and only there")
    if world.rank == 0 and answer is not None:
        check_free_name("answer", answer)
    out = Answer(check, answer, world.rank == 0)
    with _deadline(world, timeout_s, out):
        with importing():
            from mnist_dist.console import set_up_logging
            from mnist_dist.survey import survey

        set_up_logging(world.rank, world.size)
        # The ranks may wait for each other twice, as they meet and later, before the time is over.
        patience_s = max(1.0, (timeout_s - _VERDICT_S) / 2)
        config = configure(run_dir=f"probe-{check}", timeout_s=patience_s, precision="fp32", wandb="disabled", report=False)
        try:
            findings = survey(check, world, config, folder, out.made)
        except (UserError, RunError) as error:
            out.give([_make_failure(check, first_line(error))])
            raise
        out.give(findings)
    return RunError.exit_code if any(finding.word == "WRONG" for finding in findings) else 0


def _make_failure(check: str, text: str) -> Finding:
    return Finding(check, "WRONG", text, "look at the hosts that are named, and at the output of their ranks")


@contextlib.contextmanager
def _deadline(world: World, timeout_s: float, answer: Answer) -> Iterator[None]:
    """End this process after `timeout_s`, with a finding that says where it was. A SIGTERM ends it in order."""
    working = threading.get_ident()

    def end() -> None:
        from mnist_dist.board import describe_place
        from mnist_dist.survey import remove_folders

        text = f"no end within {timeout_s:g} s: rank {world.rank} is {describe_place(working)}"
        with contextlib.suppress(OSError):
            answer.give([_make_failure(answer.check, text)])
        with contextlib.suppress(OSError):
            os.write(2, f"[rank {world.rank}] error: {make_printable(text)}\n".encode(errors="backslashreplace"))
        cleaning = threading.Thread(target=remove_folders, args=(answer.made,), daemon=True)  # the file system itself may hang
        cleaning.start()
        cleaning.join(_CLEANING_S)
        os._exit(RunError.exit_code)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 nothing is wrong, 1 something is, 2 a user's mistake."""

    def run() -> int:
        parser = Parser("mnist_dist.probe", "Look whether machines are fit for training. Start it as all ranks, under any launcher.")
        parser.add_argument("check", metavar="CHECK", choices=CHECKS, help=", ".join(CHECKS))
        parser.add_argument("--answer", metavar="FILE", type=path_argument, help="the file that rank zero writes (default: none)")
        parser.add_argument("--folder", metavar="DIR", type=path_argument, help="a folder on the file system of the runs, for files")
        parser.add_argument(
            "--timeout_s", metavar="X", type=float, default=TIMEOUT_S, help=f"seconds for all of it (default: {TIMEOUT_S:g})"
        )
        options = parser.parse_args(arguments)
        if not 20 <= options.timeout_s <= 86_400:
            raise UserError(f"timeout_s is {options.timeout_s:g}; allowed: a number, at least 20, at most 86400")
        size, alone = find_size(os.environ, is_program=arguments is None)
        if alone:
            return start_ranks(size)
        answer, folder = (None if name is None else Path(name).absolute() for name in (options.answer, options.folder))
        return probe(options.check, answer, folder, options.timeout_s)

    return print_answer(run)


if __name__ == "__main__":
    sys.exit(main())
