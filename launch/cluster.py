"""What Slurm offers and what it says of jobs: sinfo, squeue and scontrol in forms for machines. No slurmdbd is needed."""

import contextlib
import math
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from launch.request import Request, split_options
from mnist_dist.errors import RunError, UserError

_ANSWER_TIMEOUT_S = 60
_ESTIMATE_TIMEOUT_S = 2.0
_ASK_S = 1.0
_ASK_S_MAX = 15.0  # a controller has many to answer
# Nodes that a job would wait for until somebody repairs them; `*` marks those that do not answer.
_DOWN = re.compile(r"(down|drain|drained|draining|fail|failing|unknown|future|inval)|.*\*")


class Patience:
    """When to ask Slurm again: ever more rarely while nothing changes."""

    def __init__(self) -> None:
        self._asked_at, self._wait_s = -math.inf, _ASK_S

    def is_due(self) -> bool:
        """Whether to ask now; where it is, the next question waits twice as long."""
        now = time.monotonic()
        if now - self._asked_at < min(self._wait_s, _ASK_S_MAX):
            return False
        self._asked_at, self._wait_s = now, min(2 * self._wait_s, _ASK_S_MAX)
        return True

    def hasten(self) -> None:
        """Something changed: more may follow soon."""
        self._wait_s = _ASK_S


@dataclass(frozen=True)
class Nodes:
    """Some nodes of one partition that are alike."""

    partition: str
    is_default: bool
    is_partition_up: bool
    time_limit_min: float
    most_nodes: float
    count: int
    state: str
    cpus: int
    memory_mb: int
    gres: str  # such as gpu:a100:4(S:0-1)

    @property
    def are_up(self) -> bool:
        """Whether jobs can run on them now or once other jobs have ended."""
        return not _DOWN.fullmatch(self.state)


@dataclass(frozen=True)
class Job:
    """One job of the user, as the queue shows it."""

    name: str  # 12, or 12_3 in an array
    number: str  # of Slurm; an array's runs have one each once they have started
    state: str
    reason: str
    nodes: str
    restarts: int
    script: str = ""  # its path; Slurm does not say it of all jobs

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs, or is about to."""
        return is_active_state(self.state)

    @property
    def is_running(self) -> bool:
        """Whether it has nodes, and works there."""
        return self.state in ("RUNNING", "COMPLETING")


_ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"}
_ACTIVE |= {"REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "REVOKED"}


# What a user's shell may hold for these commands: filters would hide jobs and partitions, and formats could not be read.
_OF_COMMANDS = re.compile(r"(SQUEUE|SINFO|SACCT|SCONTROL|SCANCEL)_|SLURM_(TIME_FORMAT|BITSTR_LEN)$")


def is_slurm_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sinfo") is not None and shutil.which("sbatch") is not None


def run_slurm(*command: str, timeout_s: float = _ANSWER_TIMEOUT_S, with_errors: bool = False) -> str:
    """What a command of Slurm prints, on standard error as well if `with_errors`. Raises `RunError` where it fails."""
    environ = {name: value for name, value in os.environ.items() if not _OF_COMMANDS.match(name)}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, errors="replace", env=environ)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{command[0]} gives no answer within {timeout_s:g} s") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{command[0]} gives no answer: {error}") from error
    if answer.returncode:
        words = " ".join((answer.stderr or answer.stdout).split())
        raise RunError(f"{command[0]} failed with {answer.returncode}: {words[:300]}")
    return answer.stdout + answer.stderr * with_errors


def read_nodes() -> list[Nodes]:
    """The nodes of all partitions. Raises `RunError`."""
    text = run_slurm("sinfo", "--all", "--noheader", "--exact", "--noconvert", "--format=%P|%a|%l|%s|%D|%T|%c|%m|%G")
    return [_parse_nodes(line) for line in text.splitlines() if line.count("|") >= 8]


def _parse_nodes(line: str) -> Nodes:
    partition, available, limit, size, count, state, cpus, memory, gres = line.split("|", 8)
    most = size.partition("-")[2] or size
    return Nodes(
        partition=partition.removesuffix("*"),
        is_default=partition.endswith("*"),
        is_partition_up=available == "up",
        time_limit_min=parse_time(limit),
        most_nodes=_read_number(most) if most[:1].isdigit() else float("inf"),
        count=_read_number(count),
        state=state.lower(),
        cpus=_read_number(cpus),
        memory_mb=_read_number(memory),
        gres=gres,
    )


def _read_number(text: str) -> int:
    """A number of Slurm's, such as 640 or 1.5K; 0 where there is none."""
    match = re.match(r"(\d+(?:\.\d+)?)([KMGTP]?)", text)
    return round(float(match[1]) * 1024 ** " KMGTP".index(match[2] or " ")) if match else 0


