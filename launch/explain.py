"""The program `python -m launch.explain RUN|JOB`: why a run ended, which rank was the first, and what to do now. Reads only."""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import dataclasses
import datetime
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import cluster
from launch.account import JOB_NAME, Account, read_account, read_parts
from launch.endings import STRONG_STATES, WEAK_STATES, Log, describe_status, find_first, find_kind
from launch.evidence import RUNS, Facts, find_log, find_runs_of, gather_facts, is_in_kernel_log, read_boot_time, read_logs, read_stack
from launch.request import list_words
from launch.runs import describe_best, find_saved_step, is_run, list_noted_jobs, read_noted_request, read_own_note
from mnist_dist.console import format_duration
from mnist_dist.errors import RunError, UserError
from mnist_dist.files import as_argument, check_readable
from mnist_dist.lock import read_holder
from mnist_dist.options import Parser, path_argument
from mnist_dist.preemption import STOPPED_EARLY, Stop
from mnist_dist.program import make_printable, print_answer
from mnist_dist.record import CONFIG_FILE, METRICS_FILE, RESULT_FILE, STACKS, count_memory_kills, is_count, is_number, parse_timestamp
from mnist_dist.rendezvous import name_ranks
from mnist_dist.source import is_named_before

_RANKS_NAMED = 100_000

# What each kind of end means.
_MEANINGS = {
    "finished": "finished",
    "running": "still running",
    "silent": "still running, but it has added no row for long",
    "waiting": "its job waits",
    "to be continued": "saved, and asked to be requeued, which did not happen",
    "stopped": "told to end, and saved",
    "interrupted": "stopped by Ctrl-C, and saved",
    "time limit": "ended by its time limit",
    "deadline": "ended by its deadline",
    "cancelled": "cancelled",
    "preempted": "ended to make room for another job",
    "memory": "out of memory",
    "GPU memory": "out of memory of a GPU",
    "node failed": "a node failed",
    "host restarted": "its host was restarted",
    "NaN": "the numbers of the training are not finite",
    "NCCL": "NCCL could not do its work",
    "disk full": "the disk is full",
    "file too large": "a file was larger than a limit allows",
    "no threads": "no more threads or processes could be started",
    "rank gone": "a rank was killed, or its node went down",
    "suspended": "it stood still for too long",
    "rank silent": "a rank was silent",
    "cut off": "the connection between ranks broke",
    "rank failed": "a rank failed",
    "did not meet": "the ranks did not find each other",
    "no samples": "the data came no more",
    "in use": "another job had the run folder",
    "folder gone": "its folder was moved or removed while it ran",
    "checkpoint": "its checkpoints cannot be used",
    "mistake": "a mistake in options, files or the number of processes",
    "not started": "it ended before the training began",
    "killed": "killed: it recorded no end",
    "damaged": "its record is damaged",
    "failed": "failed",
    "unknown": "not known",
}
_UNFINISHED = {"running", "silent", "waiting"}
_SAVED = {"to be continued", "stopped", "interrupted"}
_PENDING = {
    "Resources": "it waits for nodes",
    "Priority": "other jobs come before it",
    "BeginTime": "it is not to begin before a set time, as after a requeue",
    "JobArrayTaskLimit": "it waits for other runs of its sweep (--parallel)",
    "JobHeldUser": "somebody holds it back",
    "JobHeldAdmin": "the site holds it back",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "the job that it waits for did not end well, so it never starts",
    "PartitionTimeLimit": "its time limit is longer than its partition allows, so it never starts",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows, so it never starts",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "BadConstraints": "no node has what it asks for, so it never starts",
    "JobHoldMaxRequeue": "Slurm holds it back: it was requeued too often",
    "REVOKED": "squeue --federation shows it",
    "ReservationDeleted": "its reservation was deleted, and Slurm holds it back",
    "SPECIAL_EXIT": "Slurm holds it back: it ended with a status for which the site does so",
}
# The many that are alike; the first that matches counts.
_PENDING_ALIKE = (
    (r"Per(Job|Node)", "it asks for more than its user, account or quality of service allows a job, so it never starts"),
    (r"QOSMin", "it asks for less than its quality of service demands, so it never starts"),
    (r"^Invalid|NotAllowed$", "it may not use its account or quality of service, so it never starts"),
    (r"^(QOS|Assoc|Max)", "a limit of its user, account or quality of service is reached"),
)

