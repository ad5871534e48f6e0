"""How the ranks of a run find each other, keep strangers out, and name who is missing, gone or silent."""

import contextlib
import itertools
import json
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from processes import TINY, Train, TrainTask, find_free_port, run_ranks, start_ranks

from launch.endings import find_kind
from mnist_dist import board, distributed, rendezvous
from mnist_dist.errors import RunError, UserError
from mnist_dist.machine import count_open_files, raise_file_limit
from mnist_dist.meter import Meter
from mnist_dist.rendezvous import describe_run, find_interface, meet, name_ranks, name_with_hosts
from mnist_dist.source import hash_package
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.world import World

HOST = platform.node()
RUN = {"job": "7"}


def make_worlds(size, address="127.0.0.1", port=None):
    port = port or find_free_port()
    return [World(rank, size, rank, size, "torchrun", address, port) for rank in range(size)]


def start_meeting(pool, worlds, run=RUN, timeout_s=20):
    return [pool.submit(meet, world, run, timeout_s, None, None) for world in worlds]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(24) as pool:
        yield pool


def test_ranks_in_words():
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([7, 0, 1, 2, 9]) == "ranks 0-2, 7, 9"
    assert name_ranks(range(0, 200, 2)).endswith("38 and 80 more groups")
    assert name_with_hosts([0, 1, 2], {0: "a", 1: "b", 2: "a"}) == "ranks 0, 2 on host a, rank 1 on host b"
    assert name_with_hosts(range(20), {rank: f"h{rank}" for rank in range(20)}).endswith("rank 7 on host h7, 12 more hosts")


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", HOST])
def test_ranks_meet_and_leave_the_port_free(pool, address):
    worlds = make_worlds(5, address)
    places = [meeting.result() for meeting in start_meeting(pool, worlds)]
    assert {place.hosts for place in places} == {(HOST,) * 5}
    assert {(place.is_local, place.store, place.address) for place in places} == {(True, "127.0.0.1", "127.0.0.1")}
    assert len({place.secret for place in places}) == len({place.port for place in places}) == 1
    assert places[0].port != worlds[0].port
    assert places[0].listener.getsockname()[0] == "127.0.0.1"  # no other host reaches the store
    socket.create_server(("", worlds[0].port)).close()
    places[0].listener.close()
    assert find_interface("127.0.0.1") == "lo"
    assert find_interface("192.0.2.1") is None


def test_two_runs_that_were_given_one_port_both_meet_their_own(pool):
    port = find_free_port()
    meetings = []
    for run in ({"job": "1"}, {"job": "2"}, {"job": "3"}):
        meetings.append(start_meeting(pool, reversed(make_worlds(3, port=port)), run))
    places = [[meeting.result() for meeting in run] for run in meetings]
    assert [len({place.secret for place in run}) for run in places] == [1, 1, 1]
    assert len({run[0].secret for run in places}) == 3


def wait_until(condition, timeout_s=10):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_open(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def start_rank_zero(world):
    """A process that waits for the others at its port."""
    code = f"from mnist_dist.rendezvous import meet\nfrom mnist_dist.world import World\nmeet({world!r}, {RUN!r}, 60, None, None)"
    main = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: is_open(world.port))
    return main


def read_until(connection, words):
    received = b""
    while words not in received:
        received += (more := connection.recv(100))
        assert more, received


def test_a_stranger_is_refused_and_the_run_goes_on_waiting(pool, monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 0.5)
    worlds = make_worlds(3)
    [main] = start_meeting(pool, worlds[:1])
    wait_until(lambda: is_open(worlds[0].port))
    begun = time.monotonic()
    for strange, what in (({"job": "8"}, "job"), (RUN | {"job step": "1"}, "what they are")):
        with pytest.raises(
            UserError, match=rf"port {worlds[1].port} on host 127.0.0.1 is taken: another run meets there \({what} differ\)"
        ):
            meet(worlds[1], strange, 20, None, None)
    with pytest.raises(UserError, match=f"port {worlds[0].port} on host {HOST} is taken by another program: set MASTER_PORT"):
        meet(worlds[0], {"job": "8"}, 20, None, None)
    assert time.monotonic() - begun < 15  # and not the 20 s that they may wait
    [second] = start_meeting(pool, worlds[1:2])
    time.sleep(0.3)
    assert not second.done()
    with pytest.raises(UserError, match=f"rank 1 has come already, from host {HOST}: is this the same command twice"):
        meet(worlds[1], RUN, 20, None, None)
    with pytest.raises(UserError, match="no other rank 3 is expected"):
        meet(World(3, 4, 3, 4, "torchrun", "127.0.0.1", worlds[0].port), RUN, 20, None, None)
    assert not main.done()
    [third] = start_meeting(pool, worlds[2:])
    assert main.result().secret == second.result().secret == third.result().secret
    main.result().listener.close()
    assert f"rank 1 on host {HOST} came to port {worlds[0].port}, belongs to another run (job differ) and was refused" in caplog.text


