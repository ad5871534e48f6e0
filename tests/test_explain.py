"""launch.explain on real ends of real processes, and on what Slurm and the folders of other machines would say."""

import contextlib
import dataclasses
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import SLOW_TASK, Job, Submitted, launch
from processes import TINY, StopAt, Train, TrainTask, start_ranks

from launch import evidence, explain, jobs
from launch.endings import describe_status, find_first, find_kind, read_log, shorten
from launch.runs import find_noted_log, read_state
from mnist_dist.config import configure
from mnist_dist.files import mark_folder
from mnist_dist.tasks.mnist import Mnist

HOST = platform.node()
LONG = [*TINY, "--steps", "100000", "--checkpoint_every", "5"]


@dataclass(frozen=True)
class Faulty(TrainTask):
    """A rank that comes to grief at step 7: its numbers, its memory, its time or its code."""

    fault: str
    rank: int

    def make_task(self):
        fault, is_it = self.fault, os.environ.get("RANK", "0") == str(self.rank)

        class FaultyTask(Mnist):
            def draw(self, seed, step, size):
                drawn = super().draw(seed, step, size)
                if step == 6 and fault == "NaN":
                    drawn = drawn.clone()
                    drawn[1] = float("nan")
                elif step == 6 and is_it and fault == "hangs":
                    hang_in_the_data()
                elif step == 6 and is_it and fault == "raises":
                    raise ValueError("the planted fault")
                elif step == 6 and is_it and fault == "grows":
                    fill_the_memory()
                return drawn

        return FaultyTask


def hang_in_the_data():
    time.sleep(1000)


def fill_the_memory():
    Path(os.environ["ITS_CGROUP"], "cgroup.procs").write_text(str(os.getpid()))
    kept = []
    while True:
        kept.append(os.urandom(1 << 22))


@dataclass(frozen=True)
class Requeued(Train):
    """A rank that is asked to save for a requeue in step 5."""

    def __call__(self):
        from mnist_dist.config import parse_command_line
        from mnist_dist.loop import train

        return train(parse_command_line(self.arguments), StopAt(5)).stop.exit_code


@dataclass(frozen=True)
class WithFullDisk(Train):
    """A rank in whose run folder no file of more than a megabyte has room."""

    def __call__(self):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        return super().__call__()