_NOT_FOR_MEMORY = "not for its memory"
_TROUBLE = re.compile(r"a checkpoint could not be written|metrics\.jsonl cannot be written|run_dir .* is gone[:;]")
_TROUBLE_MAX = 300


@dataclass
class Explanation:
    """Why a run ended; what is not known is None or empty."""

    run: str
    job: str
    end: str  # the kind
    says: str  # one line
    step: int | None = None
    total: int | None = None
    started: str = ""
    ended: str = ""
    starts: int = 0
    first: str = ""  # the rank that failed first
    last_lines: list[str] = field(default_factory=list)  # its own, or of the whole log
    consequence: str = ""
    status: int | None = None
    meaning: str = ""  # of the status
    slurm: str = ""
    account: dict[str, Any] | None = None
    saved_step: int | None = None
    notes: list[str] = field(default_factory=list)
    log: str = ""
    now: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 explained, 2 no such run or job, 1 anything else."""
    return print_answer(lambda: _answer(arguments))


def _answer(arguments: Sequence[str] | None) -> int:
    parser = Parser("launch.explain", "Explain why a run ended, and what to do now.", usage="RUN|JOB [--json]")
    parser.add_argument(
        "what", metavar="RUN|JOB", type=path_argument, help="a run folder, or the number of a Slurm job, such as 12 or 12_3"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse(arguments)
    answers = explain(given["what"])
    if given["json"]:
        objects = [dataclasses.asdict(answer) for answer in answers]
        print(json.dumps(objects if len(objects) > 1 else objects[0], indent=2))
    elif len(answers) == 1:
        print(show(answers[0]))
    else:
        for answer in answers:
            print(show(answer).splitlines()[0])
        print(f"job {given['what']} has {len(answers)} runs; give one of them, or its own job, for more")
    return 0


def explain(what: str) -> list[Explanation]:
    """Explain a run folder or a job; of a job that is an array, each of its runs. Raises `UserError` where there is neither."""
    path = Path(what)
    check_readable(path)
    if os.path.isdir(path):
        if not is_run(path):
            raise UserError(f"{path} is no run folder; python -m launch.jobs RUNS_DIR lists those in RUNS_DIR")
        return [_explain_run(path, "")]
    if not JOB_NAME.fullmatch(what):
        raise UserError(f"{what} is neither a folder nor the number of a job; expected a run folder, or a number such as 12 or 12_3")
    account = read_account(what)
    found = find_runs_of(what, account)
    if found:
        return [_explain_run(path, job) for path, job in found]
    if account is None:
        known = "there is no Slurm here"
        if cluster.is_slurm_here():
            known = "Slurm does not know it (any more)"
            try:
                cluster.show_job(what)
            except RunError as error:
                known = str(error)
        raise UserError(f"no run in {RUNS} is of job {what}, and {known}; give the run folder")
    # Of an array, and of a heterogeneous job, one line of Slurm's would speak for all.
    return [_explain_job(part) for part in read_parts(what) or [account]]


# What follows from it.


def _explain_run(path: Path, job: str) -> Explanation:
    facts = gather_facts(path, job)
    is_last = facts.number == len(facts.starts)
    kind, notes = _decide(facts, is_last, is_asked=bool(job))
    state, start, end = facts.state, facts.start, facts.end
    step = end.get("step", state.step) if not is_last and end else state.step
    answer = Explanation(str(path), facts.job, kind, "", step=step, total=state.total, starts=len(facts.starts), log=facts.log_path)
    answer.started = str(start.get("time", ""))
    answer.ended = str(end.get("time", "")) if facts.has_begun else ""
    answer.saved_step = find_saved_step(path)
    answer.notes = notes
    if facts.account is not None:
        answer.slurm, answer.account = facts.account.describe(), dataclasses.asdict(facts.account)
    if kind not in _UNFINISHED | {"finished"}:
        _add_ranks(facts, answer)
        _add_status(facts, answer)
        if not facts.has_begun and kind not in ("not started", "damaged") and "before the training" not in _describe_details(facts, kind):
            answer.notes.append("the training had not begun")
        if kind == "not started" and not facts.logs:
            by_job = "it left no log: it was cancelled while it waited, or its node could not write there"
            answer.notes.append(by_job if facts.job else "no job is noted, and no start: the message on the screen of its start tells why")
    answer.says = _MEANINGS.get(kind, kind)
    if details := _describe_details(facts, kind):
        answer.says = details if kind.startswith("rank ") else f"{answer.says}: {details}"
    if not is_last:
        answer.notes.append(
            f"the run went on after this start, number {facts.number} of {len(facts.starts)}; give the run folder for the last one"
        )
    if facts.copy_of:
        answer.notes.append(f"this folder is a copy of {facts.copy_of}: the job and the process in its notes are that one's")
    if facts.unanswered:
        answer.notes.append(facts.unanswered)
    answer.notes += [f"damaged: {message}" for message in facts.damaged]
    answer.now = _advise(facts, answer)
    return answer


def _decide(facts: Facts, is_last: bool, is_asked: bool) -> tuple[str, list[str]]:
    """The kind of an end, and what else is to be noted of it. `is_asked`: for one job of the run."""
    state, account, log = facts.state, facts.account, facts.log
    if state.is_finished:
        return "finished", []
    is_cleared_up = state.state.startswith("completing") and facts.why.startswith("failed")  # which may take long where a node is down
    is_over = is_asked and account is not None and not cluster.is_active_state(account.state)  # and another job of its chain is not
    if is_last and state.is_active and not is_cleared_up and not is_over:
        return "waiting" if state.is_waiting else "silent" if state.silent_s else "running", _describe_before(facts)
    if any(message.startswith(str(facts.path / RESULT_FILE)) for message in facts.damaged):
        return "damaged", []
    slurms = account.state if account else ""
    weak = WEAK_STATES.get(slurms) or (log.notice if log.notice in WEAK_STATES.values() else "")
    strong = STRONG_STATES.get(slurms) or (log.notice if log.notice in STRONG_STATES.values() else "")
    why = facts.why
    if strong:
        return strong, [log.notice_line] if log.notice == strong else []
    if why.startswith("stopped"):
        if Stop.REQUEUE.cause in why:
            if weak == "cancelled" and not log.requeue:  # while it waited to be started again
                return weak, []
            return "to be continued", [log.requeue] if log.requeue else []
        return ("interrupted", []) if Stop.INTERRUPT.cause in why else (weak or "stopped", [])
    if why.startswith("failed"):
        kind = find_kind(why)
        host = str(facts.start.get("host"))
        counted = facts.end.get("memory_kills")
        kills = counted if is_count(counted) else 0
        killed = f"the kernel of {host} killed {_count(kills, 'process', 'processes')} for memory while this start ran"
        if kind == "no samples" and kills:
            return kind, [f"{killed}: perhaps a worker"]
        if kind == "rank gone" and find_first(why).endswith(f" on host {host}"):  # the one that counts what its kernel kills
            if kills:
                return "memory", [killed]
            if facts.start.get("memory_kills") is not None:
                return kind, [f"{_NOT_FOR_MEMORY}: the kernel of {host} killed no process for memory while this start ran"]
        return kind or ("mistake" if facts.end.get("status") == UserError.exit_code else "rank failed" if find_first(why) else "failed"), []
    if why == "finished":
        return "damaged", [f"it was finished, but {RESULT_FILE} is not there"]
    said = next((kind for _, message in facts.errors if (kind := find_kind(message))), "")
    status = facts.status if facts.status is not None else account.status if account else None
    if not facts.has_begun:
        if facts.damaged and not facts.job:
            return "damaged", []
        return said or ("mistake" if status == UserError.exit_code else weak or "not started"), []
    if weak:
        return weak, []
    if said:
        return said, _describe_kill(facts)[1] if said == "rank gone" else []
    if facts.damaged and not facts.starts:
        return "damaged", []
    return _describe_kill(facts)


def _describe_before(facts: Facts) -> list[str]:
    """How the start before a job that waits has ended; of one that runs, the last that its log says of what could not be written."""
    if facts.state.is_waiting and facts.why:
        return [f"its start {facts.number} {facts.why}"]
    trouble = [line for line in facts.log.lines if _TROUBLE.search(line)]
    return [f"its log says: {trouble[-1][:_TROUBLE_MAX]}"] if trouble and not facts.state.is_waiting else []


def _describe_kill(facts: Facts) -> tuple[str, list[str]]:
    """What can be known of a start that recorded no end."""
    start, host = facts.start, str(facts.start.get("host", ""))
    if "memory_kills" not in start and not facts.end:
        return "killed", ["an older version of this program may have recorded none"]
    if host != platform.node():
        return "killed", [f"its host was {host}: only the kernel's log there can tell whether it was killed for its memory"]
    booted_s, begun_s = read_boot_time(), parse_timestamp(start.get("time"))
    if booted_s and begun_s and booted_s > begun_s:
        booted = datetime.datetime.fromtimestamp(booted_s, datetime.UTC).isoformat(timespec="seconds")
        return "host restarted", [f"this host was restarted at {booted}, after this start began"]
    holder = read_holder(facts.path)
    if holder and is_in_kernel_log(holder.pid):
        return "memory", [f"the kernel's log: process {holder.pid}, rank zero, was killed for its memory"]
    before, now = start.get("memory_kills"), count_memory_kills()
    if not is_count(before) or now is None:
        return "killed", ["the kernel of this host does not tell whether it was killed for its memory"]
    if now > before:
        count = _count(now - before, "process", "processes")
        return "killed", [f"the kernel of this host has killed {count} for memory since it began: perhaps this one"]
    return "killed", [f"{_NOT_FOR_MEMORY}: the kernel of this host has killed no process for memory since it began"]


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _describe_details(facts: Facts, kind: str) -> str:
    """What the record, or else the log, says of an end."""
    state, account = facts.state, facts.account
    if kind == "finished":
        return f"{describe_best(state)} after {state.step} steps" if state.best is not None else ""
    if kind in ("running", "silent"):
        age_s = _find_age(facts.path / METRICS_FILE)
        row = "" if age_s is None or not facts.last_row else f", newest row (step {facts.last_row['step']}) {format_duration(age_s)} ago"
        left = f", {format_duration(state.left_s)} left" if state.left_s is not None and kind == "running" else ""
        return f"step {state.step}{f' of {state.total}' if state.total else ''}{row}{left}"
    if kind == "waiting":
        return state.state + (f", {_describe_pending(state.reason)}" if state.reason not in ("", "None") else "")
    if kind == "cancelled":
        by = f"by {account.cancelled_by}" if account and account.cancelled_by else "by whom is only in Slurm's accounts (sacct)"
        return by + _describe_saving(facts)
    if kind in WEAK_STATES.values():
        return _describe_saving(facts).removeprefix(", ")
    words = facts.why.removeprefix("failed: ") if not facts.why.startswith(("stopped", "finished")) else ""
    if not words and not (facts.has_begun and kind in STRONG_STATES.values()):
        messages = [message for _, message in facts.errors]
        words = next((message for message in messages if find_kind(message) == kind), "") or next(iter(messages), "")
    # What else to do about it is said below.
    return re.split(r"; (?:the run stops here|where the others were)", words)[0][:400]


def _describe_saving(facts: Facts) -> str:
    if facts.why.startswith("stopped"):
        return ", and saved"
    if not facts.has_begun:
        return ", before the training began"
    return ", before it could save"


def _describe_pending(reason: str) -> str:
    name = reason.partition(",")[0]  # after a comma Slurm names nodes
    alike = next((words for pattern, words in _PENDING_ALIKE if re.search(pattern, name)), "")
    return _PENDING.get(name) or alike or ("Slurm holds it back until somebody releases it" if cluster.is_held(name) else "see man squeue")


def _find_age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _add_ranks(facts: Facts, answer: Explanation) -> None:
    """Who was the first, its last lines, and whose end followed from it."""
    kind = answer.end
    if kind in _SAVED or (facts.why.startswith("stopped") and kind in WEAK_STATES.values()):
        return
    first = _find_first(facts.why, facts.errors)
    if not first and facts.has_begun and facts.world_size > 1:
        of_slurm = facts.account is not None and facts.account.state in STRONG_STATES  # which may have ended all of them
        first = _find_dead(facts.log, kind)
        if not first and not facts.end and not of_slurm and kind == "memory":
            first = "rank 0"  # the kernel's log names its process
        elif not first and not facts.end and kind == "killed":
            answer.notes.append("rank zero recorded no end: it was killed, perhaps only after another rank")
    answer.first = first
    numbers = _parse_ranks(first)
    rank = numbers[0] if numbers else 0
    if rank in facts.logs:
        answer.last_lines = facts.logs[rank].show_rank(str(rank))
    elif None in facts.logs and (numbers or kind not in WEAK_STATES.values()):
        answer.last_lines = facts.log.show_rank(str(rank))
    if kind == "rank silent" and numbers:
        answer.notes += read_stack(facts.path, rank)
    others = sorted(set(range(min(facts.world_size, _RANKS_NAMED))) - set(numbers))
    if numbers and others and facts.has_begun:
        answer.consequence = f"{name_ranks(others)} ended because of it"


def _find_dead(log: Log, kind: str) -> str:
    """The rank that srun saw die first; empty where all died by Slurm's hand."""
    if kind == "node failed":
        return log.first_lost
    return "" if kind in WEAK_STATES.values() else log.first_dead


