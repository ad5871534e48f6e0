"""The program `python -m launch.prove`: does this cluster train right, fast, and survive? One page, a line a check. Imports no torch.

It submits two jobs and waits for them. In the first, all ranks take part in one check after the other (`steps`). The second is a short
training that the time limit stops and Slurm requeues (`drill`).
"""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import contextlib
import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from launch import cluster
from launch.drill import HOLD_S, REQUEUED, SIGNAL_DELAY_S, SIGNAL_LIMIT_MIN, Drill, judge_requeue, judge_signal, list_words, read_notes
from launch.request import Request, place_folder
from launch.steps import CHECKS, Checks, Ranks, Step, find_last_words, read_log, skip
from launch.submission import describe_refusal, find_unanswered, list_srun_options, make_slurm_executor, queueing, write_script
from launch.submit import add_job_options, compare_with_cluster, read_request
from mnist_dist.console import format_duration
from mnist_dist.errors import RunError, UserError
from mnist_dist.files import describe_error, read_file, write_atomically
from mnist_dist.finding import WORDS, Finding, read_findings
from mnist_dist.options import Parser, path_argument
from mnist_dist.preemption import Stop, ending_as_interrupt
from mnist_dist.program import print_answer, say
from mnist_dist.record import RESULT_FILE, is_number, make_timestamp, parse_object, parse_timestamp, read_ends

ORDER = ("joined", "agree", "exchange", "gradients", "curve", "speed", "files", "signal", "requeue", "kill", "W&B")
_OF_SITE = ("signal", "requeue")  # the checks of the second job
FAILED = ("SLOW", "WRONG")
PAGE_FILE = "prove.json"
MOVED = 1.3  # a measure that grew or shrank by more than this factor is named
_TIME_MIN = 15  # time limit of the job with the checks
_POLL_S = 1.0
_SILENCE_S = 600.0  # a controller may be restarted, or another take over
_SETTLE_S = 8.0  # while it is requeued, Slurm calls a job failed for a moment
_REPORT_S = 60.0
_CANCEL_S = 90.0
_GRACE_S = 5.0  # for jobs that were told to end
_SHARED_S = 60.0  # a shared file system may show new files so late
_LOCAL_READY_S = 120.0
_PAGE_BYTES_MAX = 4 << 20
_CHANGES_MAX = 12
_COULD_NOT_TEST = 2


@dataclass
class Page:
    """What was found so far. Each line is printed when it is known."""

    request: Request
    quiet: bool = False
    findings: list[Finding] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def add(self, findings: Sequence[Finding]) -> None:
        """Add and print some findings."""
        for finding in findings:
            self.findings.append(finding)
            if not self.quiet:
                print(describe_finding(finding), flush=True)

    @property
    def missing(self) -> list[str]:
        """The checks without an answer."""
        return [name for name in ORDER if name not in {finding.check for finding in self.findings}]

    def find(self, check: str) -> Finding | None:
        """The worst finding of a check."""
        return max((each for each in self.findings if each.check == check), key=lambda each: WORDS.index(each.word), default=None)

    @property
    def status(self) -> int:
        """The exit status: 0 where nothing is SLOW or WRONG."""
        return RunError.exit_code if any(finding.word in FAILED for finding in self.findings) else 0

    def summarize(self) -> str:
        """The last line."""
        counts = {word: sum(finding.word == word for finding in self.findings) for word in WORDS}
        words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        return f"{len(self.findings)} checks: {words or 'none'}, after {format_duration(time.monotonic() - self.begun)}"

    def describe_request(self) -> dict[str, Any]:
        """What was asked for: only pages of the same are compared."""
        names = ("cluster", "nodes", "tasks", "gpus_per_node", "cpus_per_task", "partition", "constraint")
        return {name: getattr(self.request, name) for name in names}


def describe_finding(finding: Finding) -> str:
    """The line of a finding, and below it what to do."""
    line = f"{finding.check:<10} {finding.word:<6} {' '.join(finding.measured.split())}"
    return line if finding.word == "ok" or not finding.next_step else f"{line}\n{'':17} -> {' '.join(finding.next_step.split())}"


