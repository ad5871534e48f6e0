"""The checks that all ranks of a job take part in: one step each, in processes of its own and with its own deadline. Imports no torch."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cluster import run_slurm
from launch.drill import KILLED, UNBROKEN, judge_kill, judge_tracking, list_words
from mnist_dist.errors import RunError, UserError
from mnist_dist.files import read_text
from mnist_dist.finding import Finding, read_findings, write_findings
from mnist_dist.preemption import holding_back_signals
from mnist_dist.program import make_printable
from mnist_dist.starter import find_free_port, make_die_with_parent
from mnist_dist.world import World, list_inherited

_GRACE_S = 10.0  # for a step that is told to end
_OWN_DEADLINE_S = 15.0  # a program names who hangs so long before its step is ended
_LOG_BYTES_MAX = 1 << 20
_SILENCE_S = 300.0  # of Slurm's controller
_RETRY_S = 10.0
_OF_SLURM = re.compile(r"\s*(srun|slurmstepd|\S*: slurmstepd):")


@dataclass(frozen=True)
class Ranks:
    """How the ranks of a step are started: by srun with `options`, within a job; or here, where that is None."""

    size: int
    options: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Check:
    """A program whose ranks answer one or more checks."""

    names: tuple[str, ...]
    words: tuple[str, ...]  # of its command line after `python -m`; {answer}, {folder} and {timeout_s} are replaced
    deadline_s: float


def _make_probe(name: str, *more: str, deadline_s: float = 90) -> Check:
    return Check((name,), ("mnist_dist.probe", name, "--answer", "{answer}", "--timeout_s", "{timeout_s}", *more), deadline_s)


CHECKS = (
    _make_probe("joined", deadline_s=120),
    _make_probe("agree"),
    _make_probe("exchange"),
    Check(("gradients", "curve"), ("mnist_dist.verify", "--answer", "{answer}"), 240),
    _make_probe("speed"),
    _make_probe("files", "--folder", "{folder}"),
)
_DRILL_DEADLINE_S = 150.0


@dataclass(frozen=True)
class End:
    """How a step ended. `status` is that of srun, or the highest of the ranks; None where it had to be ended."""

    status: int | None
    elapsed_s: float
    at: float | None  # seconds since 1970; None where it had to be ended


class Step:
    """The ranks of one program. Leaving the context ends them."""

    def __init__(self, ranks: Ranks, words: Sequence[str], log: Path) -> None:
        """Start them; what they print is added to `log`. Raises `RunError` where that fails."""
        self._is_slurm = ranks.options is not None
        self._begun = time.monotonic()
        self.processes: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, "-P", "-m", *words]
        try:
            with log.open("ab") as output:
                if ranks.options is not None:
                    self._start(["srun", *ranks.options, *command], dict(os.environ), output.fileno())
                    return
                environ = _clean_environment()
                port = find_free_port()
                for rank in range(ranks.size):
                    world = World(rank, ranks.size, rank, ranks.size, port=port)
                    self._start(command, environ | world.variables(), output.fileno())
        except OSError as error:
            self.end()
            raise RunError(f"{shlex.join(words)} cannot be started: {error}") from error
        except BaseException:  # an interrupt: nobody else knows of those that have started
            self.end()
            raise

    def _start(self, command: Sequence[str], environ: dict[str, str], output: int) -> None:
        die_with_parent = make_die_with_parent()

        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if not self._is_slurm:
                die_with_parent()

        with holding_back_signals() as before:  # until the new process is known here: none may be left behind
            self.processes.append(
                # A session of its own: Ctrl-C on the terminal is for this program, which then ends the ranks.
                subprocess.Popen(
                    command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, preexec_fn=prepare
                )
            )

    def __enter__(self) -> "Step":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def is_running(self) -> bool:
        """Whether any of its processes lives."""
        return None in [process.poll() for process in self.processes]

    def wait(self, deadline_s: float) -> End:
        """Wait until it has ended, or end it `deadline_s` after it was started."""
        while self.is_running:
            if time.monotonic() > self._begun + deadline_s:
                self.end()
                return End(None, time.monotonic() - self._begun, None)
            time.sleep(0.02)
        statuses = [process.returncode for process in self.processes]
        status = max(128 - status if status < 0 else status for status in statuses)
        return End(status, time.monotonic() - self._begun, time.time())

    def send(self, number: signal.Signals) -> None:
        """Send a signal to its ranks (only where they run here)."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def end(self) -> None:
        """End what is left of it."""
        if self._is_slurm and self.is_running:
            self.send(signal.SIGTERM)  # srun then ends the tasks
            end = time.monotonic() + _GRACE_S
            while self.is_running and time.monotonic() < end:
                time.sleep(0.05)
            _cancel_steps()
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _clean_environment() -> dict[str, str]:
    """This environment without what an outer job or launcher left in it, and with this package."""
    inherited = list_inherited(os.environ)
    kept = {name: value for name, value in os.environ.items() if name not in inherited}
    package = str(Path(__file__).resolve().parents[1])
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (package, kept.get("PYTHONPATH"))))}