def _find_first(why: str, errors: list[tuple[str, str]]) -> str:
    """The rank that others name, or the only one with an error of its own; empty where all say the same, or nobody says anything."""
    named = next((found for message in [why, *(message for _, message in errors)] if (found := find_first(message))), "")
    ranks = {rank for rank, _ in errors}
    return named or (f"rank {rank}" if len(ranks) == 1 and (rank := ranks.pop()) else "")


def _parse_ranks(text: str) -> list[int]:
    """The numbers in `ranks 1, 3-4 on host a, rank 7 on host b`."""
    numbers: list[int] = []
    for part in re.findall(r"ranks? ([\d, -]{1,200})", text):
        for low, high in re.findall(r"(\d{1,7})(?:-(\d{1,7}))?", part):
            numbers += range(int(low), min(int(high or low), int(low) + 10_000) + 1)
    return sorted(set(numbers))


def _add_status(facts: Facts, answer: Explanation) -> None:
    own = facts.end.get("status") if facts.has_begun and is_count(facts.end.get("status")) else facts.status
    account = facts.account
    jobs = account.status if account is not None else None
    answer.status = own if own is not None else jobs
    if answer.status is None:
        killed = answer.end in ("killed", "memory") and facts.has_begun and not facts.end and facts.account is None
        answer.meaning = "not recorded" + ("; a shell shows 137 for SIGKILL" if killed else "")
        return
    answer.meaning = describe_status(answer.status)
    if own is not None and jobs is not None and jobs != own:
        answer.meaning += f"; {jobs} of the job: {describe_status(jobs)}"