def compare_pages(earlier: dict[str, Any], findings: Sequence[Finding]) -> list[str]:
    """What changed since the page `earlier`: words that differ, and measures that moved by more than 30 %. A line each."""
    before: dict[str, dict[str, Any]] = {}
    for row in earlier.get("findings") if isinstance(earlier.get("findings"), list) else []:  # type: ignore[union-attr]
        if isinstance(row, dict) and row.get("word") in WORDS and isinstance(row.get("values"), dict):
            before.setdefault(str(row.get("check")), row)
    lines = []
    for finding in findings:
        row = before.pop(finding.check, None)
        if row is None:
            continue
        if row["word"] != finding.word:
            lines.append(f"{finding.check}: {finding.word}, was {row['word']}")
        for name, value in finding.values.items():
            old = row["values"].get(name)
            if is_number(value) and is_number(old) and min(value, old) > 0 and max(value, old) > MOVED * min(value, old):
                lines.append(f"{finding.check}: {name} {value:.4g}, was {old:.4g} ({(value / old - 1) * 100:+.0f} %)")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 nothing is WRONG or SLOW, 1 something is, 2 a mistake, or nothing could be tested."""
    return print_answer(lambda: _prove(arguments))


def _prove(arguments: Sequence[str] | None) -> int:
    parser = Parser(
        "launch.prove", "Prove a cluster: is training right and fast here, and does it survive?", usage="[--option of the job ...]"
    )
    own, idle = {"time": _TIME_MIN, "name": "prove"}, ("signal_delay_s", "max_requeues")
    add_job_options(parser, own, idle)
    parser.add_argument("--folder", metavar="DIR", type=path_argument, default="runs/prove", help="keeps the pages (default: runs/prove)")
    parser.add_argument("--json", action="store_true", help="print the page as JSON")
    given = parser.parse(arguments)
    folder, as_json = place_folder(Path(given.pop("folder"))), given.pop("json")
    if refused := [name for name in idle if name in given]:
        raise UserError(f"{refused[0]} has no effect here: the jobs of launch.prove have their own; leave it out")
    request = read_request(given | {"signal_delay_s": 1}, own, idle)
    try:
        compare_with_cluster(request)
    except RunError as error:
        say(f"could not test: {error}; --cluster local tests this machine alone")
        return _COULD_NOT_TEST
    if request.dry_run:
        print(write_script(_make_driver(request, folder / "work-N")))
        return 0
    page = Page(request, quiet=as_json)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="work-", dir=folder))
        for name in ("answers", "logs", "findings", "notes", "slurm"):
            (work / name).mkdir()
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be used: {describe_error(error)}; expected a writable one") from error
    keep = False
    try:
        with ending_as_interrupt():
            partition = f"partition {request.partition}" if request.partition else "the default partition"
            where = "here" if request.cluster == "local" else f"in {partition}"
            say(f"nodes: {request.nodes}, ranks: {request.world_size}, {where}; logs: {work}")
            problem = _prove_locally(page, work) if request.cluster == "local" else _prove_on_slurm(page, work)
            keep = bool(problem or page.status)
            return _finish(page, folder, work, problem, as_json)
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds pages
                folder.rmdir()


def _finish(page: Page, folder: Path, work: Path, problem: str, as_json: bool) -> int:
    """Write the page, compare it with the last of its kind, and print the end of it."""
    earlier = _read_earlier(folder, page.describe_request())
    changes = compare_pages(earlier, page.findings) if earlier else []
    status = _COULD_NOT_TEST if problem else page.status
    values: dict[str, Any] = {
        "time": make_timestamp(),
        "asked": page.describe_request(),
        "status": status,
        "problem": problem,
        "summary": page.summarize(),
        "compared_with": earlier.get("time") if earlier else None,
        "changes": changes,
        "findings": [asdict(finding) for finding in page.findings],
    }
    path = folder / PAGE_FILE
    try:
        if path.exists():  # earlier pages stay
            path.rename(folder / f"prove-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(path.stat().st_mtime))}-{work.name[5:]}.json")
        write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())
    except OSError as error:
        raise RunError(f"the page {path} cannot be written: {describe_error(error)}") from error
    if as_json:
        print(json.dumps(values, indent=1))
    else:
        if earlier:
            print(f"since {earlier['time']}: {'nothing changed' if not changes else ''}".rstrip())
        for line in changes[:_CHANGES_MAX]:
            print(f"  {line}")
        if len(changes) > _CHANGES_MAX:
            print(f"  and {len(changes) - _CHANGES_MAX} more in {path}")
        print(f"{page.summarize()}; {path}{f'; logs: {work}/logs' if status else ''}")
    if problem:
        say(f"could not test: {problem}")
    return status


def _read_earlier(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The newest page in `folder` of the same request; empty where there is none."""
    pages = []
    for path in folder.glob("prove*.json"):
        try:
            page = parse_object(read_file(path, _PAGE_BYTES_MAX))
        except OSError:
            continue
        if page.get("asked") == asked and isinstance(page.get("time"), str) and not page.get("problem"):
            pages.append((page["time"], path.name == PAGE_FILE, page))  # of two from one second, the last written is the newer one
    return max(pages, key=lambda row: row[:2], default=("", False, {}))[2]


