"""Each row of the table of signals and exits, and the failures that are no signals: real signals to real processes."""

import errno
import fcntl
import gc
import itertools
import json
import logging
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from processes import TINY, StopAt, Train, TrainTask, find_free_port, run_ranks, start_ranks
from torch.nn.parallel import DistributedDataParallel

from launch.endings import find_kind
from mnist_dist import checkpoint, distributed
from mnist_dist.config import configure, parse_command_line
from mnist_dist.console import set_up_logging
from mnist_dist.distributed import join_group
from mnist_dist.errors import RunError, UserError
from mnist_dist.preemption import Stop, StopSignals
from mnist_dist.program import run_program
from mnist_dist.record import read_ends
from mnist_dist.run_folder import Record, RunFolder
from mnist_dist.source import explaining
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.world import World

LONG = [*TINY, "--steps", "5000", "--test_size", "12"]  # of one batch, amid which no stop is heeded
CODES = {signal.SIGUSR1: 85, signal.SIGUSR2: 85, signal.SIGTERM: 143, signal.SIGHUP: 143, signal.SIGINT: 130}


def count_rows(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def saved_steps(folder):
    return [int(path.name[5:13]) for path in checkpoint.list_newest_first(folder / "checkpoints")]


ENDING = """
import os, sys
from mnist_dist.preemption import StopSignals

class Last:
    def __del__(self, kill=os.kill, process=os.getpid(), number=int(sys.argv[1])):  # while Python tears down what is left
        kill(process, number)

last = Last()
StopSignals().install()
sys.exit(85)
"""


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_python_ends_does_not_change_the_exit_status(number):
    assert subprocess.run([sys.executable, "-c", ENDING, str(int(number))]).returncode == 85


def list_signals(to):
    """Where and which; those that do as another one does are for slow tests, but for one rank alone."""
    quick = {"alone": CODES, "one": (signal.SIGTERM,)}.get(to, (signal.SIGINT, signal.SIGUSR1))
    return [pytest.param(to, number, marks=[] if number in quick else pytest.mark.slow, id=f"{to}-{number.name}") for number in CODES]


@pytest.mark.parametrize(("to", "number"), [case for to in ("alone", "one", "all") for case in list_signals(to)])
def test_a_signal_while_training_saves_and_stops_every_rank(tmp_path, to, number):
    folder = tmp_path / "run"
    ranks = start_ranks(tmp_path, Train([*LONG, "--run_dir", str(folder)]), 1 if to == "alone" else 3)
    ranks[0].wait_for(lambda: count_rows(folder) >= 2)
    for rank in ranks[-1:] if to == "one" else ranks:
        rank.kill(number)
    assert [rank.wait(60) for rank in ranks] == [CODES[number]] * len(ranks)
    [step] = saved_steps(folder)
    assert count_rows(folder) == step  # the checkpoint and the record end at the same step
    assert f"stopped by a signal after step {step} of 5000; saved {folder}" in ranks[0].text
    assert not any("Traceback" in rank.text or "error" in rank.text for rank in ranks)
    assert not (folder / "result.json").exists()


def test_of_different_signals_the_strongest_wins_on_every_rank(tmp_path):
    folder = tmp_path / "run"
    ranks = start_ranks(tmp_path, Train([*LONG, "--run_dir", str(folder)]), 2)
    ranks[0].wait_for(lambda: count_rows(folder) >= 2)
    for rank in ranks:  # both are in before the next step boundary
        rank.kill(signal.SIGSTOP)
    ranks[0].kill(signal.SIGUSR1)
    ranks[1].kill(signal.SIGTERM)
    for rank in ranks:
        rank.kill(signal.SIGCONT)
    codes = [rank.wait(60) for rank in ranks]
    assert codes in ([143, 143], [85, 85])  # 85 where one rank was a step ahead
    assert Stop.INTERRUPT > Stop.TERMINATE > Stop.REQUEUE > Stop.NONE


def fork_under_ctrl_c():
    """One Ctrl-C for this process and for one that it has just forked, as for a worker that reads its data."""
    signals = StopSignals().install()
    signals.defer(announced=True)
    worker = os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(worker, signal.SIGINT)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    return 0 if signals.received == Stop.INTERRUPT else 1


def test_a_ctrl_c_that_a_forked_process_gets_as_well_counts_once(tmp_path):
    run_ranks(tmp_path, fork_under_ctrl_c)


def test_a_second_ctrl_c_stops_at_once_even_in_a_collective(tmp_path):
    folder = tmp_path / "run"
    ranks = start_ranks(tmp_path, Train([*LONG, "--run_dir", str(folder)]), 2)
    ranks[0].wait_for(lambda: count_rows(folder) >= 2)
    ranks[1].kill(signal.SIGSTOP)  # rank zero now waits for it inside a collective
    time.sleep(0.3)
    ranks[0].kill(signal.SIGINT)
    ranks[0].wait_for(lambda: "Ctrl-C again stops at once" in ranks[0].text)
    time.sleep(0.1)
    ranks[0].kill(signal.SIGINT)
    assert ranks[0].wait(60) == 130  # the collective would wait for minutes
    ranks[1].kill(signal.SIGKILL)
    ranks[1].wait()


@pytest.mark.parametrize(("place", "number"), list_signals("amid the imports"))
def test_a_signal_during_start_up_ends_the_process_with_its_code_and_leaves_nothing(tmp_path, place, number):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "mnist_dist.train", *LONG, "--run_dir", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(1)  # it imports torch now, for seconds
    started, used = os.times().children_user, psutil.Process(process.pid).cpu_times().user
    process.send_signal(number)
    assert process.wait(60) == CODES[number]
    assert os.times().children_user - started - used < 0.5  # of its own time: a busy machine makes the wall clock's longer
    assert process.stderr.read() == "stopped by a signal before the training began\n"
    assert not folder.exists()


@dataclass(frozen=True)
class Dawdle(TrainTask):
    """A rank that sleeps in one of the places where a signal may reach it."""

    where: str
    marker: str

    def sleep(self, where):
        if where == self.where:
            with open(self.marker, "w"):
                pass
            time.sleep(1)

    def make_task(self):
        rank = self

        class Slow(Mnist):
            def load(self):
                rank.sleep("set-up")
                return super().load()

            def tally(self, model, batch):
                rank.sleep("evaluation")
                return super().tally(model, batch)

        return Slow

    def __call__(self):
        from mnist_dist import checkpoint, run_folder

        write, folder = checkpoint.write_atomically, run_folder.RunFolder
        finish, publish = folder.finish, folder.publish
        checkpoint.write_atomically = lambda *given: self.sleep("saving") or write(*given)
        folder.finish = lambda *given: self.sleep("finish") or finish(*given)
        folder.publish = lambda *given: self.sleep("publish") or publish(*given)
        return super().__call__()


@pytest.mark.parametrize("where", ["set-up", "evaluation", "saving"])
def test_a_signal_at_another_time_waits_for_the_step_boundary(tmp_path, where):
    folder, marker = tmp_path / "run", tmp_path / "marker"
    arguments = [*LONG, "--run_dir", str(folder), "--checkpoint_every", "3"]
    ranks = start_ranks(tmp_path, Dawdle(arguments, where, str(marker)), 2)
    ranks[0].wait_for(marker.exists)
    time.sleep(0.2)
    ranks[1].kill(signal.SIGUSR1)
    assert [rank.wait(60) for rank in ranks] == [85, 85]
    assert count_rows(folder) == saved_steps(folder)[0]


@dataclass(frozen=True)
class EvaluateSlowly(TrainTask):
    """A rank whose evaluations take seconds: it notes each batch, and sleeps."""

    marker: str
    pause_s: float

    def make_task(self):
        marker, pause_s = self.marker, self.pause_s

        class Slow(Mnist):
            def tally(self, model, batch):
                if len(batch[1]) <= 3:  # not the one that is looked at before the training
                    with open(marker, "a") as notes:
                        notes.write("a batch\n")
                    time.sleep(pause_s)
                return super().tally(model, batch)

        return Slow


@pytest.mark.parametrize(
    ("world", "more"), [(1, []), (3, []), pytest.param(2, ["--shards", "3"], marks=pytest.mark.slow)], ids=["alone", "DDP", "shards"]
)
def test_a_signal_in_an_evaluation_waits_for_no_more_than_a_batch(tmp_path, world, more):
    folder, marker = tmp_path / "run", tmp_path / "marker"
    # 28 samples on three ranks: one of them has a batch more than the others.
    arguments = [*TINY, "--test_size", "28", "--micro_batch", "3", "--run_dir", str(folder), *more]
    ranks = start_ranks(tmp_path, EvaluateSlowly(arguments, str(marker), 1), world)
    ranks[0].wait_for(marker.exists)
    ranks[-1].kill(signal.SIGTERM)
    assert [rank.wait(60) for rank in ranks] == [143] * world
    assert "stopped by a signal after step 5 of 10, amid an evaluation" in ranks[0].text
    assert len(marker.read_text().splitlines()) <= 3 * world  # of ten or more
    assert (saved_steps(folder), count_rows(folder)) == ([5], 4)
    run_ranks(tmp_path, EvaluateSlowly(arguments, str(marker), 0), world)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, 11)]
    assert [row["step"] for row in rows if "test/accuracy" in row] == [5, 10]