# What to do now.


def _advise(facts: Facts, answer: Explanation) -> list[str]:
    run, kind = as_argument(facts.path), answer.end
    resume, jobs = _make_command(facts), ["python", "-m", "launch.jobs"]
    if kind == "finished":
        return [f"nothing; {shlex.join(['python', '-m', 'mnist_dist.evaluate', run])} counts what it gets right"]
    if kind == "running":
        return [f"wait; {shlex.join([*jobs, 'follow', run])} {'shows its log' if facts.logs else 'returns when it ends'}"]
    if kind == "waiting":
        return _advise_waiting(facts.job, facts.state.reason, facts.state.is_suspended, f"ask for what the cluster has: {resume}")
    if kind == "silent":
        return [f"look whether its processes work; else {shlex.join([*jobs, 'cancel', run])}", resume]
    if kind == "damaged" and facts.why == "finished":  # and its result is gone
        if answer.saved_step is None:
            return [f"restore {RESULT_FILE} and the checkpoints, or use another run_dir"]
        return [f"{resume}   (makes {RESULT_FILE} again from step {answer.saved_step})"]
    host = re.search(r"on host (\S+?)(?:,|$)", answer.first)
    where = host[1] if host else str(facts.start.get("host") or "its node")
    again = f"{resume}   (continues from {_describe_saved(answer)})"
    first = {
        "memory": f"give it more memory{_ask_memory(facts)}, or a smaller --micro_batch, which changes no result but rounding",
        "GPU memory": "give it a smaller --micro_batch",
        "NaN": "the same command comes to the same numbers: start another run_dir with a lower --learning_rate or more --warmup",
        "NCCL": f"correct what NCCL names on {where}; for its shared memory, df -h /dev/shm; with NCCL_DEBUG=INFO it tells more",
        "disk full": f"make room, of bytes or of files: df -h {shlex.quote(run)}; df -i {shlex.quote(run)}; quota -s",
        "file too large": f"raise the limit on the size of a file on {where}: ulimit -f",
        "no threads": f"start less on {where}, or raise its limits: ulimit -u, and pids.max of the job's cgroup",
        "node failed": "scontrol show node NODE, or sinfo -R, shows the node's state; exclude it if it fails again",
        "rank gone": f"on {where}: dmesg -T | grep -i 'killed process'",
        "killed": f"on {where}: dmesg -T | grep -i 'killed process'",
        "suspended": "if the site suspends jobs, give a --timeout_s that outlasts it: one that is killed is noticed at once all the same",
        "rank silent": f"look at {shlex.quote(str(facts.path / STACKS))}; if the rank was only slow, raise --timeout_s",
        "cut off": "let the hosts try each other, on the same nodes: python -m mnist_dist.probe exchange",
        "did not meet": "look at the log and the node of the rank that is named",
        "no samples": "look at what reads the data: memory of the node, --workers, --timeout_s",
        "in use": f"wait for that job: {shlex.join([*jobs, as_argument(facts.path.parent)])}",
        "folder gone": "put the folder back under its name: the same command resumes from its last checkpoint",
        "checkpoint": "restore the checkpoint that the message names, or use another run_dir",
        "mistake": "correct what the message names",
        "not started": "correct what the log says" if facts.logs and STOPPED_EARLY not in facts.log.last_line else None,
        "failed": "correct what the message names",
        "rank failed": "correct what the message names",
        "damaged": "restore or remove the file that is named",
    }.get(kind)
    if any(note.startswith(_NOT_FOR_MEMORY) for note in answer.notes):
        first = "look who killed it: SIGKILL comes from a person, a launcher or a site's limits; a crash of Python's prints its reason"
    if kind == "NaN":
        return [first or "", f"the last good state: {_describe_saved(answer)}"]
    if kind == "deadline":
        first = "give it a later --deadline, in --sbatch"
    if kind == "time limit" and not facts.why.startswith("stopped"):
        first = "give it a longer --time, or a --signal_delay_s that leaves time to save"
    return [*([first] if first else []), again]