# On this machine


def _prove_locally(page: Page, work: Path) -> str:
    ranks = Ranks(page.request.world_size)
    for findings in Checks(work, ranks, CHECKS).run():
        page.add(findings)
    joined = page.find("joined")
    if joined is not None and joined.word == "WRONG":
        page.add([skip(name) for name in _OF_SITE])
    else:
        page.add(_drill_locally(work, ranks))
    return ""


def _drill_locally(work: Path, ranks: Ranks) -> list[Finding]:
    log, words = work / "logs/requeue.log", list_words(work, REQUEUED)
    sent_at = None
    with Step(ranks, words, log) as step:
        end = time.monotonic() + _LOCAL_READY_S
        while len(read_notes(work, "ready", ranks.size)) < ranks.size and step.is_running and time.monotonic() < end:
            time.sleep(0.05)
        sent_at = time.time()
        step.send(signal.SIGUSR1)
        status = step.wait(HOLD_S + _LOCAL_READY_S).status
    if status == Stop.REQUEUE.exit_code:
        with Step(ranks, words, log) as step:
            status = step.wait(_LOCAL_READY_S).status
    return [judge_signal(work, ranks.size, sent_at=sent_at), judge_requeue(work, by="started again", state=f"status {status}")]


# On Slurm


@dataclass
class Watched:
    """A job that this program has submitted, as Slurm showed it last."""

    number: str
    what: str
    state: str = "PENDING"
    limit_at: float | None = None  # when its first start would reach its time limit (seconds since 1970)
    _said: str = ""
    _said_at: float = 0.0
    _ended_at: float | None = None
    _seen_at: float = field(default_factory=time.monotonic)
    _patience: cluster.Patience = field(default_factory=cluster.Patience)
    _is_over: bool = False

    @property
    def over_s(self) -> float:
        """Seconds since it was first seen to have ended."""
        return 0.0 if self._ended_at is None else time.monotonic() - self._ended_at

    @property
    def ended(self) -> str:
        """How it is over, in words."""
        return f"is {self.state}" if self.state.startswith("held") else f"ended ({self.state})"

    def look(self) -> bool:
        """Whether it is over, as Slurm, which is asked now and then, said last. Reports in one line what is new.

        Raises `RunError` where Slurm has been silent for too long.
        """
        if self._patience.is_due():
            before = self.state
            self._is_over = self._ask()
            if self._ended_at is not None or self.state != before:
                self._patience.hasten()
        return self._is_over

    def _ask(self) -> bool:
        try:
            shown = cluster.show_job(self.number)
        except RunError as error:
            silent_s = time.monotonic() - self._seen_at
            if silent_s > _SILENCE_S:
                raise RunError(f"Slurm has not answered for {format_duration(silent_s)}: {error}") from error
            self._say(f"job {self.number} ({self.what}): not known now ({error}); Slurm is asked again")
            return False
        now = time.monotonic()
        if not shown:  # forgotten
            return now - self._seen_at > _CANCEL_S
        self._seen_at, self.state = now, shown.get("JobState", "")
        reason, start = cluster.find_reason(self.state, shown.get("Reason", "")), shown.get("StartTime", "")
        if self.state == "RUNNING" and self.limit_at is None and shown.get("Restarts", "0") == "0":
            self.limit_at = parse_timestamp(shown.get("EndTime"))
        line = f"job {self.number} ({self.what}): {self.state.lower()}"
        if self.state == "PENDING":
            line += f" ({reason})" if reason not in ("", "None") else ""
            line += f", starts about {start}" if start not in ("", "Unknown", "N/A") else ""
        elif self.state == "RUNNING":
            line += f" on {shown.get('NodeList', '')}"
        if self.state != "PENDING" or now - self._said_at > _REPORT_S or not self._said.startswith(line[:30]):
            self._say(line)
        if cluster.is_active_state(self.state) and self.state != "RUNNING" and cluster.is_held(reason):
            self.state = f"held: {reason}"
            return True
        if cluster.is_active_state(self.state):
            self._ended_at = None
            return False
        self._ended_at = self._ended_at or now
        return now - self._ended_at > _SETTLE_S or self.state == "COMPLETED"

    def _say(self, line: str) -> None:
        if line != self._said:
            self._said, self._said_at = line, time.monotonic()
            say(line)