RUBBISH = [
    b"",
    b"\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"x" * 1_000_000,
    b'{"run": ',
    b"[" * 5000 + b"\n",
    b"[]\n",
    b"{}\n",
    b'{"run": 1, "rank": 1, "host": "x", "code": "1"}\n',
    b'{"run": {"job": "7"}, "rank": "1", "host": "x", "code": "1"}\n',
    b'{"run": {"job": "7"}, "rank": 1, "host": 5, "code": "1"}\n',
    b'{"run": {"job": "7"}, "rank": 1, "host": "x", "code": 5}\n',
    b'{"run": {"job": "7"}, "rank": 1e99, "host": "x", "code": "1"}\n',
    b'{"run": {"job": "7"}, "rank": -1, "host": "x", "code": "1"}\n',
    b"\xff\xfe\n",
]


def test_whatever_else_comes_to_the_port_does_no_harm(pool):
    worlds = make_worlds(2)
    [main] = start_meeting(pool, worlds[:1])
    wait_until(lambda: is_open(worlds[0].port))
    with contextlib.ExitStack() as stack:
        for round_ in range(12):
            for rubbish in RUBBISH:
                visitor = stack.enter_context(socket.create_connection(("127.0.0.1", worlds[0].port)))
                visitor.settimeout(2)
                with contextlib.suppress(OSError):
                    visitor.sendall(rubbish)
                    if round_ == 0:
                        visitor.shutdown(socket.SHUT_WR)
        assert not main.done()
        [other] = start_meeting(pool, worlds[1:])
        assert other.result().secret == main.result().secret
    main.result().listener.close()


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"mnist_dist": 1}\n', b"close"])
def test_a_port_that_another_program_has_is_named_on_every_rank(pool, monkeypatch, says):
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 0.4)
    monkeypatch.setattr(rendezvous, "_GREETING_S", 0.4)
    worlds = make_worlds(2)
    kept = []

    def serve(server):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                if says != b"close":
                    connection.sendall(says)
                    kept.append(connection)
                else:
                    connection.close()

    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", worlds[0].port)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        main, other = start_meeting(pool, worlds)
        port = worlds[0].port
        with pytest.raises(UserError, match=f"^port {port} on host {HOST} is taken by another program: set MASTER_PORT to a free one$"):
            main.result()
        by = (
            r"another version of mnist_dist \(another run's, or that of a node of this one\)"
            if b"1}" in says
            else "another program, which does not answer as rank zero of a run does"
        )
        with pytest.raises(UserError, match=f"^port {port} on host 127.0.0.1 is taken: by {by}; set MASTER_PORT to a free one$"):
            other.result()
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()
    assert time.monotonic() - begun < 15  # and not the 20 s that they may wait


def test_a_port_that_nobody_chose_and_is_taken_is_no_mistake_of_the_user(monkeypatch):
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 0.2)
    main, other = (replace(world, launcher="srun", unchosen=("MASTER_PORT",)) for world in make_worlds(2))
    with socket.create_server(("127.0.0.1", main.port)) as server:
        with pytest.raises(RunError, match=r"is taken by another program: start again later, or set MASTER_PORT .* the number of the job"):
            meet(main, RUN, 20, None, None)
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        monkeypatch.setattr(rendezvous, "PATIENCE_S", 0)
        with pytest.raises(RunError, match=r"is taken: by another program, .*; start again later"):
            meet(other, RUN, 20, None, None)


def test_a_name_server_that_is_out_of_reach_is_asked_until_the_time_is_over(pool, monkeypatch):
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 0.2)
    connect, end = socket.create_connection, time.monotonic() + 0.8

    def fail_for_a_while(*given, **named):
        if time.monotonic() < end:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return connect(*given, **named)

    monkeypatch.setattr(socket, "create_connection", fail_for_a_while)
    chosen = make_worlds(2)
    with pytest.raises(UserError, match=r"MASTER_ADDR is '127.0.0.1', which host .* does not know: Temporary failure"):
        meet(chosen[1], RUN, 20, None, None)
    main, other = start_meeting(pool, [replace(world, unchosen=("MASTER_ADDR", "MASTER_PORT")) for world in chosen])
    assert main.result().secret == other.result().secret
    main.result().listener.close()
    end = time.monotonic() + 99
    with pytest.raises(RunError, match=r"within 0.5 s: host .* does not know '127.0.0.1' \(Temporary failure in name resolution\)"):
        meet(replace(chosen[1], unchosen=("MASTER_ADDR",)), RUN, 0.5, None, None)


def test_a_port_that_is_not_allowed_is_not_said_to_be_taken(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(UserError, match=r"port 80 on host .* cannot be used: Permission denied; set MASTER_PORT"):
        meet(make_worlds(2, port=80)[0], RUN, 20, None, None)


def test_who_did_not_come_is_named_on_every_rank_that_came(pool):
    worlds = make_worlds(6)
    begun = time.monotonic()
    came = start_meeting(pool, [worlds[0], worlds[1], worlds[4]], timeout_s=1.5)
    for world, meeting in zip((worlds[0], worlds[1], worlds[4]), came, strict=True):
        with pytest.raises(RunError) as error:
            meeting.result()
        assert str(error.value) == (
            f"rank {world.rank} of 6 could not join the others at 127.0.0.1:{world.port} within 1.5 s: "
            f"ranks 2-3, 5 of 6 did not come; ranks 0-1, 4 on host {HOST} came"
        )
    assert time.monotonic() - begun < 10


def test_a_rank_zero_that_does_not_come_is_named(monkeypatch):
    with pytest.raises(RunError, match=r"rank 1 of 2 could not .* within 0.5 s: rank zero is not there \(Connection refused\)"):
        meet(make_worlds(2)[1], RUN, 0.5, None, None)
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 0.1)
    with pytest.raises(UserError, match=f"MASTER_ADDR is 'no.such.invalid', which host {HOST} does not know"):
        meet(make_worlds(2, "no.such.invalid")[1], RUN, 20, None, None)


