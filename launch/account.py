"""What Slurm says of one job, from sacct where the site keeps accounts, else from scontrol. Reads only; imports no torch."""

import contextlib
import pwd
import re
from dataclasses import dataclass, replace

from launch.cluster import find_reason, parse_time, run_slurm, show_jobs
from mnist_dist.console import format_duration
from mnist_dist.errors import RunError

JOB_NAME = re.compile(r"\d{1,12}(_\d{1,9})?")  # 12, or 12_3 in an array

_SEPARATOR = "\x1f"  # in no name of a folder or a job
_FIELDS = "JobID,State,ExitCode,ElapsedRaw,TimelimitRaw,ReqMem,MaxRSS,NodeList,Reason,Start,WorkDir"
_TEXT_MAX = 1 << 20
_OUT_OF_MEMORY = 125  # stands in the place of a signal


@dataclass(frozen=True)
class Account:
    """One job, as Slurm knows it. Empty or None: it does not say."""

    job: str
    state: str  # such as TIMEOUT
    source: str  # the command that said so
    reason: str = ""
    cancelled_by: str = ""
    exit: tuple[int, int] = (0, 0)  # status and signal
    elapsed_s: float | None = None
    limit_s: float | None = None
    memory_mb: float | None = None  # the most that one task has used
    asked_mb: float | None = None
    asked_for: str = ""  # a node, a CPU, or in all
    nodes: str = ""
    has_started: bool = True
    work_dir: str = ""
    log: str = ""
    command: str = ""
    is_current: bool = False  # the controller still knows it

    @property
    def status(self) -> int | None:
        """The exit status of the job, as a shell shows it; None where it has none but zero."""
        status, signal = self.exit
        return status or (128 + signal if 0 < signal < _OUT_OF_MEMORY else None)

    def describe(self) -> str:
        """In words: `job 12 is TIMEOUT: time 1 min 13 s of 1 min 00 s, on n1 (sacct)`."""
        words = []
        if self.elapsed_s is not None and self.has_started:
            limit = "" if self.limit_s is None else f" of {format_duration(self.limit_s)}"
            words.append(f"time {format_duration(self.elapsed_s)}{limit}")
        if self.memory_mb is not None or self.asked_mb:
            used = "used is not known" if self.memory_mb is None else f"{self.memory_mb / 1024:.1f} GB of its largest task"
            asked = f", asked for {self.asked_mb / 1024:.1f} GB {self.asked_for}" if self.asked_mb else ""
            words.append(f"memory {used}{asked}")
        if self.nodes:
            words.append(f"on {self.nodes}")
        if any(self.exit):
            words.append(f"exit status {self.exit[0]}" + (f", signal {self.exit[1]}" if self.exit[1] else ""))
        state = self.state + (f" ({self.reason})" if self.reason else "") + (f" by {self.cancelled_by}" if self.cancelled_by else "")
        return f"job {self.job} is {state}" + (f": {', '.join(words)}" if words else "") + f" ({self.source})"


def read_account(job: str) -> Account | None:
    """What Slurm says of a job; None where there is no Slurm, or where it knows no such job, or knows it no more."""
    if not JOB_NAME.fullmatch(job):
        return None
    kept, recent = _read_sacct(job), _read_scontrol(job)
    if kept is None or recent is None:
        return kept or recent
    # Accounts are a little late, and know no log; the controller knows no memory and not who cancelled.
    newest = recent if kept.state in ("PENDING", "RUNNING") else kept
    if recent.asked_mb:
        kept = replace(kept, asked_mb=recent.asked_mb, asked_for=recent.asked_for)
    return replace(
        kept,
        state=newest.state,
        reason=kept.reason or recent.reason,
        log=recent.log,
        command=recent.command,
        work_dir=recent.work_dir,
        is_current=True,
    )