def _make_driver(request: Request, work: Path) -> SlurmExecutor:
    """The executor of the job with the checks: its script calls one program on the first node, which calls srun."""
    executor = make_slurm_executor(request, work / "slurm")
    executor.python = f"{shlex.quote(sys.executable)} -P"
    more = {name: value for name, value in executor.parameters["additional_parameters"].items() if name not in ("signal", "requeue")}
    executor.update_parameters(additional_parameters={**more, "no-requeue": True})
    return executor


def _submit(request: Request, executor: SlurmExecutor, work: Callable[[], None], what: str, jobs: list[Watched]) -> Watched:
    """Queue a job and add it to `jobs`."""
    try:
        with queueing(request):
            jobs.append(Watched(executor.submit(work).job_id, what))
    except (FailedJobError, FailedSubmissionError) as error:
        found, doubt = find_unanswered(Path(executor.folder), error)
        jobs += [Watched(number, what) for number in found if number not in [job.number for job in jobs]]  # to be cancelled
        words = describe_refusal(error)
        raise (RunError(f"{words}\n{doubt}") if doubt else UserError(words)) from error
    return jobs[-1]


def _list_step_options(request: Request) -> tuple[str, ...]:
    options = [f"--nodes={request.nodes}", f"--ntasks={request.world_size}", f"--ntasks-per-node={request.tasks}"]
    options += ["--kill-on-bad-exit=0", "--wait=120", "--export=ALL", "--unbuffered"]
    if request.cpus_per_task is not None:
        options.append(f"--cpus-per-task={request.cpus_per_task}")
    return (*options, *list_srun_options(request))