def test_a_rank_zero_on_another_host_than_was_said_is_told(pool):
    with pytest.raises(RunError, match=r"no address of this host is MASTER_ADDR, 192.0.2.7, where the others look for rank zero"):
        meet(World(0, 2, 0, 1, "torchrun", "192.0.2.7", find_free_port()), RUN, 0.3, None, None)


def test_a_rank_that_came_and_left_is_named_and_may_come_again(pool):
    worlds = make_worlds(3)
    [main] = start_meeting(pool, worlds[:1], timeout_s=3)
    wait_until(lambda: is_open(worlds[0].port))
    greeting = b'{"run": {"job": "7"}, "rank": 1, "host": "else\\u001bwhere", "code": "1"}\n'
    with socket.create_connection(("127.0.0.1", worlds[0].port)) as visitor:
        visitor.sendall(greeting)
        read_until(visitor, b"accepted")
    with pytest.raises(
        RunError, match=r"within 3 s: rank 2 of 3 did not come; rank 1 on host else\?where came and left; rank 0 on host .* came$"
    ):
        main.result()
    [main] = start_meeting(pool, worlds[:1])
    wait_until(lambda: is_open(worlds[0].port))
    with socket.create_connection(("127.0.0.1", worlds[0].port)) as visitor:
        visitor.sendall(greeting)
        read_until(visitor, b"accepted")
    others = start_meeting(pool, worlds[1:])
    assert {other.result().hosts for other in others} == {(HOST,) * 3}
    main.result().listener.close()


def test_ranks_that_run_other_code_are_named(pool):
    worlds = make_worlds(4)
    [main, other] = start_meeting(pool, worlds[:2])
    wait_until(lambda: is_open(worlds[0].port))
    with contextlib.ExitStack() as stack:
        visitors = []
        for rank, code in ((2, "older"), (3, "newer\x1b[2J")):
            visitor = stack.enter_context(socket.create_connection(("127.0.0.1", worlds[0].port)))
            visitor.sendall(json.dumps({"run": RUN, "rank": rank, "host": "else", "code": code}).encode() + b"\n")
            visitors.append(visitor)
        own = hash_package()
        for meeting in (main, other):
            with pytest.raises(
                UserError,
                match=rf"ranks 2-3 on host else run other code of mnist_dist \(hash newer\?\[2J, older\) than rank 0 on .* \({own}\): all",
            ):
                meeting.result()
        for visitor in visitors:
            read_until(visitor, b'"mistake": "ranks 2-3 on host else run other code')


def test_a_rank_zero_that_dies_is_noticed_at_once(tmp_path, pool):
    worlds = make_worlds(3)
    main = start_rank_zero(worlds[0])
    [other] = start_meeting(pool, worlds[1:2])
    time.sleep(0.5)
    main.kill()
    main.wait()
    with pytest.raises(RunError, match=r"rank 1 of 3 was left by rank zero at 127\.0\.0\.1"):
        other.result(15)


@pytest.mark.slow
def test_a_rank_zero_that_is_held_up_while_a_rank_arrives_is_not_taken_for_another_program(pool, monkeypatch):
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 3)
    monkeypatch.setattr(rendezvous, "_GREETING_S", 3)
    worlds = make_worlds(2)
    with socket.create_server(("127.0.0.1", worlds[0].port)):  # as the kernel answers for it
        [other] = start_meeting(pool, worlds[1:])
        time.sleep(3.5)
    [main] = start_meeting(pool, worlds[:1])
    assert main.result().secret == other.result().secret
    main.result().listener.close()


def test_a_name_server_that_does_not_answer_holds_nobody_up(pool, monkeypatch):
    monkeypatch.setattr(rendezvous, "_WAITING_S", 0)
    is_asked, answers = threading.Event(), threading.Event()

    def ask(_):
        is_asked.set()
        return answers.wait(60)

    monkeypatch.setattr(rendezvous, "_is_here", ask)
    worlds = make_worlds(2)
    [main] = start_meeting(pool, worlds[:1])
    assert is_asked.wait(10)
    [other] = start_meeting(pool, worlds[1:])
    assert main.result(10).secret == other.result(10).secret
    answers.set()
    main.result().listener.close()


def test_more_strangers_than_rank_zero_greets_at_once_do_no_harm(tmp_path):
    worlds = make_worlds(2)
    main = start_rank_zero(worlds[0])
    with contextlib.ExitStack() as stack:
        address = "127.0.0.1", worlds[0].port
        strangers = [stack.enter_context(socket.create_connection(address)) for _ in range(rendezvous._STRANGERS + 2)]
        for stranger in strangers:
            read_until(stranger, b"\n")
        main.send_signal(signal.SIGSTOP)  # it finds both at once: one more comes, and the oldest, who has to go for it, speaks
        stack.enter_context(socket.create_connection(address))
        strangers[0].sendall(b"x")
        time.sleep(0.2)
        main.send_signal(signal.SIGCONT)
        with contextlib.suppress(ConnectionResetError):
            assert strangers[0].recv(100) == b""
    assert meet(worlds[1], RUN, 20, None, None).hosts == (HOST,) * 2
    assert main.wait(60) == 0