def test_a_signal_after_the_last_step_does_not_keep_the_run_from_finishing(tmp_path):
    folder, marker = tmp_path / "run", tmp_path / "marker"
    ranks = start_ranks(tmp_path, Dawdle([*TINY, "--run_dir", str(folder)], "finish", str(marker)), 2)
    ranks[0].wait_for(marker.exists)
    for rank in ranks:
        rank.kill(signal.SIGTERM)
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert (folder / "result.json").exists()


def test_ctrl_c_when_the_run_is_finished_does_not_speak_of_steps(tmp_path):
    marker = tmp_path / "marker"
    [rank] = start_ranks(tmp_path, Dawdle([*TINY, "--run_dir", str(tmp_path / "run")], "publish", str(marker)))
    rank.wait_for(marker.exists)
    rank.kill(signal.SIGINT)
    assert rank.wait(60) == 0
    assert "The run is finished and saved; Ctrl-C again leaves out" in rank.text
    assert "Saving and stopping" not in rank.text


def run_in_shell(redirect, folder, *arguments):
    command = f'unset PYTHONUNBUFFERED; exec "$@" {redirect}'  # as most start it
    program = [sys.executable, "-m", "mnist_dist.train", *TINY, "--run_dir", str(folder), *arguments]
    return subprocess.Popen(["bash", "-c", command, "bash", *program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "redirect",
    ["2>/dev/full", *(pytest.param(rest, marks=pytest.mark.slow) for rest in (">&- 2>&-", "2> >(head -1 >/dev/null)", "2>&-"))],
)
def test_a_screen_that_is_gone_does_not_stop_the_training(tmp_path, redirect):
    folder = tmp_path / "run"
    assert run_in_shell(redirect, folder).wait(60) == 0
    assert (folder / "result.json").exists()


def test_an_error_that_nobody_can_read_keeps_its_exit_status(tmp_path):
    process = run_in_shell("2>/dev/full", tmp_path / "run", "--batch_size", "x")
    assert process.wait(60) == 2


def print_to_a_screen_that_is_busy_once():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.set_blocking(reading, False)
    os.dup2(writing, 2)
    os.write(2, bytes(fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ)))
    set_up_logging(0, 1)
    log = logging.getLogger("mnist_dist.test")
    log.warning("lost")
    os.read(reading, 1 << 20)
    log.warning("heard")
    assert os.read(reading, 100) == b"heard\n"