def _prove_on_slurm(page: Page, work: Path) -> str:
    """Submit, wait and judge. Why nothing could be tested; empty where it could."""
    request, jobs = page.request, list[Watched]()
    checks = Checks(work, Ranks(request.world_size, _list_step_options(request)), CHECKS)
    limits = {"time": SIGNAL_LIMIT_MIN, "signal_delay_s": SIGNAL_DELAY_S}
    site = make_slurm_executor(request.model_copy(update=limits), work / "slurm")
    drill = Drill(work, REQUEUED, HOLD_S)
    try:
        driver = _submit(request, _make_driver(request, work), checks, "the checks", jobs)
        stopped = _submit(request, site, drill, "signal and requeue", jobs)
        driver_over = stopped_over = False
        taken: set[str] = set()
        while not (driver_over and stopped_over):
            driver_over = driver_over or driver.look()
            for findings in _take_findings(work, taken):
                page.add(findings)
            if driver_over and driver.state == "COMPLETED" and set(page.missing) - set(_OF_SITE):
                driver_over = driver.over_s > _SHARED_S
            if driver_over and not taken:
                break
            joined = page.find("joined")
            if not stopped_over and joined is not None and joined.word == "WRONG":
                _cancel([stopped])
                page.add([skip(name) for name in _OF_SITE])
                stopped_over = True
            stopped_over = stopped_over or stopped.look()
            if not stopped_over or not driver_over:
                time.sleep(_POLL_S)
        missing = [name for name in page.missing if name not in _OF_SITE]
        log = read_log(work / f"slurm/{driver.number}.log")
        if not taken and driver.state == "COMPLETED":
            return f"job {driver.number} left nothing in {work}: expected a --folder that this machine and all nodes share"
        if not taken:
            return f"job {driver.number} {driver.ended} before the first check: {find_last_words(log) or 'its log is empty'}"
        reason = f"no answer: job {driver.number} {driver.ended}{(words := find_last_words(log)) and f': {words}'}"
        page.add([Finding(name, "WRONG", reason, f"python -m launch.explain {driver.number}") for name in missing])
        if "signal" in page.missing:
            _judge_site(page, work, site, drill, stopped, jobs)
    except RunError as error:
        return str(error)
    finally:
        _cancel(jobs)
    return ""


def _take_findings(work: Path, taken: set[str]) -> Iterator[list[Finding]]:
    """The findings that steps have left since the last look."""
    for path in sorted((work / "findings").glob("*.json")):
        if path.name not in taken:
            taken.add(path.name)
            try:
                yield read_findings(path)
            except UserError as error:
                say(f"note: {error}")


def _judge_site(page: Page, work: Path, site: SlurmExecutor, drill: Drill, stopped: Watched, jobs: list[Watched]) -> None:
    page.add([judge_signal(work, page.request.world_size, limit_at=stopped.limit_at)])
    was_stopped, is_forbidden, state = _is_stopped(work), False, stopped.state
    if was_stopped and not (work / REQUEUED / RESULT_FILE).exists() and stopped.state == "FAILED":
        is_forbidden = True  # it saved and asked to be requeued; the same command must still continue it
        say(f"job {stopped.number} was not requeued; it is submitted again")
        again = _submit(page.request, site, drill, "submitted again", jobs)
        while not again.look():
            time.sleep(_POLL_S)
        state = again.state
    page.add([judge_requeue(work, by="Slurm started it again", is_forbidden=is_forbidden, state=state.lower())])


def _is_stopped(work: Path) -> bool:
    try:
        ends = read_ends(work / REQUEUED)
    except UserError:
        return False
    return bool(ends) and str(ends[-1].get("why", "")).startswith("stopped by")


def _may_run(job: Watched) -> bool:
    try:
        return cluster.is_active_state(cluster.show_job(job.number).get("JobState", ""))
    except RunError:
        return True


def _cancel(jobs: Sequence[Watched]) -> None:
    """End the jobs that still wait or run, and wait until they have ended: their files are removed next."""
    begun = time.monotonic()
    commands = [(0.0, ("scancel",)), (_GRACE_S, ("scancel", "--full", "--signal=KILL"))]
    while left := [job.number for job in jobs if _may_run(job)]:
        waited_s = time.monotonic() - begun
        if waited_s > _CANCEL_S:
            say(f"note: these jobs may still wait or run: {', '.join(left)}; look at squeue, and end them with scancel")
            return
        if commands and waited_s >= commands[0][0]:
            with contextlib.suppress(RunError):
                cluster.run_slurm(*commands[0][1], *left)
                commands.pop(0)
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main())
