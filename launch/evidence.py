"""What is known of how a run ended: from its run folder, its logs, Slurm and the kernel. Reads only; imports no torch."""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from launch import cluster
from launch.account import JOB_NAME, Account, read_account
from launch.endings import LINES_MAX, Log, read_log
from launch.runs import (
    LOCAL_LOG,
    RunState,
    find_noted_log,
    find_runs,
    is_of_last_job,
    is_run,
    list_noted_jobs,
    read_own_note,
    read_state,
    share_folder,
)
from mnist_dist.config import Config
from mnist_dist.errors import UserError, first_line
from mnist_dist.files import is_marked, read_file, read_kernel_count, read_text
from mnist_dist.lock import LOCK_FILE, read_holder
from mnist_dist.record import (
    CONFIG_FILE,
    ENDS_FILE,
    METRICS_FILE,
    RESULT_FILE,
    STACKS,
    STARTS_FILE,
    is_count,
    read_config,
    read_ends,
    read_note,
    read_result,
    read_rows,
    read_starts,
)
from mnist_dist.task import Row

T = TypeVar("T")

RUNS = Path("runs")
_LOG_BYTES_MAX = 4 << 20
_RANK_LOG_BYTES_MAX = 256 << 10
_RANKS_READ = 64
_NOTE_BYTES_MAX = 64 << 10
_STACK_LINES = 6
_KERNEL_TIMEOUT_S = 5
_BEGINS = re.compile(r"(?:\[rank 0\] )?(.{1,1000}) from step \d{1,18} of \d{1,18}: ")


@dataclass(kw_only=True)
class Facts:
    """What a run folder, the logs and Slurm tell of one start of a run."""

    path: Path
    state: RunState
    config: Config | None
    starts: list[Row]
    number: int  # of the start that is explained, counted from one; 0 before the first
    end: Row  # its row of ends.jsonl, or empty
    job: str
    status: int | None  # that the launcher noted
    account: Account | None
    log_path: str
    logs: dict[int | None, Log]  # of all ranks together (None), or one of each
    has_begun: bool  # the last attempt came as far as the training
    damaged: list[str]
    copy_of: str
    last_row: Row
    unanswered: str  # why jobs that wait are not known, if they are not

    @property
    def start(self) -> Row:
        """Its row of starts.jsonl, or empty."""
        return self.starts[self.number - 1] if self.number else {}

    @property
    def why(self) -> str:
        """Why it ended, by its own record; empty where that says nothing."""
        return str(self.end.get("why", "")) if self.has_begun else ""

    @property
    def world_size(self) -> int:
        """The number of its ranks."""
        size = self.start.get("world_size")
        return size if is_count(size) and size else 1

    @property
    def log(self) -> Log:
        """The log of all, or that of rank zero."""
        return self.logs.get(None) or self.logs.get(0) or Log()

    @property
    def errors(self) -> list[tuple[str, str]]:
        """The messages in the logs, each with its rank: empty if it was alone."""
        return [
            (named or ("" if rank is None or len(self.logs) == 1 else str(rank)), message)
            for rank, log in self.logs.items()
            for named, message in log.errors
        ]


def gather_facts(path: Path, job: str) -> Facts:
    """What is known of the start of the run in `path` that job `job` made; of its last one, where `job` is empty or made none."""
    damaged: list[str] = []

    def read(name: str, reader: Callable[[], T]) -> T | None:
        try:
            return reader() if os.path.lexists(path / name) else None
        except UserError as error:
            damaged.append(first_line(error))
            return None

    config = read(CONFIG_FILE, lambda: read_config(path))
    starts = read(STARTS_FILE, lambda: read_starts(path)) or []
    ends = read(ENDS_FILE, lambda: read_ends(path)) or []
    read(RESULT_FILE, lambda: read_result(path, config))
    rows = (read(METRICS_FILE, lambda: read_rows(path, config, _NOTE_BYTES_MAX)) or []) if config is not None else []
    noted, ended, holder = read_own_note(path, "job"), read_own_note(path, "end"), read_holder(path)
    queue, unanswered = cluster.find_jobs()
    state = read_state(path, queue)
    number = max((index for index, start in enumerate(starts, 1) if job and start.get("job") == job), default=len(starts))
    start = starts[number - 1] if number else {}
    if not state.is_active:
        job = job or state.done
    job = job or state.job or str(noted.get("job") or "") or (holder.job if holder else "") or str(start.get("job") or "")
    is_slurms = start.get("launcher") != "submitit"  # whose numbers on this machine are those of processes
    is_slurms &= not find_noted_log(noted, job).endswith(LOCAL_LOG)
    job = job if JOB_NAME.fullmatch(job) else ""  # it may stand in a command that is proposed
    account = read_account(job) if is_slurms else None
    # A job of another cluster, or of a later count, may have the same number.
    if account is not None and not share_folder(find_noted_log(noted, account.job), account.log):
        account = None
    # squeue lists this user's jobs alone, and may not answer. sacct shows a job that its controller has lost as running for ever.
    is_unseen = number == len(starts) and not state.is_in_queue
    if is_unseen and account is not None and cluster.is_active_state(account.state) and (account.is_current or unanswered):
        state = read_state(path, [*queue, cluster.Job(job, job.partition("_")[0], account.state, account.reason, account.nodes, 0)])
    log_path = find_noted_log(noted, job) or find_log(account, job)
    logs, is_complete = read_logs(log_path)
    end = next((end for end in reversed(ends) if end["start"] == number), {})
    begun = [log.has_begun for log in logs.values()]
    has_begun = bool(starts) and (number < len(starts) or is_of_last_job(start, noted))
    has_begun &= not begun or any(begun) or not is_complete
    status = ended.get("status") if ended and ended.get("job") in (job, *list_noted_jobs(noted)) and number == len(starts) else None
    return Facts(
        path=path,
        state=state,
        config=config,
        starts=starts,
        number=number,
        end=end,
        job=job,
        status=status if is_count(status) else None,
        account=account,
        log_path=log_path,
        logs=logs,
        has_begun=has_begun,
        damaged=damaged,
        copy_of=_find_original(path),
        last_row=rows[-1] if rows else {},
        unanswered=unanswered,
    )