def test_a_screen_that_is_busy_once_shows_the_next_message(tmp_path):
    run_ranks(tmp_path, print_to_a_screen_that_is_busy_once)


PRINTING = """
import os, sys, time
from mnist_dist.preemption import StopSignals
signals = StopSignals().install()
signals.defer(announced=False)
for descriptor in (0, 2):
    try:
        os.write(descriptor, bytes([15]))  # the number of SIGTERM
    except OSError:
        pass
time.sleep(0.3)
sys.exit(int(signals.received))
"""


@pytest.mark.parametrize("closed", ["<&- 2>&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_what_is_printed_to_a_closed_screen_is_not_taken_for_a_signal(closed):
    assert subprocess.run(["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "-c", PRINTING]).returncode == 0


@pytest.mark.slow
def test_ctrl_c_saves_even_if_it_ended_the_reader_of_the_log_first(tmp_path):
    folder = tmp_path / "run"
    process = run_in_shell("2>&1 | cat", folder, "--steps", "5000", "--test_size", "12")
    # The shell runs a pipeline here: find the training by its lock.
    end = time.monotonic() + 60
    while count_rows(folder) < 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    training = int((folder / "lock").read_text().split()[1])
    process.stdout.close()  # the reader of the log is gone
    time.sleep(0.2)
    os.kill(training, signal.SIGINT)
    process.wait(60)
    end = time.monotonic() + 60
    while not saved_steps(folder):
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.05)
    assert count_rows(folder) == saved_steps(folder)[0]


# Failures that are not signals.


def test_rows_from_the_loop_and_syncs_from_the_writer_do_not_mix(tmp_path):
    record = Record(tmp_path / "metrics.jsonl")
    over = threading.Event()

    def sync_all_the_time():
        while not over.is_set():
            record.sync()

    syncing = threading.Thread(target=sync_all_the_time)
    syncing.start()
    for step in range(1, 2001):
        record.append({"step": step})
    over.set()
    syncing.join()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()] == list(range(1, 2001))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "allowed: 1"),
        ("ACCELERATE_MIXED_PRECISION", "1 of 2 ranks would compute in bf16"),
        ("ACCELERATE_DEBUG_MODE", " failed: UserError: Accelerate cannot start (invalid truth value 2)"),
    ],
)
def test_ranks_that_were_set_up_differently_are_refused_together(tmp_path, rank, variable, words):
    work = SetUpDifferently([*TINY, "--precision", "auto", "--run_dir", str(tmp_path / "run")], rank, variable)
    text = run_ranks(tmp_path, work, 2, expect=None)
    assert words in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class SetUpDifferently(Train):
    """Ranks of which one has a variable of its own."""

    rank: int
    variable: str

    def __call__(self):
        from mnist_dist import board, machine

        board._LEAVING_S = 0.5  # that long the others wait where they have not talked to this one yet
        machine.has_native_bfloat16 = lambda: False
        if os.environ["RANK"] == str(self.rank):
            os.environ[self.variable] = "bf16" if "PRECISION" in self.variable else "2"
        return super().__call__()