def tell(path):
    (answer,) = explain.explain(str(path))
    return answer, explain.show(answer)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Real runs, all at once: their folder, what each ended with, and what was said of one while it ran."""
    folder = tmp_path_factory.mktemp("ended")

    def begin(name, work, world, *arguments):
        return start_ranks(folder / "logs" / name, work([*LONG, *arguments, "--run_dir", str(folder / name)]), world)

    def planted(fault, rank):
        return lambda arguments: Faulty(arguments, fault, rank)

    runs = {
        "finished": start_ranks(folder / "logs/finished", Train([*TINY, "--run_dir", str(folder / "finished")]), 1),
        "requeued": begin("requeued", Requeued, 1),
        "NaN": begin("NaN", planted("NaN", 1), 2, "--log_every", "10"),
        "full": start_ranks(folder / "logs/full", WithFullDisk([*TINY, "--run_dir", str(folder / "full")]), 1),
        "hung": begin("hung", planted("hangs", 1), 2, "--timeout_s", "3"),
        "raises": begin("raises", planted("raises", 1), 2),
        "terminated": begin("terminated", Train, 1),
        "interrupted": begin("interrupted", Train, 1),
        "killed": begin("killed", Train, 1),
        "lost": begin("lost", Train, 2),
    }
    signals = {
        "terminated": (0, signal.SIGTERM),
        "interrupted": (0, signal.SIGINT),
        "killed": (0, signal.SIGKILL),
        "lost": (1, signal.SIGKILL),
    }
    for name, (rank, number) in signals.items():
        runs[name][0].wait_for(lambda name=name: list((folder / name / "checkpoints").glob("step_*.pt")))
        if name == "killed":
            running = tell(folder / name)
        runs[name][rank].kill(number)
    statuses = {}
    for name, ranks in runs.items():
        if name == "hung":
            ranks[0].wait()
            ranks[1].kill(signal.SIGKILL)
        statuses[name] = [rank.wait() for rank in ranks]
    return folder, statuses, running


ENDS = {
    "finished": ("finished", [0], r"finished: test accuracy \d+\.\d+% after 10 steps\n"),
    "requeued": ("to be continued", [85], r"saved, and asked to be requeued, which did not happen\n"),
    "terminated": ("stopped", [143], r"told to end, and saved\n"),
    "interrupted": ("interrupted", [130], r"stopped by Ctrl-C, and saved\n"),
    "NaN": ("NaN", [1, 1], r"the numbers of the training are not finite: the loss is nan at step 7 on rank 1\n"),
    "full": ("file too large", [1], r"a file was larger than a limit allows: the checkpoint of step 10 could not be written: File too"),
    "raises": ("rank failed", [1, 1], rf"raises: rank 1 on host {HOST} failed: RunError: .*the planted fault"),
    "lost": ("rank gone", [1, -9], rf"rank 1 on host {HOST} is gone and left no reason"),
    "hung": ("rank silent", [1, -9], rf"rank 1 on host {HOST} was silent for 3 s: it is at {__file__}, line \d+, in hang_in_the_data"),
    "killed": ("killed", [-9], r"killed: it recorded no end\n"),
}
SHORT = {
    "NaN": "NaN",
    "full": "file too large",
    "raises": "rank 1 failed",
    "lost": "rank 1 gone",
    "hung": "rank 1 silent",
    "killed": "killed",
}


def test_a_real_failure_is_explained(tmp_path):
    work = Faulty([*LONG, "--run_dir", str(tmp_path / "raises")], "raises", 1)
    assert [rank.wait() for rank in start_ranks(tmp_path / "logs", work, 2)] == ENDS["raises"][1]
    answer, text = tell(tmp_path / "raises")
    assert answer.end == ENDS["raises"][0]
    assert re.search(ENDS["raises"][2], text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_real_end_is_explained(ended, name):
    folder, statuses, _ = ended
    kind, expected, words = ENDS[name]
    assert statuses[name] == expected
    answer, text = tell(folder / name)
    assert answer.end == kind, text
    assert re.search(words, text), text
    own = {"killed": None, "finished": None}.get(name, expected[0])
    assert answer.status == own, text
    if own is not None:
        assert f"  exit status: {own}, {describe_status(own)}" in text
    assert answer.now
    assert jobs.main([str(folder), "--json"]) == 0


@pytest.mark.slow
def test_the_first_rank_is_told_from_those_that_followed(ended):
    folder = ended[0]
    for name in ("raises", "lost", "hung"):
        text = tell(folder / name)[1]
        assert f"  first: rank 1 on host {HOST}\n" in text
        assert "  after it: rank 0 ended because of it\n" in text
    assert tell(folder / "NaN")[0].first == "rank 1"
    line = hang_in_the_data.__code__.co_firstlineno + 1
    assert f"{__file__}, line {line}, in hang_in_the_data" in "\n".join(tell(folder / "hung")[0].notes)


@pytest.mark.slow
def test_what_can_be_known_of_a_killed_process_is_told(ended, monkeypatch):
    folder = ended[0]
    _, text = tell(folder / "killed")
    assert (
        "not for its memory: the kernel of this host has killed no process for memory since it began" in text or "perhaps this one" in text
    )
    assert "its host was" not in text
    count = explain.count_memory_kills() or 0
    monkeypatch.setattr(explain, "count_memory_kills", lambda: count + 2)
    assert "has killed 2 processes for memory since it began: perhaps this one" in tell(folder / "killed")[1]
    monkeypatch.setattr(explain, "read_boot_time", lambda: time.time() + 5)
    assert tell(folder / "killed")[0].end == "host restarted"
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    assert f"its host was {HOST}: only the kernel's log there can tell" in tell(folder / "killed")[1]


@pytest.mark.slow
def test_the_table_shows_the_short_form(ended, capsys):
    folder = ended[0]
    assert jobs.main([str(folder), "--json"]) == 0
    assert {Path(row["path"]).name: row["why"] for row in json.loads(capsys.readouterr().out)} == {
        name: SHORT.get(name, "") for name in ENDS
    }
    assert jobs.main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^hung +failed|stopped +rank 1 silent", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 120, text


@pytest.mark.slow
def test_a_run_that_runs_is_not_said_to_have_ended(ended):
    answer, text = ended[2]
    assert answer.end == "running"
    assert re.search(r"still running: step \d+ of 100000, newest row \(step \d+\) \d+ s ago", text), text
    assert "exit status" not in text


@pytest.mark.slow
def test_the_command_that_is_proposed_resumes_the_run(ended, tmp_path):
    folder = ended[0] / "full"
    program, _, resumed = tell(folder)[0].now[1].partition("   (")
    words = shlex.split(program)
    assert words[:3] == ["python", "-m", "mnist_dist.train"]
    assert resumed == "continues from the beginning: nothing was saved)"
    [rank] = start_ranks(tmp_path, Train(words[3:]))
    assert rank.wait() == 0
    assert tell(folder)[0].end == "finished"


@pytest.fixture
def its_cgroup():
    """A cgroup in which a process may have 48 MB more than it has, where this user may make one."""
    for parent, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(parent, f"explain-{os.getpid()}")
        try:
            folder.mkdir()
            (folder / name).write_text(str(48 << 20))
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        yield str(folder)
        folder.rmdir()
        return
    pytest.skip("no cgroup of memory can be made here")


@pytest.mark.slow
def test_a_rank_that_the_kernel_killed_for_its_memory_is_told_from_one_that_was_killed(tmp_path, its_cgroup):
    if explain.count_memory_kills() is None:
        pytest.skip("this kernel does not count them")
    arguments = [*LONG, "--run_dir", str(tmp_path / "run")]
    ranks = start_ranks(tmp_path / "logs", Faulty(arguments, "grows", 1), 2, {"ITS_CGROUP": its_cgroup})
    assert [rank.wait() for rank in ranks] == [1, -9]
    answer, text = tell(tmp_path / "run")
    assert answer.end == "memory", text
    assert f"  note: the kernel of {HOST} killed 1 process for memory while this start ran\n" in text
    assert f"  first: rank 1 on host {HOST}\n" in text
    assert "--micro_batch" in text


# Without processes: folders as they would be, and Slurm as it would answer.

MARK = "\x1f"


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Slurm's commands, which print these texts; None: there is no such command."""

    def make(**answers):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in ({"sinfo": "", "sbatch": "", "squeue": ""} | answers).items():
            (folder / name).unlink(missing_ok=True)
            if text is not None:
                (folder / f"{name}.txt").write_text(text.replace("/nowhere/", f"{tmp_path}/runs/x/slurm/"))
                (folder / name).write_text(f"#!/bin/sh\nexec /bin/cat '{folder}/{name}.txt'\n")
                (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    return make


def account(state, *steps, code="1:0", memory="4Gn", nodes="n[1-2]", start="2026-11-26T07:43:15", reason="None", work_dir="/w"):
    """What sacct prints of job 12 and of its steps, each a state, an exit code and the memory used."""
    rows = [["12", state, code, "185", "60", memory, "", nodes, reason, start, work_dir]]
    rows += [[f"12.{name}", *step[:2], "185", "", "", step[2], nodes, "", start, ""] for name, step in enumerate(steps)]
    return "".join(MARK.join(row) + "\n" for row in rows)


def show_job(state, reason="None", code="0:0", log="/nowhere/12.log", nodes="n[1-2]", more=""):
    """A line of scontrol, as of Slurm 22.05, less the fields that do not matter."""
    start = "Unknown" if nodes == "(null)" else "2026-11-26T07:43:15"
    return (
        f"JobId=12 JobName=mnist-dist UserId=root(0) GroupId=root(0) JobState={state} Reason={reason} Dependency=(null) Requeue=1 "
        f"Restarts=0 ExitCode={code} RunTime=00:03:05 TimeLimit=01:00:00 SubmitTime=2026-11-26T07:43:15 StartTime={start} EndTime=Unknown "
        f"Partition=main NodeList={nodes} NumNodes=2 MinMemoryNode=4G Command=/w/a b/x.sh {more} WorkDir=/w StdErr={log} "
        f"StdIn=/dev/null StdOut={log} Power= \n"
    )


START = {"time": "2026-11-26T07:44:00+00:00", "step": 0, "host": "n1", "launcher": "srun", "world_size": 4, "nodes": 2, "job": "12"}
START |= {"memory_kills": 0}
SAVED = "stopped by a signal to end, or Stop on W&B, saved"


REQUEST = {"nodes": 2, "tasks_per_node": 2, "gpus_per_node": 2, "partition": "gpu", "account": "a", "sbatch": "--comment='a b'"}
AGAIN = "python -m launch.submit --nodes=2 --tasks_per_node=2 --gpus_per_node=2 --partition=gpu --account=a "
AGAIN += shlex.quote("--sbatch=--comment='a b'")


def make_run(folder, why=None, status=1, log=None, starts=1, noted=True, host="n1", **end):
    """A run of job 12 on two nodes of two ranks."""
    (folder / "slurm").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/step_00000100-0123456789abcdef.pt").touch()
    (folder / "config.yaml").write_text(configure(dataset="synthetic", steps=600).to_yaml())
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 120, "train/loss": 2.0, "health/memory_gb": 1.25}) + "\n")
    (folder / "starts.jsonl").write_text((json.dumps(START | {"host": host}) + "\n") * starts)
    if why is not None:
        row = {"time": "2026-11-26T07:46:20+00:00", "step": 120, "start": starts, "why": why, "status": status, **end}
        (folder / "ends.jsonl").write_text(json.dumps(row) + "\n")
    note = {"time": "2026-11-26T07:43:10+00:00", "folder": mark_folder(folder), "job": "12"}
    if noted:
        (folder / "slurm/job.json").write_text(json.dumps(note | {"log": str(folder / "slurm/12.log"), "request": REQUEST}))
    if log is not None:
        (folder / "slurm/12.log").write_text(log)
    return folder