def _cancel_steps() -> None:
    """Kill all steps of this job but the one that this program is."""
    job = os.environ.get("SLURM_JOB_ID", "")
    with contextlib.suppress(RunError):
        listed = run_slurm("squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i")
        steps = re.findall(rf"^\s*({re.escape(job)}\.\d+)\s*$", listed, re.MULTILINE)
        if steps:
            run_slurm("scancel", "--signal=KILL", *steps)


def read_log(path: Path) -> str:
    """The end of a log; empty where there is none."""
    return read_text(path, _LOG_BYTES_MAX, tail=True)


def find_last_words(log: str) -> str:
    """The line of a log that best says why it ended: its last error, else its last line; what srun says only where nobody else does."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    lines = [line for line in lines if not _OF_SLURM.match(line)] or lines
    errors = [line for line in lines if "rror: " in line]
    return make_printable((errors or lines or [""])[-1][:200])


def is_controller_silent(log: str) -> bool:
    """Whether srun started nobody, since Slurm's controller did not answer."""
    lines = [line for line in log.splitlines() if line.strip()]
    return all(map(_OF_SLURM.match, lines)) and any("Unable to contact slurm controller" in line for line in lines)


@dataclass(frozen=True)
class Checks:
    """The checks of one job, one step after the other. submitit calls it once, on the job's first node."""

    folder: Path  # that all ranks see; answers/, logs/, findings/ and notes/ in it must exist
    ranks: Ranks
    checks: tuple[Check, ...] = CHECKS
    drills: bool = True

    def __call__(self) -> None:
        """Leave the findings of each step in a file of its own, as soon as it has ended."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            signal.signal(number, signal.SIG_DFL)  # submitit's handlers
        for index, findings in enumerate(self.run()):
            write_findings(self.folder / "findings" / f"{index:03}.json", findings)

    def run(self) -> Iterator[list[Finding]]:
        """The findings of one step after the other. Where the ranks do not even meet, the others are not tried."""
        met = True
        for check in self.checks:
            findings = self._run_check(check) if met else [skip(name) for name in check.names]
            met = met and not any(finding.check == "joined" and finding.word == "WRONG" for finding in findings)
            yield findings
        if not self.drills:
            return
        if not met:
            yield [skip("kill"), skip("W&B")]
            return
        yield from self._run_drills()

    def _run_check(self, check: Check) -> list[Finding]:
        name = check.names[0]
        answer, log = self.folder / "answers" / f"{name}.json", self.folder / "logs" / f"{name}.log"
        timeout_s = max(check.deadline_s - _OWN_DEADLINE_S, 1)
        meant = {"{answer}": str(answer), "{folder}": str(self.folder / "answers"), "{timeout_s}": f"{timeout_s:g}"}
        words = [meant.get(word, word) for word in check.words]
        end = self._run_step(words, log, check.deadline_s)
        try:
            findings = read_findings(answer) if answer.exists() else []
        except UserError as error:
            findings = [Finding(name, "WRONG", str(error), f"look at the log {log.name}")]
        return findings + [
            _explain_silence(missing, end, check.deadline_s, log)
            for missing in check.names
            if missing not in {each.check for each in findings}
        ]

    def _run_step(self, words: Sequence[str], log: Path, deadline_s: float) -> End:
        """Start the ranks and wait for them; again where Slurm's controller was away, which says nothing of what is checked."""
        begun = time.monotonic()
        while True:
            said = len(read_log(log))
            with Step(self.ranks, words, log) as step:
                end = step.wait(deadline_s)
            if not is_controller_silent(read_log(log)[said:]) or time.monotonic() - begun > _SILENCE_S:
                return end
            time.sleep(_RETRY_S)

    def _run_drills(self) -> Iterator[list[Finding]]:
        log = self.folder / "logs" / f"{UNBROKEN}.log"
        end = self._run_step(list_words(self.folder, UNBROKEN), log, _DRILL_DEADLINE_S)
        yield [judge_tracking(read_log(log)) if end.status == 0 else _explain_silence("W&B", end, _DRILL_DEADLINE_S, log)]
        log = self.folder / "logs" / "kill.log"
        ends = [self._run_step(list_words(self.folder, KILLED), log, _DRILL_DEADLINE_S) for _ in range(2)]
        status = ends[1].status if ends[1].status is not None else 1
        yield [judge_kill(self.folder, self.ranks.size, log=read_log(log), ended_at=ends[0].at, status=status)]


def skip(name: str) -> Finding:
    """The finding on a check that could only fail, too."""
    return Finding(name, "WARN", "not tried, since the ranks did not meet", "first repair what joined names")


def _explain_silence(name: str, end: End, deadline_s: float, log: Path) -> Finding:
    """The finding on a check that gave no answer."""
    words = find_last_words(read_log(log))
    how = f"gave no answer in {deadline_s:.0f} s, and was ended" if end.status is None else f"ended with {end.status} and no answer"
    return Finding(name, "WRONG", f"{how}{': ' + words if words else ''}", f"look at the log {log.name}", {"status": end.status})
