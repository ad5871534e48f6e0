"""Kinds of ends of a run, and the words by which they are told apart: in its record, its logs, and Slurm's messages. Imports no torch."""

import re
from dataclasses import dataclass, field

from mnist_dist.errors import UserError
from mnist_dist.preemption import Stop

_LINES_SHOWN = 5
_LINE_MAX = 300
_WORDS_MAX = 2000
LINES_MAX = 40_000  # of a log that are looked at

# What the words of a message mean; the first that matches counts.
_WORDS = (
    ("GPU memory", r"CUDA out of memory|CUDA error: out of memory|HIP out of memory|OutOfMemoryError"),
    ("NaN", r"the (loss|gradient norm) is (nan|-?inf)|are not finite"),
    ("NCCL", r"NCCL failed"),  # it may be for want of room, though not on the run's disk
    ("disk full", r"No space left on device|[Dd]isk quota exceeded"),
    ("file too large", r"File too large"),
    ("no threads", r"no more threads or processes can be started|can't start new thread|Thread creation failed|pthread_create failed"),
    ("memory", r"Cannot allocate memory|MemoryError|DefaultCPUAllocator: |there is too little memory"),
    ("rank gone", r"(is|are) gone and left no reason"),
    ("suspended", r"stood still for [\d.]+ s"),
    ("rank silent", r"(was|were) silent for [\d.]+ s|does not answer \(stopped"),
    ("cut off", r"waited [\d.]+ s in vain|connection to another rank broke"),
    ("did not meet", r"could not join the others|did not come|was left by rank zero"),
    ("no samples", r"a worker that reads data is lost|gave no samples for|worker .* died"),
    ("in use", r"is in use by|has removed the lock|lock was lost to"),
    ("folder gone", r"run_dir .* is gone[:;]|another folder is in the place of"),
    # The group is atomic: the first checkpoint of a line, or many would take long.
    ("checkpoint", r"^(?>.*?checkpoints? ).*(is valid|cannot be read|is damaged)|has no checkpoint any more"),
)
# States of Slurm that say more than the run itself could know, and those that say less than an error of its own.
STRONG_STATES = {"OUT_OF_MEMORY": "memory", "NODE_FAIL": "node failed", "BOOT_FAIL": "node failed"}
WEAK_STATES = {"TIMEOUT": "time limit", "DEADLINE": "deadline", "CANCELLED": "cancelled", "PREEMPTED": "preempted"}
_NOTICES = (
    ("memory", r"oom[_-]kill event|: task \d+: Out Of Memory|Exceeded job memory limit|exceeded memory limit"),
    ("node failed", r"DUE TO NODE FAILURE|[Nn]ode failure on"),
    ("time limit", r"DUE TO TIME LIMIT|Exceeded time limit"),
    ("preempted", r"CANCELLED AT \S+ DUE TO PREEMPTION"),
    ("cancelled", r"error: \*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ \*\*\*"),
)
_RANKS = r"(?:ranks? [\d, -]+ on host [^\s;,]+(?:, )?)+"
_VERDICT = re.compile(rf"({_RANKS}) (?:(?:is|are) gone|(?:was|were) silent|does not answer|failed: )")
_PLACE = re.compile(r" at step \d+ on rank (\d{1,7})\b")
_ERROR = re.compile(r"(?:\[rank (\d{1,7})\] )?error: (.*)")
_HOW = r"Killed|Out Of Memory|Terminated|\w[\w ]{0,40}(?: \(core dumped\))?|Exited with exit code \d+"
_NODE = re.compile(r"[Nn]ode failure on ([^\s,]{1,255})")
_ABORTED = re.compile(r"[Nn]ode failure on|srun: Job step aborted|\*\*\* (?:STEP|JOB) \S+ ON \S+ CANCELLED AT")
_TASK = re.compile(rf"srun: error: (\S{{1,255}}): tasks? ([\d,-]{{1,200}}): ({_HOW})$")
_START = re.compile(r"(?:launch|train\.sh): job \d+, start \d+")
_REQUEUED = re.compile(r"(?:launch|train\.sh): requeued$")
_NOT_REQUEUED = re.compile(r"(?:launch|train\.sh): .*(?:not requeued again|could not be requeued).*")

_LABEL = re.compile(r"^ *\d{1,7}: ")  # of srun --label
_OF_LAUNCHERS = re.compile(r"srun: |slurmstepd|launch: |train\.sh: ")
_NOT_OF_RANKS = re.compile(rf"\[rank \d+\] |{_OF_LAUNCHERS.pattern}")

_STATUSES = {
    0: "finished",
    1: "an error while running",
    2: "a mistake in options, files or the number of processes",
    Stop.REQUEUE.exit_code: "saved, and asked to be requeued",
    Stop.INTERRUPT.exit_code: "stopped by Ctrl-C",
    Stop.TERMINATE.exit_code: "stopped by a signal to end (SIGTERM or SIGHUP)",
}
_SIGNALS = {4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}