BEGUN = "[rank 0] runs/x from step 0 of 600: launcher srun, world_size 4\n[rank 0] step 120/600, loss 2\n"
GONE = "rank 3 on host n2 is gone and left no reason (killed, or the node went down)"
LOST = BEGUN + f"srun: error: n2: task 3: Killed\n[rank 0] error: {GONE}\n[rank 1] error: {GONE}\n"
LOST += "srun: error: n1: tasks 0-1: Exited with exit code 1\n"
OOM = BEGUN + "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been OOM Killed.\n"
OOM += f"srun: error: n2: task 3: Out Of Memory\n[rank 0] error: {GONE}\n"
NODE = (
    BEGUN
    + "srun: error: Node failure on n2\nslurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-26T07:46:20 DUE TO NODE FAILURE, SEE "
)
NODE += "SLURMCTLD LOG FOR DETAILS ***\n"
LIMIT = BEGUN + "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-26T07:46:20 DUE TO TIME LIMIT ***\n"
CANCEL = BEGUN + "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-26T07:46:20 ***\n"
PREEMPT = BEGUN + "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-26T07:46:20 DUE TO PREEMPTION ***\n"

FIRST_GONE = BEGUN + "srun: error: n1: task 0: Killed\n[rank 1] error: rank 0 on host n1 is gone and left no reason\n"
CRASH = BEGUN + "srun: error: n1: task 2: Segmentation fault (core dumped)\n"
ENOUGH = BEGUN + "launch: not requeued again (max_requeues is 20); submit it again to go on\n"
USED = ("OUT_OF_MEMORY", "0:125", "4193000K")
FAILED = show_job("FAILED", "NonZeroExitCode", "1:0")


@dataclass(frozen=True)
class Case:
    """What is there of an end, and what is to be said of it."""

    kind: str
    words: list[str]
    why: str | None = None  # of ends.jsonl
    log: str | None = BEGUN
    sacct: str | None = None
    scontrol: str | None = None
    kills: tuple[str, int] = ("n1", 0)  # the host of rank zero, and what its kernel killed for memory
    first: str | None = None  # the rank, where that is not told by the words


CASES = {
    "memory, by sacct": Case(
        "memory",
        [
            "out of memory: rank 3 on host n2 is gone",
            "memory 4.0 GB of its largest task, asked for 4.0 GB a node",
            "--memory_gb 6,",
            "first: rank 3 on host n2\n",
            "after it: ranks 0-2 ended because of it",
            "srun: error: n2: task 3: Killed",
        ],
        f"failed: {GONE}",
        LOST,
        account("OUT_OF_MEMORY", USED, ("FAILED", "1:0", "900M")),
    ),
    "memory, by a step": Case("memory", ["OUT_OF_MEMORY"], sacct=account("FAILED", ("OUT_OF_MEMORY", "0:125", "0"))),
    "memory, by the log": Case(
        "memory",
        ["Detected 1 oom_kill event", "memory used is not known, asked for 4.0 GB a node", "first: rank 3 on host n2\n"],
        f"failed: {GONE}",
        OOM,
        scontrol=FAILED,
    ),
    "killed on the host that counts": Case("memory", ["the kernel of n2 killed 2 processes"], f"failed: {GONE}", LOST, kills=("n2", 2)),
    "killed on another host than the one that counts": Case("rank gone", ["on n2: dmesg"], f"failed: {GONE}", LOST, kills=("n1", 2)),
    "memory, by its own words": Case("memory", ["give it more memory"], "failed: DefaultCPUAllocator: can't allocate memory"),
    "memory, by words of this program": Case("memory", ["give it more"], "failed: there is too little memory (see x): unable to y"),
    "threads": Case("no threads", ["ulimit -u"], "failed: no more threads or processes can be started (see x): can't start new thread"),
    "disk": Case("disk full", ["df -i"], "failed: the checkpoint of step 10 could not be written: No space left on device"),
    "memory of a GPU": Case("GPU memory", ["--micro_batch"], "failed: CUDA out of memory. Tried to allocate 2.00 GiB"),
    "node, by sacct": Case("node failed", ["Node failure on n2", "sinfo -R"], log=NODE, sacct=account("NODE_FAIL", code="0:0")),
    "node, by scontrol": Case(
        "node failed", ["rank 3 on host n2 is gone"], f"failed: {GONE}", LOST, scontrol=show_job("NODE_FAIL", "NodeDown")
    ),
    "node, by the log": Case("node failed", ["Node failure on n2"], log=NODE),
    "limit, by sacct": Case(
        "time limit",
        ["time limit: before it could save", "time 3 min 05 s of 1 h 00 min", "--signal_delay_s"],
        log=LIMIT,
        sacct=account("TIMEOUT", code="0:0"),
    ),
    "limit, by the log": Case("time limit", ["time limit: and saved"], SAVED, LIMIT),
    "cancelled, by sacct": Case(
        "cancelled",
        ["cancelled: by root (uid 0), and saved", "143, stopped by a signal to end", "step 100; 20 steps are repeated"],
        SAVED,
        CANCEL,
        account("CANCELLED by 0", code="143:0"),
    ),
    "cancelled, by scontrol": Case(
        "cancelled", ["by whom is only in Slurm's accounts"], log=CANCEL, scontrol=show_job("CANCELLED", code="0:15")
    ),
    "cancelled after a failure": Case(
        "NaN",
        ["first: rank 2\n", "after it: ranks 0-1, 3 ended"],
        "failed: the loss is nan at step 7 on rank 2; x",
        CANCEL,
        account("CANCELLED by 0"),
    ),
    "preempted": Case("preempted", ["to make room for another job: and saved"], SAVED, PREEMPT, account("PREEMPTED", code="0:0")),
    "not requeued": Case(
        "to be continued",
        ["max_requeues is 20", "--nodes=2 --tasks_per_node=2"],
        "stopped by a signal to requeue, saved",
        ENOUGH,
        scontrol=show_job("FAILED", "NonZeroExitCode", "85:0"),
    ),
    "a rank zero that is gone": Case(
        "rank gone",
        ["first: rank 0 on host n1\n", "after it: ranks 1-3", "137, ended by signal 9 (SIGKILL)"],
        log=FIRST_GONE,
        scontrol=show_job("FAILED", code="137:0"),
    ),
    "limit, by which all died": Case(
        "time limit",
        ["time limit: before it could save"],
        log=LIMIT + "srun: error: n1: task 0: Killed\nsrun: error: n2: task 3: Killed\n",
        sacct=account("TIMEOUT", code="0:0"),
        first="",
    ),
    "memory, by which all died": Case(
        "memory",
        ["srun: error: n2: task 3: Out Of Memory"],
        log=BEGUN + "srun: error: n1: task 0: Killed\nsrun: error: n2: task 3: Out Of Memory\n",
        sacct=account("OUT_OF_MEMORY", USED),
        first="rank 3 on host n2",
    ),
    "node, by which all died": Case(
        "node failed",
        ["Node failure on n2"],
        log=NODE + "srun: error: n1: task 0: Killed\n",
        sacct=account("NODE_FAIL", code="0:0"),
        first="host n2",
    ),
    "deadline": Case("deadline", ["its deadline: before it could save", "--deadline"], sacct=account("DEADLINE", code="0:0"), first=""),
    "killed by nobody knows whom, with the others": Case(
        "killed",
        ["rank zero recorded no end: it was killed, perhaps only after another rank"],
        log=BEGUN + "srun: Job step aborted: Waiting up to 32 s\nsrun: error: n1: task 1: Killed\n",
        first="",
    ),
    "a crash": Case("killed", ["first: rank 2 on host n1\n", "Segmentation fault (core dumped)"], log=CRASH),
    "killed on another host": Case("killed", ["its host was n1: only the kernel's log there can tell", "on n1: dmesg"], log=None),
}