def _advise_waiting(job: str, reason: str, is_suspended: bool, again: str) -> list[str]:
    """What to do about a job that waits for this reason of Slurm, or is suspended."""
    if is_suspended:
        return [f"scontrol resume {job}, by whoever suspended it: see docs/cluster.md for what a suspension costs"]
    if reason == "JobHeldAdmin":
        return [f"ask those who run the cluster: only they can release it; scontrol show job {job} may have a comment"]
    if cluster.is_held(reason):
        return [f"scontrol release {job}"]
    if "never starts" in _describe_pending(reason):
        return [f"scancel {job}", again]
    return [f"wait; squeue --start --job {job} shows when it may begin"]


def _describe_saved(answer: Explanation) -> str:
    if answer.saved_step is None:
        return "the beginning: nothing was saved"
    lost = (answer.step or 0) - answer.saved_step
    return f"step {answer.saved_step}" + (f"; {_count(lost, 'step is', 'steps are')} repeated" if lost > 0 else "")


def _ask_memory(facts: Facts) -> str:
    asked = facts.account.asked_mb if facts.account else None
    request = read_noted_request(facts.path)
    asked_gb = request.memory_gb if request else None
    if asked_gb is None and asked and facts.account and facts.account.asked_for == "a node":
        asked_gb = asked / 1024
    if asked_gb:
        return f", such as --memory_gb {max(1, round(asked_gb * 1.5)):g}"
    used = facts.last_row.get("health/memory_gb")
    return f" (rank zero had used {used:.1f} GB at step {facts.last_row['step']})" if is_number(used) else ""