@dataclass(frozen=True)
class JoinByAgent(Train):
    """The agents of two nodes, of which one has counted a restart and the other has not."""

    def __call__(self):
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": os.environ["RANK"]}
        return super().__call__()


def test_ranks_meet_whose_agents_count_restarts_differently(tmp_path):
    port = find_free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    store.set("mnist_dist/greeting/0", str(find_free_port()))  # of the round before
    run_ranks(tmp_path, JoinByAgent([*TINY, "--run_dir", str(tmp_path / "run")]), 2, {"MASTER_PORT": str(port)})


def test_what_tells_one_run_from_another():
    step = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}
    world = replace(make_worlds(2)[0], launcher="srun")
    run = describe_run(world, step, "runs/a")
    assert run == describe_run(replace(world, rank=1, local_rank=1), step | {"SLURM_PROCID": "0"}, "runs/a")
    others = [step | {"SLURM_JOB_ID": "6"}, step | {"SLURM_STEP_ID": "1"}, step | {"SLURM_RESTART_COUNT": "1"}]
    assert all(describe_run(world, other, "runs/a") != run for other in others)
    assert describe_run(world, step, "runs/b") != run
    assert describe_run(make_worlds(3)[0], step, "runs/a") != run
    # The components of a heterogeneous job have numbers of their own.
    first, second = (step | {"SLURM_JOB_ID": job, "SLURM_HET_JOB_ID": "5"} for job in ("5", "6"))
    assert describe_run(world, first, "runs/a") == describe_run(world, second, "runs/a")


# Real ranks.


def test_a_stray_rank_of_another_run_is_refused_and_the_run_trains(tmp_path):
    port = str(find_free_port())
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def start(rank, folder, log):
        own = environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return start_ranks(tmp_path / log, Impatient([*TINY, "--run_dir", str(tmp_path / folder)]), 1, own)[0]

    main = start(0, "run", "main")
    main.wait_for(lambda: is_open(int(port)))
    stray = start(1, "other", "stray")
    assert stray.wait() == 2
    assert f"error: port {port} on host 127.0.0.1 is taken: another run meets there (run_dir differ); set MASTER_PORT" in stray.text
    assert main.is_alive
    other = start(1, "run", "other")
    assert [main.wait(), other.wait()] == [0, 0]
    assert (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "other" / "config.yaml").exists()


@pytest.mark.slow
def test_two_steps_of_one_job_on_one_port_at_the_same_time_both_train(tmp_path):
    port = str(find_free_port())
    job = {"SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n1"}
    ranks = []
    for step in ("0", "7"):
        for rank in ("1", "0"):
            own = {"SLURM_STEP_ID": step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "MASTER_PORT": port}
            ranks += start_ranks(tmp_path / step / rank, Train([*TINY, "--run_dir", str(tmp_path / f"run{step}")]), 1, job | own)
    assert [rank.wait() for rank in ranks] == [0] * 4, "".join(rank.text for rank in ranks)
    for step in ("0", "7"):
        result = (tmp_path / f"run{step}" / "result.json").read_text()
        assert '"world_size": 2' in result
        assert '"launcher": "srun"' in result


@dataclass(frozen=True)
class Impatient(Train):
    """A rank that is soon sure that a port is somebody else's."""

    def __call__(self):
        rendezvous.PATIENCE_S = 1.0
        return super().__call__()


@dataclass(frozen=True)
class HangAt(TrainTask):
    """A rank that hangs in what its task does, and is alive."""

    rank: int

    def make_task(self):
        is_this_rank = os.environ["RANK"] == str(self.rank)

        class Hanging(Mnist):
            def draw(self, seed, step, size):
                if step == 4 and is_this_rank:
                    hang_in_the_data()
                return super().draw(seed, step, size)

        return Hanging


def hang_in_the_data():
    time.sleep(1000)