def _find_original(path: Path) -> str:
    """The folder that this one is a copy of, as its notes name it; empty where it is none."""
    marks = [str(read_note(path / f"slurm/{name}.json").get("folder", "")) for name in ("job", "end")]
    marks += read_text(path / LOCK_FILE, _NOTE_BYTES_MAX).split("\n")[1:2]
    mark = next((mark.strip() for mark in marks if not is_marked(path, mark)), "")
    return mark.partition(" ")[2].strip("'\"")[:300]


def find_log(account: Account | None, job: str) -> str:
    """The log of a job, as far as Slurm or the usual names tell; empty where it is not found."""
    if account is None or account.log:
        return account.log if account else ""
    folder, number = account.work_dir, job.partition("_")[0]
    names = [f"mnist-dist-{number}.out", f"slurm-{job}.out"]  # of slurm/train.sh, and Slurm's default
    return next((path for name in names if folder and os.path.isfile(path := os.path.join(folder, name))), "")


def read_logs(path: str) -> tuple[dict[int | None, Log], bool]:
    """The log of a job, or those of each rank, and whether all of it was read."""
    if not path:
        return {}, True
    match = re.fullmatch(r"(.*)_0_log\.out", path, re.DOTALL)
    if match is None:
        text = read_text(path, _LOG_BYTES_MAX, tail=True)
        is_complete = len(text) < _LOG_BYTES_MAX // 4 and text.count("\n") < LINES_MAX
        return ({None: read_log(text)} if text else {}), is_complete
    found = {rank: read_text(f"{match[1]}_{rank}_log.out", _RANK_LOG_BYTES_MAX, tail=True) for rank in range(_RANKS_READ)}
    texts = {rank: text for rank, text in found.items() if text}
    return {rank: read_log(text) for rank, text in texts.items()}, all(len(text) < _RANK_LOG_BYTES_MAX // 4 for text in texts.values())


def find_runs_of(job: str, account: Account | None) -> list[tuple[Path, str]]:
    """The run folder of a job, or those of an array, each with its own job: by their notes, or where the job's log and its command lead."""

    def find_name(path: Path) -> str:
        names, holder = list_noted_jobs(read_own_note(path, "job")), read_holder(path)
        # The lock has Slurm's own number, which an array's last run shares with the array.
        return next((name for name in names if job in (name, name.partition("_")[0])), job if holder and holder.job == job else "")

    folders = [RUNS]
    if account is not None and Path(account.log).parent.name == "slurm":  # RUN/slurm/12.log, or that of a sweep
        folders.insert(0, Path(account.log).parent.parent)
    for folder in folders:
        if found := [(path, name) for path in find_runs(folder) if (name := find_name(path))]:
            return found
    if account is None:
        return []
    named = [match[1] for log in read_logs(find_log(account, job))[0].values() for line in log.lines if (match := _BEGINS.match(line))]
    words = [*account.command.split(), ""]
    named += [word.partition("=")[2] or after for word, after in pairwise(words) if word.split("=")[0] == "--run_dir"]
    for name in reversed(named):
        path = Path(account.work_dir) / name
        if is_run(path):
            return [(path, job)]
    return []


def read_stack(path: Path, rank: int) -> list[str]:
    """Where a silent rank was, from the stack that was kept of it."""
    file = path / STACKS / f"rank{rank}.txt"
    try:
        lines = read_file(file, _NOTE_BYTES_MAX).decode(errors="replace").splitlines()
    except OSError:
        return []
    frames = [line.strip()[:300] for line in lines if line.startswith("  ")]
    return [f"its stack, innermost call first ({file}):", *(f"  {frame}" for frame in frames[:_STACK_LINES])]


def read_boot_time() -> float | None:
    """When this host was started, in seconds since 1970; None where it does not tell."""
    return read_kernel_count("/proc/stat", "btime")


def is_in_kernel_log(pid: int) -> bool:
    """Whether the kernel's log names a process as killed for memory. Most users may not read it."""
    try:
        answer = subprocess.run(["dmesg"], capture_output=True, timeout=_KERNEL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return False
    return re.search(rb"[Oo]ut of memory: Kill(ed)? process %d\b" % pid, answer.stdout) is not None