def _make_command(facts: Facts) -> str:
    """The command that resumes a run, as far as the record has it."""
    config, start = facts.config, facts.start
    # Another's folder may name a task whose code this user has never run: it is not proposed.
    if config is None or not is_named_before(config.task.name) or facts.copy_of:
        return "the same command as before"
    rest = ["--config", as_argument(facts.path / CONFIG_FILE), "--run_dir", as_argument(facts.path)]
    size, launcher = facts.world_size, str(start.get("launcher", ""))
    if noted := read_own_note(facts.path, "job"):
        request, chain = read_noted_request(facts.path), len(list_noted_jobs(noted))
        if request is None:
            return "the same command as before"
        words = [*list_words(request), *([f"--chain={chain}"] if chain > 1 else [])]
        return shlex.join(["python", "-m", "launch.submit", *words, *rest])
    if start.get("job") and launcher == "srun":
        return "the same sbatch command again"
    if launcher == "torchrun" and size > 1 and start.get("nodes") == 1:
        return shlex.join(["torchrun", "--nproc-per-node", str(size), "-m", "mnist_dist.train", *rest])
    return shlex.join(["python", "-m", "mnist_dist.train", *rest]) if size == 1 else "the same command as before"


def _explain_job(account: Account) -> Explanation:
    """A job whose run folder is not found: what Slurm and its log say."""
    path = find_log(account, account.job)
    logs, _ = read_logs(path)
    log = logs.get(None, Log())
    answer = Explanation("", account.job, "", "", slurm=account.describe(), account=dataclasses.asdict(account), log=path)
    messages = [message for _, message in log.errors]
    said = next((kind for message in messages if (kind := find_kind(message))), "")
    if cluster.is_active_state(account.state) and account.state not in ("RUNNING", "COMPLETING"):
        state = cluster.describe_state(account.state, account.reason)
        pending = "" if cluster.is_suspended(account.state) else f", {_describe_pending(account.reason)}"
        answer.end, answer.says = "waiting", f"{_MEANINGS['waiting']}: {state}{pending}"
        answer.now = _advise_waiting(account.job, account.reason, cluster.is_suspended(account.state), "ask for what the cluster has")
        return answer
    if account.state in ("RUNNING", "COMPLETING"):
        answer.end, answer.says = "running", _MEANINGS["running"] + (": Slurm clears up after it" if account.state == "COMPLETING" else "")
        answer.now = [f"tail -f {shlex.quote(path)}" if path else f"scontrol show job {account.job}"]
        return answer
    kind = "finished" if account.state == "COMPLETED" and not any(account.exit) else STRONG_STATES.get(account.state, "")
    kind = kind or (log.notice if log.notice in STRONG_STATES.values() else "") or said or WEAK_STATES.get(account.state, "")
    kind = kind or ("mistake" if account.status == UserError.exit_code else "failed" if log.has_begun else "not started")
    answer.end, answer.says = kind, _MEANINGS[kind]
    if kind == "cancelled":
        answer.says += f" by {account.cancelled_by}" if account.cancelled_by else ""
        answer.says += "" if account.has_started else ", before it started"
    elif messages and kind != "finished":
        answer.says += f": {messages[0][:400]}"
    if kind != "finished":
        answer.status = account.status
        answer.meaning = "" if account.status is None else describe_status(account.status)
        answer.first = _find_first("", log.errors) or _find_dead(log, kind)
        ranks = _parse_ranks(answer.first)
        answer.last_lines = log.show_rank(str(ranks[0] if ranks else 0))
        answer.now = [*(["correct what the log says"] if log.lines else []), "submit it again"]
        if account.state in WEAK_STATES:
            answer.now = ["submit it again"]
    return answer