@pytest.mark.parametrize("name", CASES)
def test_an_end_that_slurm_knows_is_explained(slurm, tmp_path, name):
    case = CASES[name]
    status = 85 if case.why and "requeue" in case.why else 143 if case.why == SAVED else 1
    host, kills = case.kills
    folder = make_run(tmp_path / "runs/x", case.why, status, case.log, host=host, **({"memory_kills": kills} if kills else {}))
    slurm(sacct=case.sacct, scontrol=case.scontrol)
    answer, text = tell(folder)
    assert answer.end == case.kind, text
    assert not [words for words in case.words if words not in text], text
    assert case.first in (None, answer.first), text
    assert tell("12")[0].end == case.kind  # the same by the number of the job
    assert AGAIN in text or case.kind == "NaN"


NEVER = {
    "held": (None, show_job("PENDING", "JobHeldUser", nodes="(null)"), "waiting", "scontrol release 12"),
    "never fits": (None, show_job("PENDING", "PartitionTimeLimit", nodes="(null)"), "waiting", "longer than its partition allows"),
    "waits": (None, show_job("PENDING", "Resources", nodes="(null)"), "waiting", "it waits for nodes"),
    "held by Slurm": (None, show_job("PENDING", "JobHoldMaxRequeue", nodes="(null)"), "waiting", "scontrol release 12"),
    "held after a bad start": (
        None,
        show_job("PENDING", "launch_failed_requeued_held", nodes="(null)"),
        "waiting",
        "scontrol release 12",
    ),
    "held by the site": (None, show_job("PENDING", "JobHeldAdmin", nodes="(null)"), "waiting", "only they can release it"),
    "never may": (None, show_job("PENDING", "DependencyNeverSatisfied", nodes="(null)"), "waiting", "scancel 12"),
    "a state of its own": (None, show_job("SPECIAL_EXIT", "None", nodes="(null)"), "waiting", "scontrol release 12"),
    "held by its state": (None, show_job("REQUEUE_HOLD", "None", nodes="(null)"), "waiting", "scontrol release 12"),
    "held without its reservation": (
        None,
        show_job("RESV_DEL_HOLD", "ReservationDeleted", nodes="(null)"),
        "waiting",
        "scontrol release 12",
    ),
    "suspended": (None, show_job("SUSPENDED", "None"), "waiting", "scontrol resume 12"),
    "cancelled before": (account("CANCELLED by 0", code="0:0", start="Unknown", nodes="None assigned"), None, "cancelled", "before"),
    "a mistake": (account("FAILED", code="2:0"), None, "mistake", "batch_size is 3, less than the 4 processes"),
    "no python": (account("FAILED", code="127:0"), None, "not started", "python: command not found"),
}


@pytest.mark.parametrize("where", ["a folder", "Slurm alone"])
@pytest.mark.parametrize("name", NEVER)
def test_a_job_that_never_trained_is_explained(slurm, tmp_path, name, where):
    sacct, scontrol, kind, words = NEVER[name]
    log = tmp_path / "runs/x/slurm/12.log" if where == "a folder" else tmp_path / "12.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    text = {"a mistake": "[rank 0] error: batch_size is 3, less than the 4 processes\n", "no python": "x: python: command not found\n"}.get(
        name
    )
    if text:
        log.write_text(text)
    state, reason = (scontrol or "JobState=x Reason=y").partition("JobState=")[2].split()[:2]
    queue = f"12|12|{state}|{reason.removeprefix('Reason=')}||0|\n" if scontrol else ""
    if where == "a folder":
        note = {"time": "2026-11-26T07:43:10+00:00", "folder": mark_folder(tmp_path / "runs/x"), "job": "12", "log": str(log)}
        note["request"] = REQUEST
        (tmp_path / "runs/x/slurm/job.json").write_text(json.dumps(note))
    slurm(sacct=sacct, scontrol=(scontrol or show_job("FAILED", code="1:0")).replace("/nowhere/12.log", str(log)), squeue=queue)
    for what in ["12", "runs/x"] if where == "a folder" else ["12"]:
        answer, text = tell(what)
        assert answer.end == kind, text
        assert words in text, text