@pytest.mark.parametrize("rank", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_with_its_line_and_all_stacks_are_kept(tmp_path, rank):
    folder = tmp_path / "run"
    (folder / "stacks").mkdir(parents=True)
    ranks = start_ranks(tmp_path, HangAt([*TINY, "--run_dir", str(folder), "--timeout_s", "3"], rank), 3)
    others = [other for index, other in enumerate(ranks) if index != rank]
    assert [other.wait(60) for other in others] == [1, 1]
    assert ranks[rank].is_alive
    line = hang_in_the_data.__code__.co_firstlineno + 1
    where = (
        rf"rank {rank} on host {HOST} was silent for 3 s: it is at {__file__}, line {line}, in hang_in_the_data, called from .*/mnist_dist/"
    )
    for other in others:
        assert re.search(where, other.text), other.text
        assert other.text.strip().endswith(f"; where the others were: {folder}/stacks")
        assert "Traceback" not in other.text
    ranks[rank].kill(signal.SIGKILL)
    ranks[rank].wait()
    stacks = {path.name: path.read_text() for path in (folder / "stacks").iterdir()}
    assert set(stacks) == {"rank0.txt", "rank1.txt", "rank2.txt"}
    assert f"line {line}, in hang_in_the_data" in stacks[f"rank{rank}.txt"]
    assert stacks["rank1.txt"].startswith(f"rank 1 on host {HOST}, process ")
    if rank != 0:
        end = json.loads((folder / "ends.jsonl").read_text())
        assert ("was silent for 3 s" in end["why"], end["lasting"]) == (True, False)


@dataclass(frozen=True)
class PauseAt(TrainTask):
    """A rank for which the other waits until a file is there."""

    go: Path

    def make_task(self):
        go = self.go

        class Pausing(Mnist):
            def draw(self, seed, step, size):
                while step == 4 and os.environ["RANK"] == "1" and not go.exists():
                    time.sleep(0.01)
                return super().draw(seed, step, size)

        return Pausing


@pytest.mark.slow
def test_a_job_that_was_suspended_for_too_long_says_so(tmp_path):
    folder, go = tmp_path / "run", tmp_path / "go"
    ranks = start_ranks(tmp_path, PauseAt([*TINY, "--run_dir", str(folder), "--timeout_s", "8"], go), 2)
    ranks[0].wait_for(lambda: "step 4/" in ranks[0].text)
    time.sleep(2)  # now rank zero waits
    for rank in ranks:
        rank.kill(signal.SIGSTOP)
    time.sleep(12)
    go.touch()
    for rank in ranks:
        rank.kill(signal.SIGCONT)
    assert [rank.wait(60) for rank in ranks] == [1, 1]
    words = rf"rank \d on host {HOST} stood still for \d+ s \(the job was suspended, or its host\), and the connections "
    for rank in ranks:
        assert re.search(words + "between the ranks outlast 8 s; see --timeout_s", rank.text), rank.text
        assert "Traceback" not in rank.text
    assert find_kind(json.loads((folder / "ends.jsonl").read_text())["why"]) == "suspended"


@dataclass(frozen=True)
class FailWhereNoConnectionBreaks(Train):
    """A rank that fails while the other waits for it in the store of torch, where only time would tell, or soon begins to."""

    busy_s: float

    def __call__(self):
        def check(group):
            if group.rank == 1:
                raise UserError("the planted fault")
            time.sleep(self.busy_s)
            store = torch.distributed.distributed_c10d._get_default_store()
            torch.distributed.distributed_c10d._store_based_barrier(0, store, "never", 2, timedelta(seconds=100))

        distributed._check_settings = check
        return super().__call__()


@pytest.mark.slow
@pytest.mark.parametrize("busy_s", [0, 4], ids=["it waits", "it is busy first"])
def test_a_rank_that_left_is_noticed_within_seconds_where_no_connection_breaks(tmp_path, busy_s):
    ranks = start_ranks(tmp_path, FailWhereNoConnectionBreaks([*TINY, "--run_dir", str(tmp_path / "run")], busy_s), 2)
    assert ranks[1].wait() == 2
    begun = time.monotonic()
    assert ranks[0].wait() == 1
    assert time.monotonic() - begun < 15
    assert ranks[0].text.endswith(f"[rank 0] error: rank 1 on host {HOST} failed: UserError: the planted fault\n")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete", True),
        ("[gloo/transport/tcp/pair.cc:144] timed out connecting: SO_ERROR: Connection timed out, remote=[10.0.0.2]:41000", True),
        ("[gloo/transport/tcp/pair.cc:152] timed out connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:25483$0", False),
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:12345", False),
    ],
)
def test_a_refused_connection_is_no_silence(words, answer):
    assert board.is_timeout(RuntimeError(words)) == answer


@dataclass(frozen=True)
class RankZeroDiesBeforeTheFirstWord(Train):
    """Rank zero, and with it the store, is killed while the others wait for its first word."""

    def __call__(self):
        check_settings = distributed._check_settings

        def check(group):
            if group.is_main:
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGKILL)
            check_settings(group)

        distributed._check_settings = check
        return super().__call__()


@pytest.mark.slow
def test_a_rank_zero_that_was_killed_before_its_first_word_is_named_within_seconds(tmp_path):
    ranks = start_ranks(tmp_path, RankZeroDiesBeforeTheFirstWord([*TINY, "--run_dir", str(tmp_path / "run")]), 2)
    assert [rank.wait(100) for rank in ranks] == [-signal.SIGKILL, 1]
    assert ranks[1].text.endswith(f"[rank 1] error: rank 0 on host {HOST} is gone and left no reason (killed, or the node went down)\n")


@dataclass(frozen=True)
class DieWithTheVerdict(Train):
    """One rank is killed, and so is the one that noticed first and was to tell the others."""

    def __call__(self):
        begin_step, report_lost_rank, rank, steps = Meter.begin_step, board.Board.report_lost_rank, os.environ["RANK"], itertools.count(1)

        def begin(meter):
            if next(steps) == 4:
                if rank == "3":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0 if rank == "2" else 1)
            begin_step(meter)

        def report(own, error):
            report_lost_rank(own, error)
            if rank == "2":
                os.kill(os.getpid(), signal.SIGKILL)

        Meter.begin_step, board.Board.report_lost_rank = begin, report
        return super().__call__()


@pytest.mark.slow
def test_when_the_rank_that_was_to_say_who_is_gone_is_lost_too_the_others_say_it(tmp_path):
    ranks = start_ranks(tmp_path, DieWithTheVerdict([*TINY, "--batch_size", "8", "--run_dir", str(tmp_path / "run")]), 4)
    assert [rank.wait() for rank in ranks] == [1, 1, -signal.SIGKILL, -signal.SIGKILL]
    for rank in ranks[:2]:
        assert re.search(rf"error: rank(s 2-)?(?(1)| )3 on host {HOST} (is|are) gone and left no reason", rank.text), rank.text