@pytest.mark.parametrize("stopped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_weights_that_are_no_numbers_are_neither_saved_nor_a_result(tmp_path, stopped):
    folder = tmp_path / "run"
    arguments = [*TINY, "--run_dir", str(folder), "--learning_rate", "100", "--schedule", "constant", "--log_every", "1000"]
    arguments += ["--evaluate_every", "1000", "--checkpoint_every", "1"]
    text = run_ranks(tmp_path, TurnNaNAtLast(arguments, stopped), 2, expect=1)
    assert "not finite" in text or "the loss is" in text
    assert "Traceback" not in text
    assert '"lasting": true' in (folder / "ends.jsonl").read_text()  # so that a chain of jobs ends here
    assert not (folder / "result.json").exists()
    for path in checkpoint.list_newest_first(folder / "checkpoints"):
        assert all(value.isfinite().all() for value in checkpoint.decode(path.read_bytes())["model"].values())


@dataclass(frozen=True)
class TurnNaNAtLast(Train):
    """Ranks whose weights turn NaN in one update: the last one, or one during which a signal comes."""

    stopped: bool

    def __call__(self):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        from mnist_dist.loop import train
        from mnist_dist.program import run_program

        updates, fault = itertools.count(1), 5 if self.stopped else 10

        def poison(optimizer, *_):
            if next(updates) == fault:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.data.fill_(float("nan"))

        register_optimizer_step_post_hook(poison)
        # A stop is agreed upon in one step and heeded after the next.
        signals = StopAt(fault - 1 if self.stopped else 99)
        return run_program(lambda: train(parse_command_line(self.arguments), signals).stop.exit_code)


@dataclass(frozen=True)
class FailAt(TrainTask):
    """A rank that fails in a way of its own at one step."""

    how: str
    rank: int

    def make_task(self):
        how, is_this_rank = self.how, os.environ["RANK"] == str(self.rank)

        class Failing(Mnist):
            def draw(self, seed, step, size):
                if step == 4 and is_this_rank:
                    if how == "raises":
                        raise ZeroDivisionError("the planted fault")
                    if how == "exits":
                        os._exit(0)
                    os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
                return super().draw(seed, step, size)

        return Failing


@dataclass(frozen=True)
class StartNoMoreThreads(TrainTask):
    """Ranks whose host starts no more threads after some steps; then one fails or is silent, all are asked to stop, or nothing happens."""

    how: str

    def make_signals(self):
        return StopAt(6) if self.how == "stop" else super().make_signals()

    def make_task(self):
        how, rank = self.how, os.environ.get("RANK")

        def refuse(_):
            raise RuntimeError("can't start new thread")

        class Starved(Mnist):
            def draw(self, seed, step, size):
                if step == 3:
                    threading.Thread.start = refuse
                if step == 4 and how == "fail" and rank == "1":
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
                if step == 4 and how == "hang" and rank == "0":
                    os.kill(os.getpid(), signal.SIGSTOP)
                return super().draw(seed, step, size)

        return Starved


@pytest.mark.parametrize(("how", "world", "status"), [("stop", 2, 85), ("fail", 2, 1), ("end", 1, 0)])
def test_a_host_that_starts_no_more_threads_changes_no_end(tmp_path, how, world, status):
    work = StartNoMoreThreads([*TINY, "--checkpoint_every", "5", "--run_dir", str(tmp_path / "run")], how)
    text = run_ranks(tmp_path, work, world, expect=status)
    assert "Traceback" not in text
    if how == "fail":
        words = "task mnist failed in draw for step 5: "
        assert f"[rank 0] error: rank 1 on host {platform.node()} failed: RunError: {words}" in text
        assert f"[rank 1] error: {words}" in text
    else:
        assert saved_steps(tmp_path / "run") == [6 if how == "stop" else 10, 5]


@pytest.mark.slow
def test_a_rank_that_starts_no_more_threads_does_not_wait_for_ever_for_a_silent_one(tmp_path):
    work = StartNoMoreThreads([*TINY, "--timeout_s", "3", "--run_dir", str(tmp_path / "run")], "hang")
    silent, other = start_ranks(tmp_path, work, 2)
    assert other.wait(60) == 1
    silent.kill(signal.SIGKILL)
    silent.wait()
    assert f"[rank 1] error: rank 0 on host {platform.node()} " in other.text
    assert "Traceback" not in other.text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "there is too little memory"),
        (RuntimeError("[enforce fail at x.cpp:1] DefaultCPUAllocator: can't allocate memory"), "there is too little memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "there is too little memory"),
        (RuntimeError("could not create a primitive"), "there is too little memory"),  # of oneDNN
        (ImportError("libx.so: failed to map segment from shared object"), "there is too little memory"),
        (RuntimeError("can't start new thread"), "no more threads or processes can be started"),
        (RuntimeError(os.strerror(errno.EAGAIN)), "no more threads or processes can be started"),  # of C++
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no more threads or processes can be started"),
    ],
)
def test_what_a_host_lacks_is_told_in_one_line(capsys, error, words):
    def _execute_child():  # as subprocess calls it
        raise error

    fail = _execute_child
    assert run_program(fail) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words} (see ")
    assert line.endswith(f": {str(error) or 'MemoryError'}")
    named = pytest.raises(RunError, match=f"task mine failed in load: {words} ")  # it is no mistake of the task's either
    with named, explaining("mine", "in load"):
        fail()


def test_a_lock_that_is_taken_is_no_lack_of_processes(tmp_path):
    with open(tmp_path / "file", "w") as one, open(tmp_path / "file") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            run_program(lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB))
        with pytest.raises(UserError, match="BlockingIOError"), explaining("mine", "in load"):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_current_folder_that_was_removed_is_named(tmp_path):
    (tmp_path / "gone").mkdir()
    program = 'cd gone && rmdir ../gone && exec "$0" -m mnist_dist.train --run_dir "$1"'
    environ = os.environ | {"PYTHONPATH": str(Path(distributed.__file__).parents[1])}
    command = ["sh", "-c", program, sys.executable, str(tmp_path / "run")]
    answer = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert (answer.returncode, answer.stderr.splitlines()[-1]) == (2, "error: the current folder has been removed: go to another (cd)")


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how", ["raises", pytest.param("exits", marks=pytest.mark.slow), "killed", pytest.param("stopped", marks=pytest.mark.slow)]
)
def test_when_one_rank_fails_the_others_end_within_seconds_and_say_why(tmp_path, how, rank):
    folder = tmp_path / "run"
    ranks = start_ranks(tmp_path, FailAt([*LONG, "--run_dir", str(folder), "--timeout_s", "3"], how, rank), 3)
    begun = time.monotonic()
    others = [other for index, other in enumerate(ranks) if index != rank]
    codes = [other.wait(60) for other in others]
    elapsed_s = time.monotonic() - begun
    if how == "stopped":
        ranks[rank].kill(signal.SIGKILL)
    code = ranks[rank].wait(60)
    assert codes == [1, 1]
    assert code == {"raises": 1, "exits": 0, "killed": -9, "stopped": -9}[how]
    assert elapsed_s < 30
    lost = f"rank {rank} on host {platform.node()}"
    silence = f"{lost} was silent for 3 s (stopped, or the node is out of reach); see --timeout_s; where the others were: {folder}/stacks"
    for other in others:
        line = other.text.strip().splitlines()[-1]
        if how == "raises":
            assert f"error: {lost} failed: RunError: task mnist failed in draw for step 5: " in line
            assert line.endswith("ZeroDivisionError: the planted fault")
        elif how == "stopped":
            assert line.endswith(silence)
        else:
            assert line.endswith(f"{lost} is gone and left no reason (killed, or the node went down)")
    if how == "raises":
        assert "ZeroDivisionError: the planted fault" in ranks[rank].text.strip().splitlines()[-1]
    stacks = {path.name: path.read_text() for path in (folder / "stacks").glob("*")}
    assert set(stacks) == ({f"rank{index}.txt" for index in range(3) if index != rank} if how == "stopped" else set())
    assert all("thread 'MainThread', innermost call first:" in text and "loop.py, line" in text for text in stacks.values())