def parse_time(text: str) -> float:
    """Minutes in Slurm's `days-hours:minutes:seconds`, of which the first parts may be missing; infinite where it is no such text."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        return float("inf")
    days, _, clock = text.rpartition("-")
    parts = [0, 0, *(int(part) for part in clock.split(":"))][-3:]
    return int(days or 0) * 1440 + parts[0] * 60 + parts[1] + parts[2] / 60


def count_gpus(gres: str, kind: str | None = None) -> int:
    """The GPUs in a node's `gpu:a100:4(S:0-1),gpu:2,shard:8`, all or those of a type."""
    return sum(int(number) for found, number in re.findall(r"(?:^|,)gpu(?::([^,:()]+))?:(\d+)", gres) if kind in (None, found))


def check_request(request: Request, nodes: list[Nodes]) -> list[str]:
    """Compare a request with what the cluster has. Raises `UserError` where no wait would help; returns what is worth a note."""
    if elsewhere := os.environ.get("SBATCH_CLUSTERS"):
        raise UserError(
            f"SBATCH_CLUSTERS is {elsewhere!r}, which sbatch alone would heed: set SLURM_CLUSTERS instead, for all of Slurm's commands"
        )
    names = sorted({some.partition for some in nodes})
    is_named = bool(partition := request.partition or os.environ.get("SBATCH_PARTITION"))
    partition = partition or next((some.partition for some in nodes if some.is_default), None)
    if partition is None:
        return [
            f"partition is none, and this cluster has no default one: its own rules must choose it; there are {', '.join(names) or 'none'}"
        ]
    here = [some for some in nodes if some.partition in partition.split(",")]
    if not here:
        raise UserError(f"partition is {partition!r}, which this cluster does not have; allowed: {', '.join(names)}")
    fitting, mistakes, notes = _compare(request, partition, here)
    if mistakes:
        chosen = None if is_named else _find_chosen_partition(request)
        if chosen in (None, partition):
            raise UserError("\n".join(mistakes))
        notes = check_request(request.model_copy(update={"partition": chosen}), nodes)
        return [f"this cluster's own rules choose the partition {chosen} for such a job", *notes]
    up = sum(some.count for some in fitting if some.are_up)
    if up < request.nodes:
        notes.append(f"only {up} of the nodes that this job can use are up; it waits for {request.nodes}")
    if not any(some.is_partition_up for some in here):
        notes.append(f"partition {partition} is not up; the job waits until it is")
    return notes


def _compare(request: Request, partition: str, here: list[Nodes]) -> tuple[list[Nodes], list[str], list[str]]:
    """Those of the nodes of `partition` that are large enough, what it can never grant, and what it grants to some alone."""
    mistakes: list[str] = []
    notes: list[str] = []
    # A quality of service may allow more than the partition does.
    beyond = notes if request.qos or os.environ.get("SBATCH_QOS") else mistakes
    limit = max(some.time_limit_min for some in here)
    if request.time > limit:
        beyond.append(f"time is {request.time} min; partition {partition} allows at most {limit:.0f} min")
    cpus, gpus, memory_mb = request.tasks * (request.cpus_per_task or 1), request.gpus_per_node, (request.memory_gb or 0) * 1024
    offered_gpus = [count_gpus(some.gres, request.gpu_type) for some in here]
    count, allowed = sum(some.count for some in here), max(some.most_nodes for some in here)
    if request.nodes > min(count, allowed):
        (mistakes if request.nodes > count else beyond).append(
            f"nodes is {request.nodes}; partition {partition} has {count} nodes and allows {min(count, allowed):.0f} for a job"
        )
    if "overcommit" in split_options(request.sbatch):
        cpus = 0
    for words, asked, unit, offered in (
        (f"{request.tasks} tasks of {request.cpus_per_task or 1} CPUs", cpus, "CPUs", [some.cpus for some in here]),
        (f"gpus_per_node {request.gpus}", gpus, f"{request.gpu_type or ''} GPUs".strip(), offered_gpus),
        (f"memory_gb {request.memory_gb}", memory_mb, "MB", [some.memory_mb for some in here]),
    ):
        if asked > max(offered):
            mistakes.append(f"{words} on a node are asked for; the largest node of partition {partition} has {max(offered)} {unit}")
    fitting = [
        some for some, has in zip(here, offered_gpus, strict=True) if some.cpus >= cpus and has >= gpus and some.memory_mb >= memory_mb
    ]
    if not mistakes and sum(some.count for some in fitting) < request.nodes:
        mistakes.append(
            f"nodes is {request.nodes}; of partition {partition} only {sum(some.count for some in fitting)} are as large as asked for"
        )
    return fitting, mistakes, notes


def _find_chosen_partition(request: Request) -> str | None:
    """The partition in which sbatch says that such a job would begin, by all rules of the cluster. Queues nothing."""
    asked: dict[str, Any] = {
        "nodes": request.nodes,
        "ntasks-per-node": request.tasks,
        "cpus-per-task": request.cpus_per_task,
        "time": request.time,
    }
    asked |= {"gpus-per-node": request.gpus, "account": request.account, "qos": request.qos, "constraint": request.constraint}
    asked |= {"mem": request.memory, "reservation": request.reservation}
    options = [f"--{name}={value}" for name, value in asked.items() if value]
    with contextlib.suppress(RunError):
        found = re.search(
            r"to start at .* in partition (\S+)", run_slurm("sbatch", "--test-only", *options, "--wrap=true", with_errors=True)
        )
        return found[1] if found else None
    return None