def show(answer: Explanation) -> str:
    """The explanation as a few lines."""
    lines = [f"{answer.run or 'job ' + answer.job}: {answer.says}"]
    place = f" of {answer.total}" if answer.total else ""
    if answer.ended or answer.started:
        began = f"start {answer.starts} began {answer.started}" if answer.started else ""
        ended = f"ended {answer.ended}" if answer.ended else ""
        lines.append(f"  when: {', '.join(filter(None, (began, ended, f'at step {answer.step}{place}')))}")
    if answer.first:
        lines.append(f"  first: {answer.first}")
    if answer.last_lines:
        lines.append(f"  its last lines{f' ({answer.log})' if answer.log else ''}:")
        lines += [f"    {line}" for line in answer.last_lines]
    if answer.consequence:
        lines.append(f"  after it: {answer.consequence}")
    if answer.meaning:
        status = "" if answer.status is None else f"{answer.status}, "
        lines.append(f"  exit status: {status}{answer.meaning}")
    if answer.slurm:
        lines.append(f"  Slurm: {answer.slurm}")
    lines += [f"  note: {note}" if not note.startswith("  ") else f"    {note}" for note in answer.notes]
    lines += [f"  {'now:' if index == 0 else 'then:'} {words}" for index, words in enumerate(answer.now)]
    return "\n".join(map(make_printable, lines))  # no text of a file begins a line of its own


if __name__ == "__main__":
    sys.exit(main())