class FailAndCount(FailAt):
    """A rank that prints, before it ends, how many models in DDP there were and are."""

    def __call__(self):
        made, wrap = [], DistributedDataParallel.__init__

        def count(model, *values, **options):
            made.append(weakref.ref(model))
            wrap(model, *values, **options)

        DistributedDataParallel.__init__ = count
        code = super().__call__()
        gc.collect()
        print(f"models in DDP: {len(made)} made, {sum(model() is not None for model in made)} left")
        return code


@pytest.mark.slow
def test_nothing_of_ddp_is_freed_when_a_rank_is_lost(tmp_path):
    # To free it, gloo waits for a thread of its own. Where a connection has broken that may be for ever, though seldom.
    arguments = [*LONG, "--run_dir", str(tmp_path / "run"), "--timeout_s", "3"]
    ranks = start_ranks(tmp_path, FailAndCount(arguments, "killed", 1), 2)
    assert [rank.wait(60) for rank in ranks] == [1, -9]
    assert ranks[0].text.endswith("models in DDP: 1 made, 1 left\n")


@pytest.mark.parametrize(
    ("kind", "said"),
    [(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB."), (torch.AcceleratorError, "CUDA error: out of memory\nmore")],
)
def test_a_gpu_that_fails_anywhere_is_one_line(monkeypatch, capsys, kind, said):
    def fail(*_, **__):
        raise kind(said)

    def work():
        with join_group(World(), configure(threads=1)):
            return 0

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # it is none of its variables
    monkeypatch.setattr(distributed, "Accelerator", fail)
    assert run_program(work) == 1
    assert capsys.readouterr().err == f"error: the GPU failed: {said.splitlines()[0]}\n"


# Disks.


@dataclass(frozen=True)
class WithSmallDisk(Train):
    """A rank whose files may not grow beyond some bytes: a checkpoint does not fit, a row of the record does."""

    limit: int

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
        return super().__call__()


def test_a_full_disk_costs_a_warning_while_training_and_the_exit_status_at_the_end(tmp_path):
    folder = tmp_path / "run"
    arguments = [*TINY, "--run_dir", str(folder), "--checkpoint_every", "2"]
    run_ranks(tmp_path, Train([*TINY, "--run_dir", str(tmp_path / "expected")]), 2)
    ranks = start_ranks(tmp_path, WithSmallDisk(arguments, 1_000_000), 2)
    assert [rank.wait() for rank in ranks] == [1, 1]
    text = ranks[0].text
    assert text.count("a checkpoint could not be written, training goes on without it: File too large") >= 1
    assert "step 10/10" in text
    assert all("the checkpoint of step 10 could not be written: File too large" in rank.text for rank in ranks)
    assert not any("Traceback" in rank.text for rank in ranks)
    assert not list(folder.rglob("*.tmp"))
    # With room again, the same command ends well.
    run_ranks(tmp_path, Train(arguments), 2)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "expected" / "model.safetensors").read_bytes()


@dataclass(frozen=True)
class WithFullDisk(Train):
    """A rank whose disk has no room while a marker exists."""

    marker: str

    def __call__(self):
        def refuse_while_full(function):
            def refusing(*arguments):
                if os.path.exists(self.marker):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return function(*arguments)

            return refusing

        os.pwrite, os.fsync = refuse_while_full(os.pwrite), refuse_while_full(os.fsync)
        return super().__call__()


def test_rows_wait_while_the_disk_is_full_and_older_checkpoints_stay(tmp_path):
    folder, marker = tmp_path / "run", tmp_path / "full"
    arguments = [*LONG, "--run_dir", str(folder), "--checkpoint_every", "2"]
    ranks = start_ranks(tmp_path, WithFullDisk(arguments, str(marker)), 2)
    ranks[0].wait_for(lambda: len(saved_steps(folder)) == 3)
    marker.touch()
    for words in ("training goes on without it: No space left on device", "its rows wait in memory: No space left on device"):
        ranks[0].wait_for(lambda words=words: words in ranks[0].text)
    assert len(saved_steps(folder)) == 3
    marker.unlink()
    before = saved_steps(folder)
    ranks[0].wait_for(lambda: saved_steps(folder) != before)
    ranks[0].kill(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [143, 143]
    rows = [json.loads(row)["step"] for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, saved_steps(folder)[0] + 1))


def test_a_stop_that_cannot_be_saved_ends_with_an_error(tmp_path):
    folder, marker = tmp_path / "run", tmp_path / "full"
    ranks = start_ranks(tmp_path, WithFullDisk([*LONG, "--run_dir", str(folder), "--checkpoint_every", "2"], str(marker)), 2)
    ranks[0].wait_for(lambda: saved_steps(folder))
    marker.touch()
    before = saved_steps(folder)
    ranks[1].kill(signal.SIGUSR1)
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert saved_steps(folder)[-1] == before[-1]
    assert all("could not be written: No space left on device" in rank.text for rank in ranks)


@pytest.mark.parametrize("fault", ["read-only", "a file", "below a file"])
def test_a_run_folder_that_cannot_be_used_is_refused(tmp_path, fault):
    folder = tmp_path / "run"
    if fault == "read-only":
        if os.geteuid() == 0:
            folder = type(folder)("/proc/run")  # for root, few folders are read-only
        else:
            tmp_path.chmod(0o500)
    else:
        folder.write_text("in the way")
        folder = folder / "below" if fault == "below a file" else folder
    text = run_ranks(tmp_path / "logs", Train([*TINY, "--run_dir", str(folder)]), 2, expect=2)
    assert text.count(f"run_dir {folder} cannot be used") == 2
    assert "Traceback" not in text


def test_a_run_folder_that_was_moved_ends_the_run_with_an_error(tmp_path):
    folder = tmp_path / "run"
    ranks = start_ranks(tmp_path, Train([*LONG, "--run_dir", str(folder), "--checkpoint_every", "3"]), 2)
    ranks[0].wait_for(lambda: saved_steps(folder))
    folder.rename(tmp_path / "gone")
    ranks[0].wait_for(lambda: "training goes on without it" in ranks[0].text)
    ranks[0].kill(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [1, 1]
    # A warning at once, and the error.
    assert ranks[0].text.count(f"run_dir {folder} is gone: somebody moved it to {tmp_path / 'gone'}") == 2
    assert f"run_dir {folder} is gone" in ranks[1].text
    assert not folder.exists()
    (tmp_path / "gone").rename(folder)  # put back, it tells why the run ended
    [end] = read_ends(folder)
    assert find_kind(end["why"]) == "folder gone"


def test_a_run_folder_that_was_removed_ends_the_run_at_once(tmp_path):
    folder = tmp_path / "run"
    ranks = start_ranks(tmp_path, Train([*LONG, "--run_dir", str(folder)]), 2)
    ranks[0].wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size)
    folder.rename(tmp_path / "gone")  # at one moment
    shutil.rmtree(tmp_path / "gone")
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert all(f"run_dir {folder} is gone: somebody removed it, and the run stops" in rank.text for rank in ranks)
    assert not folder.exists()


def test_a_run_whose_folder_is_put_back_goes_on(tmp_path):
    folder = tmp_path / "run"
    [rank] = start_ranks(tmp_path, Train([*LONG, "--checkpoint_every", "3", "--run_dir", str(folder)]))
    rank.wait_for(lambda: saved_steps(folder))
    folder.rename(tmp_path / "gone")
    rank.wait_for(lambda: "training goes on without it" in rank.text)
    assert not folder.exists()
    (tmp_path / "gone").rename(folder)
    before = saved_steps(folder)
    rank.wait_for(lambda: saved_steps(folder) != before)
    rank.kill(signal.SIGTERM)
    assert rank.wait() == 143
    rows = [json.loads(row)["step"] for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, saved_steps(folder)[0] + 1))
    assert rank.text.count("is gone") == 1