def _read_sacct(job: str) -> Account | None:
    command = ["sacct", "--parsable2", "--noheader", f"--delimiter={_SEPARATOR}", f"--format={_FIELDS}", f"--jobs={job}"]
    try:
        text = run_slurm(*command)[:_TEXT_MAX]
    except RunError:  # it is not there, too
        return None
    names = _FIELDS.split(",")
    rows = [dict(zip(names, line.split(_SEPARATOR), strict=True)) for line in text.splitlines() if line.count(_SEPARATOR) == len(names) - 1]
    main = next((row for row in rows if row["JobID"] == job), None)
    if main is None:
        return None
    steps = [row for row in rows if row["JobID"].startswith(f"{job}.")]
    state, _, by = main["State"].partition(" by ")
    if any(step["State"].startswith("OUT_OF_ME") for step in steps) and state in ("FAILED", "COMPLETED"):
        state = "OUT_OF_MEMORY"
    asked = re.fullmatch(r"([\d.]+[KMGTP]?)([nc]?)", main["ReqMem"])
    limit_min = _read_whole(main["TimelimitRaw"])
    used = [size for step in steps if (size := _parse_memory(step["MaxRSS"])) is not None]
    return Account(
        job=job,
        state=state.split(" ")[0].rstrip("+"),
        source="sacct",
        reason="" if main["Reason"] in ("None", "Unknown") else main["Reason"],
        cancelled_by=_name_user(by.strip()),
        exit=_parse_exit(main["ExitCode"]),
        elapsed_s=_read_whole(main["ElapsedRaw"]),
        limit_s=None if limit_min is None else limit_min * 60,
        memory_mb=max(used, default=None),
        asked_mb=_parse_memory(asked[1]) if asked else None,
        asked_for={"n": "a node", "c": "a CPU"}.get(asked[2], "in all") if asked else "",  # Slurm 21.08 and newer say only how much in all
        nodes="" if main["NodeList"].startswith("None") else main["NodeList"],
        has_started=main["Start"] not in ("Unknown", "None", ""),
        work_dir=main["WorkDir"],
    )


def read_parts(job: str) -> list[Account]:
    """What the controller says of each task of an array, or component of a heterogeneous job; none of a job that has no parts."""
    return [_describe(name, values) for values in _show(job) if (name := _name_part(values)) not in ("", job)]


def _name_part(values: dict[str, str]) -> str:
    for parent, part, sign in (("ArrayJobId", "ArrayTaskId", "_"), ("HetJobId", "HetJobOffset", "+")):
        if parent in values and part in values:
            return f"{values[parent]}{sign}{values[part]}"
    return ""


def _read_scontrol(job: str) -> Account | None:
    return next((_describe(job, values) for values in _show(job)), None)


def _show(job: str) -> list[dict[str, str]]:
    try:
        return [values for values in show_jobs(job) if "JobState" in values]
    except RunError:  # it is not there, or does not answer
        return []


def _describe(job: str, values: dict[str, str]) -> Account:
    limit = _parse_clock(values.get("TimeLimit", ""))
    memory = next(((key, values[key]) for key in ("MinMemoryNode", "MinMemoryCPU") if key in values), ("", ""))
    return Account(
        job=job,
        state=values["JobState"],
        source="scontrol",
        reason=reason if (reason := find_reason(values["JobState"], values.get("Reason", "None"))) != "None" else "",
        exit=_parse_exit(values.get("ExitCode", "")),
        elapsed_s=_parse_clock(values.get("RunTime", "")),
        limit_s=limit,
        asked_mb=_parse_memory(memory[1]) or None,
        asked_for="a CPU" if memory[0] == "MinMemoryCPU" else "a node",
        nodes="" if (nodes := values.get("NodeList", "")) == "(null)" else nodes,
        has_started=values.get("StartTime") != "Unknown" and bool(nodes) and nodes != "(null)",
        work_dir=values.get("WorkDir", ""),
        log=values.get("StdOut", ""),
        command=values.get("Command", ""),
        is_current=True,
    )


def _parse_exit(text: str) -> tuple[int, int]:
    """The status and the signal in Slurm's `137:0` or `0:9`."""
    match = re.fullmatch(r"(\d{1,5}):(\d{1,5})", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _parse_clock(text: str) -> float | None:
    """Seconds in Slurm's `days-hours:minutes:seconds`; None where there is no such text, or no limit."""
    return parse_time(text) * 60 if re.fullmatch(r"(\d{1,6}-)?\d{1,6}(:\d{1,2}){1,2}", text) else None


def _parse_memory(text: str) -> float | None:
    """Megabytes in Slurm's `1234K`, `500M` or `4G`; a number without a unit is of megabytes."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([KMGTP]?)", text)
    return float(match[1]) * 1024.0 ** " KMGTP".index(match[2] or "M") / 1024**2 if match else None


def _read_whole(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,15}", text) else None


def _name_user(text: str) -> str:
    """The user of a number, with it."""
    if text.isdigit():
        with contextlib.suppress(KeyError, OverflowError):
            return f"{pwd.getpwuid(int(text)).pw_name} (uid {int(text)})"
    return text