def find_jobs() -> tuple[list[Job], str]:
    """As `read_jobs`, and an empty text; where Slurm does not answer, no jobs, and why they are not known."""
    try:
        return read_jobs(), ""
    except RunError as error:
        return [], f"{error}; jobs that only wait in the queue are not known"


def read_jobs() -> list[Job]:
    """The user's jobs that wait, run or ended within the last minutes; none without Slurm. Raises `RunError` where it does not answer."""
    if not is_slurm_here():
        return []
    fields = ("JobArrayID", "JobID", "State", "Reason", "NodeList", "RestartCnt")
    columns = ",".join(f"{field}:|" for field in (*fields, "Command"))
    try:
        text = run_slurm("squeue", "--me", "--all", "--states=all", "--array", "--noheader", "-O", columns)
    except RunError as error:
        if "configuration source" in str(error):  # its commands are here, and no cluster
            return []
        raise
    lines = [[word.strip() for word in line.split("|")] for line in text.splitlines()]
    rows = [row for row in lines if len(row) > len(fields) and row[1].isdigit()]
    if not rows and (unread := re.search(r"^ *(JOBID|\d+[\d_]* ).*", text, re.MULTILINE)):  # beside its rows, a site may say anything
        raise RunError(f"squeue's answer is not in the format that was asked for: {unread[0][:100]!r}")
    return [Job(row[0], row[1], row[2], find_reason(row[2], row[3]), row[4], _read_number(row[5]), row[6]) for row in rows]


def show_job(job: str) -> dict[str, str]:
    """What Slurm says of one job, by Slurm's own names, such as JobState; empty where it knows none. Raises `RunError` if it is silent."""
    return next(iter(show_jobs(job)), {})


def show_jobs(job: str) -> list[dict[str, str]]:
    """As `show_job`, of each task of an array, and of each component of a heterogeneous job."""
    try:
        text = run_slurm("scontrol", "--oneliner", "show", "job", job)
    except RunError as error:
        if re.search("Invalid job id|not found", str(error)):
            return []
        raise
    # A value may hold spaces.
    return [dict(re.findall(r"(?:^| )([A-Z][\w/:]*)=(.*?)(?= [A-Z][\w/:]*=|\s*$)", line)) for line in text.splitlines() if line.strip()]


def is_active_state(state: str) -> bool:
    """Whether a job in this state of Slurm waits or runs, or is about to."""
    return state in _ACTIVE


def is_suspended(state: str) -> bool:
    """Whether a job in this state of Slurm has nodes, and processes that are stopped."""
    return state in ("SUSPENDED", "STOPPED")


def describe_state(state: str, reason: str = "") -> str:
    """A state of Slurm in words, with why the job waits: `pending (Resources)`."""
    if state == "REVOKED":
        return "gone to another cluster of the federation"
    return state.lower().replace("_", " ") + (f" ({reason})" if reason not in ("", "None") else "")


def find_reason(state: str, reason: str) -> str:
    """Why a job waits, as Slurm calls it. Some of its states are reasons themselves."""
    return state if state in ("REQUEUE_HOLD", "SPECIAL_EXIT", "REVOKED") else reason


def is_held(reason: str) -> bool:
    """Whether a job that waits for this reason of Slurm, such as JobHeldUser or JobHoldMaxRequeue, waits until somebody releases it."""
    # After a comma Slurm names nodes. QOSUsageThreshold is a limit.
    return re.search("held|(?<!thres)hold|^(special_exit|reservationdeleted)$", reason.partition(",")[0], re.IGNORECASE) is not None


def find_log(job: str) -> str:
    """The path of a job's log, as Slurm has it; empty where Slurm has forgotten the job, or does not answer."""
    with contextlib.suppress(RunError):
        return show_job(job).get("StdOut", "").strip()
    return ""


def estimate_start(job: str) -> str:
    """When Slurm expects a waiting job to start, in words of Slurm; empty where it does not say within seconds, or the job runs."""
    end = time.monotonic() + _ESTIMATE_TIMEOUT_S
    with contextlib.suppress(RunError):
        while (left_s := end - time.monotonic()) > 0:
            words = run_slurm("squeue", "--start", "--noheader", "--jobs", job, "--format=%T %S", timeout_s=left_s).split()
            if words[:1] != ["PENDING"] or re.fullmatch(r"[\d:T-]{16,19}", words[1]):
                return words[1].replace("T", " ") if words[:1] == ["PENDING"] else ""
            time.sleep(0.3)  # the scheduler has not come to it yet
    return ""