@dataclass(frozen=True)
class WithSlowDisk(Train):
    """A rank whose disk takes a second for every checkpoint."""

    def __call__(self):
        write = checkpoint.write

        def slowly(*arguments):
            time.sleep(1)
            return write(*arguments)

        checkpoint.write = slowly
        return super().__call__()


def test_a_slow_disk_does_not_hold_up_the_training(tmp_path):
    folder = tmp_path / "run"
    arguments = [*TINY, "--steps", "40", "--evaluate_every", "40", "--run_dir", str(folder), "--checkpoint_every", "1"]
    start = time.monotonic()
    text = run_ranks(tmp_path, WithSlowDisk(arguments))
    assert time.monotonic() - start < 20  # 40 checkpoints one after the other would take 40 s
    assert "is still busy with the last one" in text
    assert saved_steps(folder)[0] == 40


def test_a_busy_disk_is_asked_again_only_when_the_time_has_come_again(tmp_path):
    asked = []

    class Busy:
        def is_free(self, step):
            asked.append(step)

    run = RunFolder(configure(run_dir=str(tmp_path), checkpoint_every=0, checkpoint_every_s=100.0), None)
    run._writer, run._saved_s = Busy(), time.monotonic() - 101
    for step in (7, 8, 9):
        run.save_if_due(SimpleNamespace(step=step))  # nothing of the state is read, let alone encoded
    assert asked == [7]