@dataclass(frozen=True)
class WaitForGpu(Train):
    """As on a GPU, the ranks wait for ever for what another one does not do: from the third step on, all but the `victim`."""

    victim: int

    def __call__(self):
        make_group, make_board, begin_step = distributed.Group.__init__, board.Board.__init__, Meter.begin_step

        def join(group, *given):
            make_group(group, *given)
            group._neighbour = distributed._Neighbour(group, group._notice)

        def wait(meter):
            if len(meter._losses) == 2 and os.environ["RANK"] != str(self.victim):
                self.wait()
            begin_step(meter)

        distributed.Group.__init__, Meter.begin_step = join, wait
        distributed.dist.distributed_c10d._abort_process_group = lambda: None
        board.Board.__init__ = lambda *given, on_gpu: make_board(*given, on_gpu=True)
        board._LEAVING_GPU_S = 2.0
        return super().__call__()

    def wait(self):
        while True:
            time.sleep(1)


# Rank zero has the board in its memory.
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_that_a_rank_is_gone_is_noticed_while_the_others_wait_for_their_gpus(tmp_path, victim):
    options = [*TINY, "--log_every", "100", "--evaluate_every", "100", "--run_dir", str(tmp_path / "run")]
    ranks = start_ranks(tmp_path, WaitForGpu(options, victim), 3)
    ranks[0].wait_for(lambda: "any world" in ranks[0].text)
    time.sleep(1)
    ranks.pop(victim).kill(signal.SIGKILL)
    for rank in ranks:
        assert rank.wait(60) == 1
        assert f"error: rank {victim} on host {HOST} is gone and left no reason" in rank.text


class WaitForProcess(WaitForGpu):
    """A rank that waits for a process, as for that of W&B, when it learns that another one is gone."""

    def wait(self):
        subprocess.run(["sleep", "8"], check=True)


@pytest.mark.slow
def test_a_rank_that_waits_for_a_process_is_not_taken_for_one_that_waits_for_its_gpu(tmp_path):
    options = [*TINY, "--log_every", "100", "--evaluate_every", "100", "--run_dir", str(tmp_path / "run")]
    ranks = start_ranks(tmp_path, WaitForProcess(options, 1), 2)
    ranks[0].wait_for(lambda: "any world" in ranks[0].text)
    time.sleep(0.5)
    ranks[1].kill(signal.SIGKILL)
    time.sleep(6)  # a rank that waits for its GPU would have been ended
    assert ranks[0].is_alive
    assert ranks[0].wait(60) == 1
    assert f"error: rank 1 on host {HOST} is gone and left no reason" in ranks[0].text


def test_ranks_that_listen_to_their_neighbours_end_as_others_do(tmp_path):
    text = run_ranks(tmp_path, WaitForGpu([*TINY, "--steps", "2", "--run_dir", str(tmp_path / "run")], 9), 3)
    assert "error" not in text


class CloseLate(Train):
    """Rank one is not given the processor for a second, just as the run has ended."""

    def __call__(self):
        close = board.Board.close

        def close_late(own, *given, **named):
            if os.environ["RANK"] == "1" and not own._closed.is_set():
                time.sleep(1)
            close(own, *given, **named)

        board.Board.close = close_late
        code = super().__call__()
        print("threads left:", *(thread.name for thread in threading.enumerate() if "board" in thread.name or "run" in thread.name))
        return code


def test_the_last_to_end_does_not_look_for_rank_zero(tmp_path):
    text = run_ranks(tmp_path, CloseLate([*TINY, "--run_dir", str(tmp_path / "run")]), 2)
    assert text.count("threads left:\n") == 2


IN_TORCH = """
import sys
import torch
from mnist_dist.program import run_program, start_thread

store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

def ask_on():
    while True:
        store.check(["a"])

def work():
    start_thread(ask_on)
    return 5

sys.exit(run_program(work))
"""


@pytest.mark.slow
def test_a_thread_that_is_still_in_torch_does_not_abort_a_process_that_ends():
    done = subprocess.run([sys.executable, "-c", IN_TORCH], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr


CLOSED = "[/source/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:5. This indicates that the remote worker"


@pytest.fixture
def boards(monkeypatch):
    monkeypatch.setattr(board, "_ANSWERING_S", 0.5)
    waits = {"wait_for_workers": False, "timeout": timedelta(seconds=30)}  # a name server that is asked too often is silent for 5
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, **waits)

    def connect():
        return torch.distributed.TCPStore("127.0.0.1", server.port, is_master=False, **waits)

    boards = [board.Board(connect, rank, ("a", "b", "b"), timedelta(seconds=9)) for rank in range(3)]
    yield boards
    for own in boards:
        own.close(server)
    assert not any(own._watcher.is_alive() for own in boards)


def test_what_nccl_says_is_not_taken_for_a_lost_rank(boards):
    error = torch.distributed.DistBackendError("NCCL error: invalid usage\nmore")
    for own in boards:
        own.report_lost_rank(error)
    assert {own.explain(error) for own in boards} == {"the connection to another rank broke, though all answer: NCCL error: invalid usage"}