def describe_status(status: int) -> str:
    """What an exit status means: the program's own, or 128 and the number of a signal."""
    if status in _STATUSES:
        return _STATUSES[status]
    if 128 < status < 193:
        return f"ended by signal {status - 128}" + (f" ({_SIGNALS[status - 128]})" if status - 128 in _SIGNALS else "")
    return "not a status of this program: of its launcher, or of the shell"


def find_kind(words: str) -> str:
    """The kind of failure that a message is of; empty where it is none of those known."""
    return next((kind for kind, pattern in _WORDS if re.search(pattern, words[:_WORDS_MAX])), "")


def find_first(words: str) -> str:
    """The rank that a message names as the first to fail, with its host where it has one; empty where it names none."""
    if match := _VERDICT.search(words[:_WORDS_MAX]):
        return match[1].rstrip(", ")
    match = _PLACE.search(words[:_WORDS_MAX])
    return f"rank {match[1]}" if match else ""


def shorten(why: str, status: int | None) -> str:
    """Why a run failed, in a word or two: for a table. `why` is that of ends.jsonl, or empty."""
    if why.startswith(("stopped", "finished")):
        return ""
    kind = find_kind(why)
    number = re.search(r"ranks? (\d{1,7})", find_first(why))
    if kind.startswith("rank ") and number:
        return f"rank {number[1]} {kind.removeprefix('rank ')}"
    return kind or ("mistake" if status == UserError.exit_code else f"rank {number[1]} failed" if number else "")


@dataclass
class Log:
    """What the log of a job's last start says."""

    lines: list[str] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)  # the rank, empty if alone, and its message
    tasks: list[tuple[str, str, str, str]] = field(default_factory=list)  # of srun: node, tasks, how they ended, the line
    aborted_at: int | None = None  # the number of those that came before Slurm ended the others
    notice: str = ""  # the kind of end that Slurm's own lines are of
    notice_line: str = ""
    failed_node: str = ""
    requeue: str = ""  # why there was none
    has_begun: bool = False

    @property
    def first_dead(self) -> str:
        """The task that srun saw run out of memory, else end by a signal, the first of them, such as `rank 1 on host n1`."""
        dead = [task for task in self.tasks if task[2] == "Out Of Memory"]
        # When Slurm has ended all tasks, the order of their lines means nothing.
        dead += [task for task in self.tasks[: self.aborted_at] if not task[2].startswith("Exited")]
        return next((f"rank {tasks} on host {host}" for host, tasks, _, _ in dead), "")

    @property
    def first_lost(self) -> str:
        """The tasks on the node that failed, or only its name, such as `rank 1 on host n1` or `host n1`."""
        lost = f"host {self.failed_node}" if self.failed_node else ""
        return next((f"rank {tasks} on host {host}" for host, tasks, _, _ in self.tasks if host == self.failed_node), lost)

    @property
    def last_line(self) -> str:
        """The last line that is no launcher's."""
        return next((line for line in reversed(self.lines) if not _OF_LAUNCHERS.match(line)), "")

    def show_rank(self, rank: str) -> list[str]:
        """The last lines of a rank, and what srun says of it. Lines that name no rank are shown where it has none of its own."""
        own = [line for line in self.lines if line.startswith(f"[rank {rank}] ")]
        own = own or [line for line in self.lines if not _NOT_OF_RANKS.match(line)]
        if not own and not any(line.startswith("[rank ") for line in self.lines):
            own = self.lines
        own = own[-_LINES_SHOWN:]
        own += [line for _, tasks, _, line in self.tasks if rank in tasks.split(",") and line not in own]
        return [line[:_LINE_MAX] for line in own]


def read_log(text: str) -> Log:
    """Read the text of a log, of which what comes before the last start is left out, and what comes before its last 40,000 lines."""
    log = Log()
    for line in text.splitlines()[-LINES_MAX:]:
        line = _LABEL.sub("", line.rpartition("\r")[2].rstrip()[:_WORDS_MAX])
        # After it was requeued comes another start; what Slurm says of the end of this one belongs to this one.
        if _START.search(line) or (log.lines and _REQUEUED.search(log.lines[-1]) and "DUE TO JOB REQUEUE" not in line):
            log = Log()
        if not line:
            continue
        log.lines.append(line)
        log.has_begun |= re.search(r" from step \d+ of \d+: ", line) is not None
        if match := _ERROR.match(line):
            log.errors.append((match[1] or "", match[2]))
        if match := _TASK.match(line):
            log.tasks.append((match[1], match[2], match[3], line))
        if log.aborted_at is None and _ABORTED.search(line):
            log.aborted_at = len(log.tasks)
        if match := _NODE.search(line):
            log.failed_node = match[1]
        if match := _NOT_REQUEUED.match(line):
            log.requeue = match[0]
        kind = next((kind for kind, pattern in _NOTICES if re.search(pattern, line)), "")
        if kind and (not log.notice or log.notice == "cancelled"):
            log.notice, log.notice_line = kind, line
    return log