def test_a_job_of_another_cluster_with_the_same_number_is_not_believed(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x", "failed: the loss is nan at step 7 on rank 2; x")
    for state in ("OUT_OF_MEMORY", "NODE_FAIL", "RUNNING", "CANCELLED"):
        slurm(sacct=None, scontrol=show_job(state, log="/somebody/else/12.log"))
        answer, text = tell(folder)
        assert answer.end == "NaN", text
        assert "OUT_OF_MEMORY" not in text
    slurm(sacct=None, scontrol=show_job("OUT_OF_MEMORY"))
    assert tell(folder)[0].end == "memory"


def test_a_worker_that_died_is_not_said_to_have_run_out_of_memory(slurm, tmp_path):
    slurm()
    why = "failed: worker 1 of rank 0 died: DataLoader worker (pid 7) exited unexpectedly; out of memory?"
    answer, text = tell(make_run(tmp_path / "runs/x", why))
    assert answer.end == "no samples", text
    answer, text = tell(make_run(tmp_path / "runs/y", why, memory_kills=2))
    assert answer.end == "no samples", text
    assert "the kernel of n1 killed 2 processes for memory while this start ran: perhaps a worker" in answer.notes


@pytest.mark.parametrize(
    ("state", "reason", "kind"), [("RUNNING", "None", "running"), ("PENDING", "BeginTime", "waiting"), ("SUSPENDED", "None", "waiting")]
)
def test_somebody_elses_job_that_the_controller_knows_to_live_is_not_said_to_have_ended(slurm, tmp_path, state, reason, kind):
    folder = make_run(tmp_path / "runs/x", "stopped by a signal to requeue, saved" if kind == "waiting" else None, 85)
    slurm(sacct=None, scontrol=show_job(state, reason))  # the queue shows this user's jobs alone
    answer, text = tell(folder)
    assert answer.end == kind, text
    assert "launch.submit" not in text


def test_an_account_says_that_a_job_runs_and_is_believed_where_the_controller_is_silent(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x")
    slurm(sacct=account("RUNNING", code="0:0"), scontrol=None)
    assert tell(folder)[0].end == "killed"  # the controller has forgotten it, and the account was never told
    slurm(sacct=account("RUNNING", code="0:0"), scontrol=None, squeue=None)
    assert tell(folder)[0].end == "running"


def test_an_end_is_explained_while_slurm_still_clears_up(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x", f"failed: {GONE}", log=LOST)
    slurm(sacct=None, scontrol=show_job("COMPLETING", code="1:0"), squeue="12|12|COMPLETING|None|n1|0|\n")
    answer, text = tell(folder)
    assert (answer.end, answer.first) == ("rank gone", "rank 3 on host n2"), text


def test_the_memory_to_ask_for_is_that_of_a_node_whatever_the_account_counts(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x", log=OOM)
    sacct = account("OUT_OF_MEMORY", ("OUT_OF_MEMORY", "0:125", "4100000K"), code="0:125", memory="8G")
    slurm(sacct=sacct, scontrol=show_job("OUT_OF_MEMORY", code="0:125"))
    answer, text = tell(folder)
    assert "asked for 4.0 GB a node" in text, text
    assert "--memory_gb 6," in text
    slurm(sacct=sacct, scontrol=None)
    answer, text = tell(folder)
    assert "asked for 8.0 GB in all" in text, text
    assert "--memory_gb" not in text.replace(AGAIN, "")
    assert (answer.end, answer.status, answer.first) == ("memory", None, "rank 3 on host n2"), text
    assert "253" not in text
    (folder / "slurm/12.log").write_text(BEGUN)  # as of a job that was ended as a whole
    assert tell(folder)[0].first == ""


def test_a_start_counts_as_its_jobs_where_the_clock_of_the_other_host_is_ahead(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x", f"failed: {GONE}", log=LOST)
    note = json.loads((folder / "slurm/job.json").read_text())
    (folder / "slurm/job.json").write_text(json.dumps(note | {"time": "2026-11-26T07:45:00+00:00"}))
    slurm(sacct=None, scontrol=None)
    assert read_state(folder, []).why == "rank 3 gone"
    assert tell(folder)[0].ended == "2026-11-26T07:46:20+00:00"


def test_a_job_leads_to_its_run_by_its_log_or_its_command(slurm, tmp_path):
    folder = make_run(tmp_path / "w/a b", f"failed: {GONE}", noted=False)
    log = tmp_path / "w/mnist-dist-12.out"
    log.write_text(BEGUN.replace("runs/x", "a b"))
    slurm(scontrol=show_job("FAILED", code="1:0", log=log).replace("WorkDir=/w", f"WorkDir={tmp_path}/w"))
    assert tell("12")[0].run == str(folder)
    slurm(sacct=account("FAILED", work_dir=f"{tmp_path}/w"), scontrol=None)
    assert tell("12")[0].run == str(folder)
    log.unlink()
    (tmp_path / "w/a b").rename(tmp_path / "w/c")
    slurm(
        scontrol=show_job("FAILED", code="1:0", more="--config smoke --run_dir c").replace("WorkDir=/w", f"WorkDir={tmp_path}/w"),
        sacct=None,
    )
    assert tell("12")[0].run == str(tmp_path / "w/c")


def test_a_later_job_of_a_chain_leads_to_its_run_and_its_log(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x", f"failed: {GONE}")
    note = json.loads((folder / "slurm/job.json").read_text())
    (folder / "slurm/job.json").write_text(json.dumps(note | {"chain": "12:13", "log": str(folder / "slurm/12.log")}))
    (folder / "slurm/13.log").write_text(BEGUN)
    slurm(sacct=None, scontrol=None)
    answer, _ = tell("13")
    assert (answer.run, answer.log) == ("runs/x", str(folder / "slurm/13.log"))
    assert find_noted_log({"job": "12", "log": "/"}, "12") == "/"
    assert find_noted_log({"job": "12", "chain": "12:13", "log": "/"}, "14") == find_noted_log({"log": "/"}, "") == ""


def test_a_job_of_a_chain_that_has_ended_is_explained_while_the_next_runs(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x", f"failed: {GONE}")
    note = json.loads((folder / "slurm/job.json").read_text())
    (folder / "slurm/job.json").write_text(json.dumps(note | {"chain": "12:13", "log": str(folder / "slurm/12.log")}))
    (folder / "slurm/12.log").write_text(BEGUN)
    slurm(sacct=account("FAILED"), scontrol=None, squeue="12|12|FAILED|None||0|\n13|13|RUNNING|None|n1|0|\n")
    answer, text = tell("12")
    assert answer.end == "rank gone", text
    assert tell(folder)[0].end in ("running", "silent")


def test_what_a_run_that_goes_on_cannot_write_is_told(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x", None)
    warning = "a checkpoint could not be written, training goes on without it: No space left on device (step {})"
    (folder / "slurm/12.log").write_text(BEGUN + "".join(f"[rank 0] {warning.format(step)}\n" for step in (100, 200)))
    slurm(sacct=account("RUNNING"), scontrol=None, squeue="12|12|RUNNING|None|n1|0|\n")
    answer, text = tell(folder)
    assert answer.end in ("running", "silent"), text
    assert f"its log says: [rank 0] {warning.format(200)}" in text


def test_a_chain_is_explained_by_the_job_that_did_something(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x", "failed: the loss is nan at step 7")
    note = json.loads((folder / "slurm/job.json").read_text())
    (folder / "slurm/job.json").write_text(json.dumps(note | {"chain": "12:13:14"}))
    (folder / "slurm/12.log").write_text(BEGUN)
    for job in ("13", "14"):
        (folder / f"slurm/{job}.log").write_text(f"{folder} has failed for good in job 12\n")
    queue = "".join(f"{job}|{job}|{state}|None||0|\n" for job, state in (("12", "FAILED"), ("13", "COMPLETED"), ("14", "COMPLETED")))
    slurm(sacct=None, scontrol=None, squeue=queue)
    answer, text = tell(folder)
    assert (answer.job, answer.end) == ("12", "NaN"), text
    # A later job went on and was killed: its log counts, not that of the first, which Slurm has forgotten.
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps(START | {"time": "2026-11-26T09:00:00+00:00", "job": "13", "step": 100}) + "\n")
    (folder / "slurm/12.log").write_text(NODE)
    (folder / "slurm/13.log").write_text(BEGUN)
    slurm(sacct=None, scontrol=None)
    answer, text = tell(folder)
    assert (answer.job, answer.end) == ("13", "killed"), text
    assert f"{AGAIN} --chain=3 " in text


def test_the_number_of_an_array_tells_of_each_of_its_runs(slurm, tmp_path, capsys):
    for index, why in enumerate(("failed: the loss is nan at step 7", "stopped by SIGTERM, saved", f"failed: {GONE}")):
        folder = make_run(tmp_path / f"runs/sweep/{index}", why)
        note = json.loads((folder / "slurm/job.json").read_text())
        (folder / "slurm/job.json").write_text(json.dumps(note | {"job": f"12_{index}" if index < 2 else "120_0"}))
    slurm(sacct=None, scontrol=None)
    answers = explain.explain("12")
    assert [(answer.run, answer.job, answer.end) for answer in answers] == [
        ("runs/sweep/0", "12_0", "NaN"),
        ("runs/sweep/1", "12_1", "stopped"),
    ]
    assert explain.main(["12"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "runs/sweep/0: the numbers of the training are not finite: the loss is nan at step 7",
        "runs/sweep/1: told to end, and saved",
        "job 12 has 2 runs; give one of them, or its own job, for more",
    ]
    assert explain.main(["12", "--json"]) == 0
    assert [answer["job"] for answer in json.loads(capsys.readouterr().out)] == ["12_0", "12_1"]
    assert [(answer.run, answer.job) for answer in explain.explain("12_1")] == [("runs/sweep/1", "12_1")]


def test_a_job_that_left_no_log_is_not_to_be_looked_up_there(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x")
    (folder / "starts.jsonl").unlink()
    slurm(sacct=None, scontrol=None)
    answer, text = tell(folder)
    assert answer.end == "not started"
    assert "note: it left no log: it was cancelled while it waited" in text
    assert [line for line in text.splitlines() if line.startswith("  now:")] == [f"  now: {answer.now[0]}"]
    assert answer.now[0].startswith("python -m launch.submit ")


def test_what_was_stopped_before_it_began_has_nothing_to_correct(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x", log=BEGUN + "stopped by a signal before the training began\n")
    (folder / "starts.jsonl").unlink()
    slurm(sacct=None, scontrol=None)
    answer, text = tell(folder)
    assert answer.end == "not started", text
    assert "correct" not in text
    assert answer.now[0].startswith("python -m launch.submit ")


def test_the_labels_of_srun_hide_no_message(slurm, tmp_path):
    log = "".join(f" {rank}: {line}\n" for rank, line in enumerate(f"[rank {rank}] error: {GONE}" for rank in range(4)))
    slurm(sacct=None, scontrol=FAILED)
    answer, text = tell(make_run(tmp_path / "runs/x", log=BEGUN + log))
    assert (answer.end, answer.first) == ("rank gone", "rank 3 on host n2"), text


def test_the_request_of_somebody_elses_job_is_not_proposed(slurm, tmp_path, monkeypatch):
    folder = make_run(tmp_path / "runs/x", f"failed: {GONE}")
    slurm(sacct=None, scontrol=None)
    assert AGAIN in tell(folder)[1]
    monkeypatch.setattr(os, "getuid", lambda: 12_345)
    assert "then: the same command as before " in tell(folder)[1]
    monkeypatch.undo()
    for odd in ({"srun": "--export=x"}, {"no_option": 1}, [], {"nodes": "many"}):
        note = json.loads((folder / "slurm/job.json").read_text()) | {"request": odd}
        (folder / "slurm/job.json").write_text(json.dumps(note))
        assert "then: the same command as before " in tell(folder)[1]


def test_a_run_cancelled_while_it_waited_to_be_started_again_is_cancelled(slurm, tmp_path):
    why = "stopped by the signal to save and be requeued, saved"
    for lines in (["launch: requeued", REQUEUE_LINE], [REQUEUE_LINE, "launch: requeued"]):
        path = tmp_path / f"runs/{lines[0][:6]}"
        folder = make_run(path, why, 85, BEGUN + "\n".join(lines) + "\n")
        slurm(sacct=account("CANCELLED by 0", code="0:0"), scontrol=None)
        answer, text = tell(folder)
        assert answer.end == "cancelled", text
        assert "and saved" in text


REQUEUE_LINE = "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-26T07:46:20 DUE TO JOB REQUEUE ***"


def test_an_earlier_start_is_explained_by_its_job(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x", f"failed: {GONE}")
    later = START | {"time": "2026-11-26T09:00:00+00:00", "job": "15", "step": 100}
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    slurm(sacct=None, scontrol=None)
    assert tell(folder)[0].end == "killed"
    answer, text = tell("12")
    assert answer.end == "rank gone"
    assert "the run went on after this start, number 1 of 2" in text


def test_a_copy_and_damage_are_named(slurm, tmp_path):
    slurm(sacct=None, scontrol=None)
    folder = make_run(tmp_path / "runs/x", f"failed: {GONE}")
    shutil.copytree(folder, tmp_path / "copy")
    answer, text = tell(tmp_path / "copy")
    assert f"  note: this folder is a copy of {folder}: the job and the process in its notes are that one's" in text
    assert (answer.end, answer.job) == ("rank gone", "12")
    assert "the same command as before" in text
    (folder / "starts.jsonl").write_text("[]\n")
    assert "damaged: " in tell(folder)[1]
    lost = make_run(tmp_path / "runs/lost", "finished", 0)
    assert "   (makes result.json again from step 100)" in tell(lost)[1]
    shutil.rmtree(lost / "checkpoints")
    assert "restore result.json and the checkpoints, or use another run_dir" in tell(lost)[1]
    (folder / "result.json").write_text("{")
    answer, text = tell(folder)
    assert answer.end == "damaged"
    assert "result.json is damaged" in text
    assert "restore or remove the file that is named" in text


def test_whatever_lies_in_a_folder_is_no_harm(slurm, tmp_path, capsys):
    slurm(sacct="\x1f" * 100 + "\n" + "12\x1f" * 11 + "\n", scontrol="JobState= \n" * 3)
    nasty = "failed: \x1b[2J\n  now: rm -rf ~\n" + "rank 1 " * 5000 + "ranks 0-999999999 on host x is gone"
    folder = make_run(
        tmp_path / "runs/x", nasty, log=BEGUN + "\x1b[2J" + "rank " * 500_000 + "\n" + "srun: error: n1: tasks 0-9: Killed\n" * 9
    )
    for _ in range(2):
        begun = time.process_time()
        assert explain.main([str(folder)]) == 0
        assert time.process_time() - begun < 3
        text = capsys.readouterr().out
        assert "\x1b" not in text
        assert "\n  now: rm" not in text
        (folder / "ends.jsonl").unlink()
        (folder / "slurm/12.log").unlink()
        os.mkfifo(folder / "slurm/12.log")
        os.mkfifo(folder / "ends.jsonl")
    for name in ("config.yaml", "starts.jsonl", "metrics.jsonl", "lock", "slurm/job.json", "slurm/end.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(b"\xff{[" * 1000 + b"\n")
        assert explain.main([str(folder), "--json"]) == 0, name
        json.loads(capsys.readouterr().out)


def test_the_number_of_a_job_in_a_note_is_no_command(slurm, tmp_path):
    slurm(sacct=None, scontrol=None)
    folder = make_run(tmp_path / "runs/x", f"failed: {GONE}")
    note = json.loads((folder / "slurm/job.json").read_text())
    (folder / "slurm/job.json").write_text(json.dumps(note | {"job": "12; touch $(id)"}))
    answer, text = tell(folder)
    assert answer.job == ""
    assert "touch" not in text


@pytest.mark.parametrize("where", ["a folder", "Slurm alone"])
def test_a_job_that_another_cluster_of_the_federation_took_is_not_said_to_have_ended(slurm, tmp_path, where):
    if where == "a folder":
        make_run(tmp_path / "runs/x", None)
    slurm(sacct=None, scontrol=show_job("REVOKED", nodes="(null)"), squeue="12|12|REVOKED|None||0|\n")
    answer, text = tell("12")
    assert answer.end == "waiting"
    assert "its job waits: gone to another cluster of the federation, squeue --federation shows it\n" in text


def test_a_run_that_is_silent_is_not_called_healthy(slurm, tmp_path, monkeypatch):
    slurm(sacct=None, scontrol=None)
    folder = make_run(tmp_path / "runs/x")
    state = dataclasses.replace(evidence.read_state(folder, []), is_active=True, silent_s=300.0)
    monkeypatch.setattr(evidence, "read_state", lambda *_: state)
    answer, text = tell(folder)
    assert answer.end == "silent"
    assert "still running, but it has added no row for long: step 120 of 600, newest row (step 120) 0 s ago" in text
    assert "python -m launch.jobs cancel" in text
    assert f"\n  then: {AGAIN}" in text


def test_each_thing_to_do_is_told_once(slurm, tmp_path):
    folder = make_run(tmp_path / "runs/x")
    slurm(sacct=None, scontrol=show_job("PENDING", "BadConstraints", nodes="(null)"), squeue="12|12|PENDING|BadConstraints||0|\n")
    assert f"\n  then: ask for what the cluster has: {AGAIN}" in tell(folder)[1]
    shutil.rmtree(folder)
    assert tell("12")[1].endswith("\n  then: ask for what the cluster has")


def test_the_users_mistakes_end_with_two(slurm, tmp_path, capsys):
    def refuse(*words):
        assert explain.main([*map(str, words)]) == 2
        return capsys.readouterr().err

    slurm(sacct="", scontrol="")
    assert "no run in runs is of job 12, and Slurm does not know it (any more); give the run folder" in refuse("12")
    assert "nowhere is neither a folder nor the number of a job" in refuse("nowhere")
    assert "12;id is neither" in refuse("12;id")
    (tmp_path / "empty").mkdir()
    assert "empty is no run folder" in refuse("empty")
    assert "RUN|JOB" in refuse()
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho 'Unable to contact slurm controller (connect failure)' >&2\nexit 1\n")
    assert "of job 12, and scontrol failed with 1: Unable to contact slurm controller (connect failure); give" in refuse("12")
    for words in ("slurm_load_jobs error: Invalid job id specified", "Job 12 not found"):
        (tmp_path / "bin/scontrol").write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")
        assert "Slurm does not know it (any more)" in refuse("12")
    slurm(sinfo=None, sbatch=None, sacct=None, scontrol=None, squeue=None)
    assert "there is no Slurm here" in refuse("12")


def test_an_array_without_run_folders_is_told_task_by_task(slurm, tmp_path, capsys):
    lines = [("14", "1", "COMPLETED", "0:0"), ("15", "2-3", "PENDING", "0:0"), ("12", "0", "FAILED", "1:0")]
    shown = "".join(
        show_job(state, code=code).replace("JobId=12", f"JobId={job} ArrayJobId=12 ArrayTaskId={task}") for job, task, state, code in lines
    )
    slurm(sacct=None, scontrol=shown)
    assert explain.main(["12"]) == 0
    assert [line.partition(":")[0:3:2] for line in capsys.readouterr().out.splitlines()[:3]] == [
        ("job 12_1", " finished"),
        ("job 12_2-3", " its job waits: pending, see man squeue"),
        ("job 12_0", " it ended before the training began"),
    ]
    slurm(sacct=None, scontrol=shown.replace("Array", "Het").replace("HetTaskId", "HetJobOffset"))
    assert explain.main(["12"]) == 0
    assert "\njob 12+0: it ended" in capsys.readouterr().out


def test_a_job_that_completed_is_not_said_to_have_failed_for_a_line_in_its_log(slurm, tmp_path):
    log = tmp_path / "12.log"
    log.write_text(BEGUN + "[rank 0] error: upload failed: No space left on device, retrying\n")
    slurm(sacct=None, scontrol=show_job("COMPLETED", log=log))
    answer, text = tell("12")
    assert (answer.end, answer.first, answer.now) == ("finished", "", []), text


@pytest.mark.parametrize(
    ("reason", "words", "waits"),
    [
        ("QOSMaxWallDurationPerJobLimit", "more than its user, account or quality of service allows a job, so it never starts", False),
        ("AssocMaxCpuPerJobLimit", "allows a job, so it never starts", False),
        ("QOSMaxGRESPerNode", "allows a job, so it never starts", False),
        ("QOSMinGRES", "it asks for less than its quality of service demands, so it never starts", False),
        ("QOSNotAllowed", "it may not use its account or quality of service, so it never starts", False),
        ("AccountNotAllowed", "may not use its account", False),
        ("InvalidAccount", "may not use its account", False),
        ("InvalidQOS", "may not use its account", False),
        ("QOSMaxJobsPerUserLimit", "a limit of its user, account or quality of service is reached", True),
        ("MaxCpuPerAccount", "is reached", True),
        ("QOSMaxNodePerUserLimit", "is reached", True),
        ("AssocGrpCpuLimit", "is reached", True),
    ],
)
def test_a_job_that_waits_for_ever_is_told_from_one_that_waits_for_others(slurm, tmp_path, reason, words, waits):
    slurm(sacct=None, scontrol=show_job("PENDING", reason, nodes="(null)"))
    answer, text = tell("12")
    assert words in text
    assert answer.now[0].startswith("wait; squeue --start" if waits else "scancel 12")


def test_a_reason_that_names_nodes_is_understood_whatever_they_are_called(slurm, tmp_path):
    slurm(sacct=None, scontrol=show_job("PENDING", "ReqNodeNotAvail, UnavailableNodes:threshold[1-2]", nodes="(null)"))
    _, text = tell("12")
    assert "nodes that it needs are down or reserved" in text
    assert "squeue --start" in text


def test_a_log_of_any_kind_is_read_in_little_time():
    for text in ("x\n" * 2_000_000, ("[rank 0] error: " + "checkpoint " * 200 + "\n") * 2000):
        began = time.process_time()
        log = read_log(text)
        assert [find_kind(message) for _, message in log.errors] == [""] * len(log.errors)
        assert time.process_time() - began < 3
    assert find_kind("error: no checkpoint of the checkpoints in x is valid") == "checkpoint"


def test_a_command_that_is_advised_takes_a_folder_whatever_it_is_called(slurm, tmp_path):
    slurm(sacct=None, scontrol=None)
    make_run(Path("-x"), SAVED, 143, noted=False)
    _, text = tell("./-x")
    assert "--config ./-x/config.yaml --run_dir ./-x " in text or "the same" in text, text
    assert " -x/" not in text.replace("./-x", "")


def test_json_has_what_the_lines_have(slurm, tmp_path, capsys):
    slurm(sacct=account("OUT_OF_MEMORY", ("OUT_OF_MEMORY", "0:125", "4193000K")), scontrol=None)
    make_run(tmp_path / "runs/x", f"failed: {GONE}", log=LOST)
    assert explain.main(["12", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["end"], answer["first"], answer["status"], answer["saved_step"]) == ("memory", "rank 3 on host n2", 1, 100)
    assert answer["last_lines"] == ["srun: error: n2: task 3: Killed"]
    assert answer["account"]["memory_mb"] == pytest.approx(4094.7, abs=0.1)
    assert answer["now"]


def test_statuses_and_ranks_in_words():
    assert describe_status(137) == "ended by signal 9 (SIGKILL)"
    assert describe_status(64).startswith("not a status of this program")
    assert (
        find_first("failed: ranks 1, 3 on host a, rank 4 on host b are gone and left no reason") == "ranks 1, 3 on host a, rank 4 on host b"
    )
    assert shorten("failed: ranks 1, 3 on host a are gone and left no reason", 1) == "rank 1 gone"
    assert shorten(SAVED, 143) == ""
    assert explain._find_first("", [("0", "batch_size is 3"), ("1", "batch_size is 3")]) == ""
    assert explain._find_first("", [("1", "batch_size is 3")]) == "rank 1"
    log = read_log("launch: x\n[rank 0] error: old\nlaunch: requeued\n[rank 1] error: new\n")
    assert log.errors == [("1", "new")]


# The same on the development cluster, whose accounts are those of scontrol.

SLOW = "--dataset synthetic --steps 100000 --batch_size 8 --threads 1 --optimizer sgd --test_size 200 --report false --wandb disabled"
SLOW += f" --log_every 1 --checkpoint_every 10 --task {SLOW_TASK}"


def ask(cluster, folder, what):
    answer = launch(cluster, folder, "explain", f"{what} --json")
    assert answer.returncode == 0, answer
    return json.loads(answer.stdout)


@pytest.mark.slurm
def test_the_ends_of_real_jobs_are_explained(cluster, tmp_path):
    # A signal that does nothing, in the place of the one that would let it save before its limit.
    limited = Job(cluster, tmp_path, "--time=10 --no-requeue --signal=CONT@1", f"{SLOW} --run_dir limited", PYTHON=sys.executable)
    kept = Job(cluster, tmp_path, "--time=10 --no-requeue", f"{SLOW} --run_dir kept", PYTHON=sys.executable)
    cancelled = Submitted(cluster, tmp_path, f"--nodes 2 --time 10 {SLOW}", "cancelled")
    lost = Submitted(cluster, tmp_path, f"--nodes 2 --time 10 {SLOW}", "lost")
    for job in (cancelled, lost, kept, limited):
        job.wait_for(r"step \d+0/")
    limited.bring_limit_near()
    assert ask(cluster, tmp_path, "cancelled")["end"] == "running"
    assert ask(cluster, tmp_path, lost.id)["end"] == "running"

    node, pid = next(
        (node, int(words[0]))
        for node in ("127.0.0.2", "127.0.0.3")
        for line in lost.run("scontrol", "listpids", f"{lost.id}.0", node).stdout.splitlines()[1:]
        if (words := line.split())[-1] == "1"  # the rank
    )
    os.kill(pid, signal.SIGKILL)
    kept.run("scancel", "--signal=USR1", kept.id)
    cancelled.run("scancel", cancelled.id)
    cancelled.wait_state("CANCELLED")
    lost.wait_state("FAILED")
    for what in ("cancelled", cancelled.id):
        answer = ask(cluster, tmp_path, what)
        assert (answer["end"], answer["status"]) == ("cancelled", 143), answer
        assert answer["says"].endswith(", and saved")
        assert answer["saved_step"] == answer["step"]
    answer = ask(cluster, tmp_path, "lost")
    assert (answer["end"], answer["status"]) == ("rank gone", 1), answer
    assert answer["first"].startswith("rank 1 on host ")
    assert f"srun: error: {node}: task 1: Killed" in answer["last_lines"]
    assert answer["meaning"].endswith("137 of the job: ended by signal 9 (SIGKILL)")

    kept.wait_state("FAILED")
    answer = ask(cluster, tmp_path, kept.id)
    assert (answer["end"], answer["status"]) == ("to be continued", 85), answer
    assert "launch: could not be requeued; the same command, or the next job of its chain, resumes the run" in answer["notes"]

    downed = Job(cluster, tmp_path, "--no-requeue --nodelist=127.0.0.3", f"{SLOW} --run_dir downed", PYTHON=sys.executable)
    downed.wait_for(r"step \d+0/")
    try:
        downed.run("scontrol", "update", "NodeName=127.0.0.3", "State=DOWN", "Reason=test")
        downed.wait_state("NODE_FAIL")
    finally:
        downed.run("scontrol", "update", "NodeName=127.0.0.3", "State=RESUME")
    answer = ask(cluster, tmp_path, downed.id)
    assert answer["end"] == "node failed", answer
    assert answer["run"].endswith("downed")

    mistaken = Job(
        cluster, tmp_path, "--nodes=2 --ntasks-per-node=2", "--config smoke --batch_size 3 --run_dir mistaken", PYTHON=sys.executable
    )
    mistaken.wait_state("FAILED")
    answer = ask(cluster, tmp_path, mistaken.id)
    assert (answer["end"], answer["status"], answer["run"]) == ("mistake", 2, "")
    assert "batch_size is 3, less than the 4 processes" in answer["says"]

    held = Job(cluster, tmp_path, "--hold", "--config smoke --run_dir held")
    assert ask(cluster, tmp_path, held.id)["now"] == [f"scontrol release {held.id}"]
    held.run("scancel", held.id)
    held.wait_state("CANCELLED")
    assert ask(cluster, tmp_path, held.id)["says"] == "cancelled, before it started"

    limited.wait_state("TIMEOUT")
    for what in ("limited", limited.id):
        answer = ask(cluster, tmp_path, what)
        assert answer["run"].endswith("limited")
        assert (answer["end"], answer["status"]) == ("time limit", 143), answer
        assert answer["says"].endswith("and saved")


GROWING = """
import os
from mnist_dist.tasks.mnist import Mnist


class Growing(Mnist):
    def draw(self, seed, step, size):
        if step == 6 and os.environ["SLURM_PROCID"] == "1":
            with open(os.environ["ITS_CGROUP"] + "/cgroup.procs", "w") as file:
                file.write(str(os.getpid()))
            kept = []
            while True:
                kept.append(os.urandom(1 << 22))
        return super().draw(seed, step, size)
"""


@pytest.mark.slurm
def test_a_real_task_that_the_kernel_kills_for_its_memory_is_explained(cluster, tmp_path, its_cgroup):
    (tmp_path / "growing.py").write_text(GROWING)
    job = Submitted({**cluster, "ITS_CGROUP": its_cgroup}, tmp_path, f"--nodes 2 --time 5 {SLOW} --task growing.py", "grown")
    job.wait_state("FAILED")
    answer = ask(cluster, tmp_path, job.id)
    assert (answer["end"], answer["status"]) == ("memory", 1), answer
    assert answer["first"].startswith("rank 1 on host ")
    assert answer["last_lines"][-1].endswith(": task 1: Killed")
    assert any("for memory while this start ran" in note for note in answer["notes"])