@pytest.mark.parametrize(
    ("what", "reason", "told", "kind"),
    [
        (  # and not that the run's disk is full
            "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
            "Error while creating shared memory segment /dev/shm/nccl-a (size 9), error: No space left on device (28)",
            "NCCL failed, though all answer: Error while creating shared memory segment /dev/shm/nccl-a (size 9), error: No space left on "
            "device (28)",
            "NCCL",
        ),
        (
            "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
            "socketProgress: Connection closed by remote peer node2<40123>",
            "the connection to another rank broke, though all answer: socketProgress: Connection closed by remote peer node2<40123>",
            "cut off",
        ),
        (  # and not that a rank is gone
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
            "two processes have the same GPU (rank 1 and rank 0 both on CUDA device 1b000): start at most one process for each GPU",
            "",
        ),
        (
            "ncclInternalError: Internal check failed.",
            "\nException raised from f at x.cpp:94",
            "the connection to another rank broke, though all answer: NCCL error in: NCCLUtils.cpp:94, NCCL version 2.27.5",
            "cut off",
        ),
    ],
)
def test_of_what_nccl_says_its_reason_is_told(what, reason, told, kind):
    error = torch.distributed.DistBackendError(f"NCCL error in: NCCLUtils.cpp:94, NCCL version 2.27.5\n{what}\nLast error:\n{reason}")
    assert board._describe_broken(error) == told
    assert find_kind(told) == kind


def test_the_first_reason_is_everybodys(boards, pool):
    server = boards[0]._connect()
    boards[1].close(server)
    error = RuntimeError(CLOSED)
    boards[2].report_lost_rank(error)
    boards[0].report_lost_rank(error)
    texts = list(pool.map(lambda own: own.explain(error), (boards[0], boards[2])))
    assert set(texts) == {"rank 1 on host b is gone and left no reason (killed, or the node went down)"}
    boards[0].blame_self(ZeroDivisionError("too late"))
    assert boards[2].explain(error) == texts[0]


@pytest.mark.slow
def test_a_stopped_rank_zero_is_not_called_gone_where_another_rank_is(tmp_path):
    arguments = [*TINY, "--steps", "50000", "--timeout_s", "6", "--run_dir", str(tmp_path / "run")]
    ranks = start_ranks(tmp_path, Train(arguments), 3)
    ranks[0].wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists())
    ranks[0].kill(signal.SIGSTOP)
    ranks[2].kill(signal.SIGKILL)
    assert ranks[1].wait(60) == 1
    # It may have waited for the one or for the other.
    said = ranks[1].text.splitlines()[-1]
    broke = "does not answer (stopped, or out of reach), and the connection to another rank broke: "
    assert re.search(rf"error: rank 0 on host {HOST} ({re.escape(broke)}|was silent for 6 s)", said), said
    assert find_kind(said) == "rank silent"
    ranks[0].kill(signal.SIGKILL)


@dataclass(frozen=True)
class TrainByAnInterface(Train):
    """One rank is told to use a network that there is not."""

    def __call__(self):
        if os.environ["RANK"] == "1":
            os.environ["GLOO_SOCKET_IFNAME"] = "ib77"
        return super().__call__()


def test_a_network_that_there_is_not_is_named_by_all_ranks_at_once(tmp_path):
    begun = time.monotonic()
    ranks = start_ranks(tmp_path, TrainByAnInterface([*TINY, "--run_dir", str(tmp_path / "run")]), 2)
    assert [rank.wait(60) for rank in ranks] == [1, 2]
    assert time.monotonic() - begun < 40
    assert f"error: GLOO_SOCKET_IFNAME is 'ib77', which host {HOST} lacks; it has " in ranks[1].text
    assert f"error: rank 1 on host {HOST} failed: UserError: GLOO_SOCKET_IFNAME is 'ib77'" in ranks[0].text


@pytest.mark.parametrize(
    ("name", "address", "words"),
    [
        ("node7", "127.0.1.1", f"; node7 is 127.0.1.1 on host {HOST}, which is that host itself: see /etc/hosts"),
        ("node7", "10.0.0.7", ""),
        (HOST, "127.0.1.1", ""),
        ("localhost", "127.0.0.1", ""),
        ("127.0.0.1", "127.0.0.1", ""),
    ],
)
def test_a_name_of_another_host_that_means_this_one_is_told(monkeypatch, name, address, words):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))])
    assert rendezvous._mention_loopback(name, World(rank=1, size=2, port=1)) == words
    assert rendezvous._mention_loopback(name, World(rank=1, local_rank=1, size=2, local_size=2, port=1)) == ""


@pytest.mark.parametrize(
    ("elsewhere", "words"),
    [
        (None, "rank 1 on host b waited 9 s in vain for another rank, though all answer: do their hosts reach each other"),
        (2, "rank 2 on host b was silent for 9 s: it is at an unknown place"),
    ],
    ids=["cut off", "slow"],
)
def test_who_waited_in_vain_is_told_from_who_was_slow(boards, pool, monkeypatch, elsewhere, words):
    monkeypatch.setattr(board, "_is_elsewhere", lambda rank: rank == elsewhere)
    for rank, own in enumerate(boards):
        own._thread_of_run = rank
    silence = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 9000ms for recv operation to complete")
    errors = [RuntimeError(CLOSED), silence, RuntimeError(CLOSED)]
    for own, error in zip(boards, errors, strict=True):
        own.report_lost_rank(error)
    texts = {*pool.map(lambda own, error: own.explain(error), boards, errors)}
    assert len(texts) == 1
    assert texts.pop().startswith(words)