def start_program(folder, *prefix, **options):
    command = [*prefix, sys.executable, "-m", "mnist_dist.train", *LONG, "--run_dir", str(folder)]
    heed = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed, **options)


def wait_for_rows(folder, process):
    end = time.monotonic() + 60
    while count_rows(folder) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_closed_terminal_saves_and_stops_the_run_but_not_under_nohup(tmp_path):
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    processes = [start_program(plain), start_program(kept, "nohup")]
    for folder, process in zip((plain, kept), processes, strict=True):
        wait_for_rows(folder, process)
        process.send_signal(signal.SIGHUP)
    assert processes[0].wait(60) == 143
    assert saved_steps(plain) == [count_rows(plain)]
    rows = count_rows(kept)
    end = time.monotonic() + 60
    while count_rows(kept) < rows + 20:
        assert processes[1].poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # it still heeds the others
    assert processes[1].wait(60) == 143


@pytest.mark.slow
def test_torchrun_that_hands_on_a_closed_terminal_lets_the_ranks_save(tmp_path):
    folder = tmp_path / "run"
    command = ["nohup", sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(find_free_port())]
    command += ["-m", "mnist_dist.train", *LONG, "--run_dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_rows(folder, process)
    process.send_signal(signal.SIGHUP)
    process.wait(60)
    assert saved_steps(folder) == [count_rows(folder)]


def test_ctrl_c_in_the_first_moments_is_one_line(tmp_path):
    """From the moment that the program heeds signals: options, torch and the rest are imported after it."""
    for delay_s in (0, 0.05, 0.1, 0.2, 0.3):
        process = start_program(tmp_path / "run")
        while not heeds(process, signal.SIGHUP):  # the last to be taken over; Python itself may take any time to get there
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
        assert (process.returncode, text) == (130, "stopped by a signal before the training began\n"), delay_s
    assert not (tmp_path / "run").exists()


def heeds(process, number):
    """Whether the process has a handler of its own for a signal."""
    caught = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return int(caught.split()[1], 16) >> number - 1 & 1