def test_a_connection_that_broke_is_told_without_what_gloo_guesses(boards):
    for own in boards:
        own.report_lost_rank(RuntimeError(CLOSED))
    text = boards[0].explain(RuntimeError(CLOSED))
    assert text == "the connection to another rank broke, though all answer: Connection closed by peer [10.0.0.2]:5"
    assert find_kind(text) == "cut off"


def test_what_ranks_say_at_a_failure_waits_for_no_name_server(boards):
    for own in boards:
        own._connect = threading.Event().wait  # torch's store serves nobody while it asks for the name of a new peer
    error = RuntimeError(CLOSED)
    boards[2].blame_self(ZeroDivisionError("of its own"))
    boards[0].report_lost_rank(error)
    assert boards[0].explain(error) == boards[1].explain(error) == "rank 2 on host b failed: ZeroDivisionError: of its own"


def fail(_):
    raise torch.distributed.DistNetworkError("Broken pipe")


@pytest.mark.parametrize(
    "check", [pytest.param(fail, marks=pytest.mark.slow), lambda _: time.sleep(60)], ids=["broken", "forgotten on the way"]
)
def test_a_rank_whose_connection_for_its_own_words_broke_opens_another(boards, check):
    boards[0]._voice = SimpleNamespace(check=check)
    boards[0].blame_self(ZeroDivisionError("of its own"))
    assert boards[1].explain(RuntimeError(CLOSED)) == "rank 0 on host a failed: ZeroDivisionError: of its own"


@pytest.mark.parametrize("most_s", [60, 0.5])
def test_a_rank_that_computes_is_not_taken_for_one_that_waits_but_not_for_ever(boards, monkeypatch, most_s):
    monkeypatch.setattr(board, "_LEAVING_S", 0.8)
    monkeypatch.setattr(board, "_COMPUTING_S", most_s, raising=False)
    monkeypatch.setattr(board, "_find_collective", lambda _: "a collective")
    statuses = []

    def end(status):
        statuses.append(status)
        raise ChildProcessError  # in the place of the end

    def leave():
        with contextlib.suppress(ChildProcessError):
            boards[0].leave("the planted reason")

    monkeypatch.setattr(os, "_exit", end)
    begun = time.monotonic()
    leaving = threading.Thread(target=leave)
    leaving.start()
    while leaving.is_alive() and time.monotonic() < begun + (1.8 if most_s == 60 else 10):
        torch.ones(200, 200).mm(torch.ones(200, 200))
    assert leaving.is_alive() == (most_s == 60)
    leaving.join(10)
    assert statuses == [1]


# Open files.


@dataclass(frozen=True)
class LimitFiles:
    """A rank zero of a large world that may open so many files."""

    soft: int
    hard: int

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.soft, self.hard))
        try:
            raise_file_limit(count_open_files(World(0, 1024, 0, 1, "srun", "a", 5)))
            print(resource.getrlimit(resource.RLIMIT_NOFILE))
        except UserError as error:
            print(error)


def test_the_limit_on_open_files_is_raised_or_named_before_anything_starts(tmp_path):
    assert run_ranks(tmp_path, LimitFiles(300, 4096)).strip() == "(4096, 4096)"
    words = "this process may open 1024 files, and needs up to 3394 with so many ranks: raise the limit (ulimit -Hn 3394)"
    assert run_ranks(tmp_path, LimitFiles(256, 1024)).strip() == words
    assert count_open_files(World(1, 1024, 0, 1, "srun", "a", 5)) < 400


@dataclass(frozen=True)
class CountFiles(TrainTask):
    """A rank that counts its open files while it trains."""

    def make_task(self):
        class Counting(Mnist):
            def draw(self, seed, step, size):
                if step == 3:
                    print("open files:", len(os.listdir("/proc/self/fd")), flush=True)
                return super().draw(seed, step, size)

        return Counting


def count_files(tmp_path, world):
    arguments = [*TINY, "--batch_size", str(world), "--train_size", str(2 * world), "--steps", "4", "--evaluate_every", "4"]
    ranks = start_ranks(tmp_path, CountFiles([*arguments, "--run_dir", str(tmp_path / "run"), "--timeout_s", "120"]), world)
    assert [rank.wait(240) for rank in ranks] == [0] * world, ranks[0].text
    return [int(re.search(r"open files: (\d+)", rank.text)[1]) for rank in ranks]


@pytest.mark.slow
def test_open_files_grow_slowly_with_the_world(tmp_path):
    small, large = count_files(tmp_path / "small", 3), count_files(tmp_path / "large", 9)
    assert max(large[1:]) - max(small[1:]) <= 9  # 18 if each rank were connected with each other
    assert large[0] - small[0] <= 9 + 3 * 6


@pytest.mark.slow
def test_sixty_four_ranks_train_on_a_small_machine(tmp_path):
    assert psutil.virtual_memory().available > 10 << 30, "64 processes need about 8 GiB"
    files = count_files(tmp_path, 64)
    assert max(files[1:]) <= 60
    assert files[0] <= 60 + 3 * 64
    assert '"world_size": 64' in (tmp_path / "run" / "result.json").read_text()
