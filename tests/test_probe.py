"""The checks of a cluster: all is well here, and each planted fault is named."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import Programs, run_ranks, start_ranks

from mnist_dist import source, survey
from mnist_dist.config import configure
from mnist_dist.errors import UserError
from mnist_dist.finding import Finding, read_findings, write_findings
from mnist_dist.network import Link, judge_links, list_rounds
from mnist_dist.probe import CHECKS, main, probe
from mnist_dist.survey import _judge_devices, check_joined, describe_device, find_crowded
from mnist_dist.world import World


def read(tmp_path, check="answer"):
    return read_findings(tmp_path / f"{check}.json")


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3))])
def test_all_is_well_here(tmp_path, world):
    (tmp_path / "runs").mkdir()
    lines = [["probe", check, "--answer", str(tmp_path / f"{check}.json"), "--timeout_s", "60"] for check in CHECKS]
    lines[-1] += ["--folder", str(tmp_path / "runs")]
    printed = run_ranks(tmp_path, Programs(lines), world)
    for check in CHECKS:
        [finding] = read(tmp_path, check)
        crowded = check == "joined" and world > len(os.sched_getaffinity(0))
        assert (finding.check, finding.word) == (check, "WARN" if crowded else "ok"), finding
        assert printed.count(f"{check}: {finding.measured}") == 1
    assert not list((tmp_path / "runs").iterdir())


@dataclass(frozen=True)
class Planted:
    """A check, in which some rank has a fault."""

    fault: str
    check: str
    answer: Path
    folder: Path | None = None
    timeout_s: float = 60

    def __call__(self):
        rank = int(os.environ.get("RANK", "0"))
        os.environ["SLURMD_NODENAME"] = f"node{rank}"  # as if each were on a host of its own
        folder = getattr(self, f"plant_{self.fault}")(rank) or self.folder
        try:
            return probe(self.check, self.answer, folder, self.timeout_s)
        except Exception as error:
            print(error)
            return 1

    def plant_one_core(self, rank):
        os.environ["SLURMD_NODENAME"] = "node0"
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def plant_versions_and_clocks(self, rank):
        if rank == 0:
            versions = survey.describe_versions() | {"torch": "9.9"}
            survey.describe_versions = lambda: versions
        elif rank == 2:
            survey.read_clock = lambda: time.time() - 3600

    def plant_code(self, rank):
        if rank == 1:
            real = source.read_file
            source.read_file = lambda path, size: real(path, size) + (b" " if path.name == "loop.py" else b"")

    def plant_sum(self, rank):
        import torch
        from torch import distributed as dist

        real = dist.all_reduce

        def reduce(values, *arguments, **options):
            answer = real(values, *arguments, **options)
            if values.dtype == torch.int64 and len(values.shape) and len(values) == 1000:
                values[17] += 1
            return answer

        if rank == 1:
            dist.all_reduce = reduce

    def plant_closed_port(self, rank):
        from mnist_dist import network

        class Closed(network._End):
            def __enter__(self):
                self._listener.close()
                return self

            def _answer(self, caller):
                pass

        if rank == 2:
            network._End = Closed

    def plant_slow_link(self, rank):
        from mnist_dist import network

        class Slow(network._End):
            def _measure(self, connection):
                # One direction of one pair.
                return (1e-4, 2e6) if self._rank == 2 and self._other == 1 else super()._measure(connection)

            def _call(self, other):
                self._other = other
                super()._call(other)

        network._End = Slow

    def plant_half_speed(self, rank):
        real = survey.make_step

        def make(device):
            step = real(device)

            def slow():
                begun = time.perf_counter()
                step()
                time.sleep(time.perf_counter() - begun)

            return slow

        survey._ROUNDS_MAX = survey._ROUNDS_MIN
        if rank == 1:
            survey.make_step = make

    def plant_unshared(self, rank):
        other = self.folder.with_name("other")
        other.mkdir(exist_ok=True)
        return other if rank == 1 else None

    def plant_no_locks(self, rank):
        from mnist_dist import lock

        if rank == 1:
            lock.fcntl.flock = lambda *_: None

    def plant_read_only(self, rank):
        def refuse(_):
            raise OSError(errno.EROFS, "Read-only file system")

        if rank == 1:
            survey.Lock = refuse

    def plant_slow_disk(self, rank):
        survey.measure_disk = lambda _: time.sleep(100)

    def plant_hang(self, rank):
        if rank == 1:
            survey.check_joined = lambda *_: time.sleep(100)

    def plant_hang_of_all(self, rank):
        survey.survey = lambda *_: time.sleep(100)


FAULTS = {
    "one_core": ("joined", 2, "WARN", r"ranks 0-1 on host node0 share 1 CPU \(\d+\)"),
    "code": (
        "agree",
        2,
        "WRONG",
        r"rank 1 on host .* runs other code of mnist_dist \(hash \w{12}\) than rank 0 on .* \(\w{12}\): all",
    ),
    "sum": (
        "exchange",
        2,
        "WRONG",
        r"the sum of int64 over 2 ranks is wrong on rank 1 on host node1: -?\d instead of .* at place 17 of 1,000, 1 pl",
    ),
    "closed_port": (
        "exchange",
        3,
        "WRONG",
        r"rank \d on host node\d does not reach rank 2 on host node2 at 127.0.0.1:\d+: Connection refused",
    ),
    "slow_link": ("exchange", 3, "SLOW", r"rank 1 on host node1, rank 2 on host node2 exchange 2 MB/s, the fastest pair \d"),
    "half_speed": ("speed", 2, "SLOW", r"rank 1 on host node1 needs \d+(\.\d+)? ms for a step, the median rank"),
    "unshared": ("files", 2, "WRONG", r"rank 1 on host node1 did not see a new file that rank zero wrote in .*runs within 1.5 s"),
    "read_only": ("files", 2, "WRONG", r"rank 1 on host node1 cannot write in .*runs: Read-only file system"),
    "no_locks": ("files", 2, "WARN", r"rank 1 on host node1 could take the lock of a folder while rank zero held it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(tmp_path, fault):
    check, world, word, words = FAULTS[fault]
    folder = tmp_path / "runs" if check == "files" else None
    if folder:
        folder.mkdir()
    timeout_s = 16 if fault == "unshared" else 60
    run_ranks(tmp_path, Planted(fault, check, tmp_path / "answer.json", folder, timeout_s), world, expect=int(word == "WRONG"))
    found = read(tmp_path)
    assert {(finding.check, finding.word) for finding in found} == {(check, word)}, found
    assert len(found) == (2 if fault == "closed_port" else 1), found
    for finding in found:
        assert re.match(words, finding.measured), finding
        assert finding.next_step
    assert folder is None or not list(folder.iterdir())


def test_the_rank_that_differs_from_most_is_named_with_its_value_and_a_clock_an_hour_off(tmp_path):
    run_ranks(tmp_path, Planted("versions_and_clocks", "agree", tmp_path / "answer.json"), 3, expect=1)
    version, clock = read(tmp_path)
    assert version.measured.startswith("torch of rank 0 on host node0 is 9.9, of ranks 1-2 ")
    assert (clock.word, clock.measured) == ("WRONG", "the clock of host node2 is 3600.0 s behind most others")


@pytest.mark.slow
def test_who_did_not_come_or_is_silent_is_named_in_the_answer(tmp_path):
    alone = start_ranks(tmp_path / "one", Planted("one_core", "joined", tmp_path / "absent.json", timeout_s=12), 1, environ_of_two())
    both = start_ranks(tmp_path / "two", Planted("hang", "joined", tmp_path / "silent.json", timeout_s=16), 2)
    both[0].wait()
    [silent] = read(tmp_path, "silent")
    assert silent.word == "WRONG"
    assert "rank 1 on host" in silent.measured
    assert "was silent for 3 s: it is at " in silent.measured
    both[1].kill(signal.SIGKILL)
    alone[0].wait()
    [absent] = read(tmp_path, "absent")
    assert absent.word == "WRONG"
    assert "rank 1 of 2 did not come; rank 0 on host" in absent.measured


def environ_of_two():
    from processes import find_free_port

    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}


def test_a_check_that_does_not_end_becomes_a_line(tmp_path):
    [rank] = start_ranks(tmp_path, Planted("hang_of_all", "joined", tmp_path / "answer.json", timeout_s=2))
    assert rank.wait() == 1
    [finding] = read(tmp_path)
    assert finding.word == "WRONG"
    assert finding.measured.startswith("no end within 2 s: rank 0 is at ")
    assert "test_probe.py" in finding.measured


@pytest.mark.parametrize("how", ["SIGTERM", pytest.param("the deadline", marks=pytest.mark.slow)])
def test_nothing_is_left_where_files_does_not_end(tmp_path, how):
    (tmp_path / "runs").mkdir()
    timeout_s = 3 if how == "the deadline" else 60
    [rank] = start_ranks(tmp_path, Planted("slow_disk", "files", tmp_path / "answer.json", tmp_path / "runs", timeout_s))
    rank.wait_for(lambda: list((tmp_path / "runs").glob("*/lock")))
    if how == "SIGTERM":
        rank.kill(signal.SIGTERM)
    assert rank.wait() == (1 if how == "the deadline" else 143)
    assert not list((tmp_path / "runs").iterdir())


def test_of_many_findings_the_first_are_shown_and_the_rest_is_counted(monkeypatch):
    found = [Finding("exchange", word, str(number)) for number, word in enumerate(["SLOW"] * 24 + ["WRONG", "SLOW"])]
    monkeypatch.setattr(survey, "_find", lambda *_: found)
    *shown, last = survey.survey("exchange", World(), configure(), None, [])
    assert shown == found[:20]
    assert (last.word, last.measured) == ("WRONG", "and 6 more such lines")


@pytest.mark.slow
def test_all_is_well_on_a_busy_machine(tmp_path):
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        for number in range(5):
            answers = [tmp_path / f"{check}{number}.json" for check in ("exchange", "speed", "agree")]
            run_ranks(tmp_path, Programs([["probe", path.stem[:-1], "--answer", str(path)] for path in answers]), 2)
            assert [finding.word for path in answers for finding in read_findings(path)] == ["ok"] * 3
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_two_ranks_on_one_gpu_and_a_rank_without_one_are_named(monkeypatch):
    def judge(*told):
        rows = [{"device": device, "identity": identity, "problem": problem} for device, identity, problem in told]
        return [finding.measured for finding in _judge_devices(rows, {0: "a", 1: "a", 2: "b"})]

    assert judge(("H", "x", ""), ("H", "y", ""), ("H", "x", "")) == []
    assert judge(("no GPU", "", ""), ("no GPU", "", ""), ("no GPU", "", "")) == []
    assert judge(("H", "x", ""), ("H", "x", ""), ("H", "x", "")) == ["ranks 0-1 on host a have the same GPU"]
    assert judge(("no GPU", "", "not found"), ("no GPU", "", "not found"), ("no GPU", "", "")) == [
        "ranks 0-1 on host a: not found",
    ]
    assert judge(("H", "x", ""), ("H", "y", ""), ("no GPU", "", "")) == ["no GPU is seen by rank 2 on host b, but by the others"]
    assert judge(("none", "", "too many"), ("none", "", "too many"), ("H", "x", "")) == ["ranks 0-1 on host a: too many"]
    shared = [{"device": "H", "identity": "x", "problem": ""}] * 2
    assert [finding.word for finding in _judge_devices(shared, {0: "a", 1: "a"})] == ["WRONG"]
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert [finding.word for finding in _judge_devices(shared, {0: "a", 1: "a"})] == ["WARN"]


def test_gpus_of_slurm_that_torch_does_not_find_are_named():
    missed = describe_device(World(gpus=8), configure())
    assert re.match(r"Slurm gave this node 8 GPUs, and torch finds none \(.+\)", missed["problem"])
    assert describe_device(World(), configure())["problem"] == ""
    assert describe_device(World(gpus=8), configure(device="cpu"))["problem"] == ""


def test_a_quota_is_named_and_cpus_of_ones_own_are_none(monkeypatch):
    def judge(ranks, quota):
        told = [{"cpus": [2 * rank, 2 * rank + 1], "quota": quota, "device": "", "identity": "", "problem": ""} for rank in range(ranks)]
        group = SimpleNamespace(gather=lambda _: told, size=ranks)
        findings = check_joined(group, dict.fromkeys(range(ranks), "a"), World(), configure())
        return [(finding.word, finding.measured) for finding in findings if finding.word != "ok"]

    assert judge(4, None) == []
    assert judge(4, 4) == []
    assert judge(4, 2) == [("WARN", "ranks 0-3 on host a share 2 CPUs by the quota of their control group")]


def test_crowded_cpus_are_found_and_others_are_not():
    for cpus in ([{0}, {1}], [{0, 1}, {0, 1}], [{0, 1, 2}, {0}, {0, 1}], [range(4)] * 4, [{0, 1}, {1, 2}, {0, 2}]):
        assert find_crowded(dict(enumerate(cpus))) == ([], [])
    assert find_crowded({0: {5}, 1: {5}}) == ([0, 1], [5])
    assert find_crowded({0: range(8), 1: {3}, 2: {3}}) == ([1, 2], [3])
    assert find_crowded({0: {0, 1}, 1: {0, 1}, 2: {0, 1}, 3: {0, 1, 2}}) == ([0, 1, 2], [0, 1])
    assert find_crowded({0: {0}, 1: {0}, 2: {1}, 3: {1}, 4: {2}}) == ([0, 1, 2, 3], [0, 1])


@pytest.mark.parametrize("size", range(1, 10))
def test_every_two_meet_once_and_nobody_twice_in_a_round(size):
    rounds = list(list_rounds(range(10, 10 + size)))
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)
    pairs = [pair for pairs in rounds for pair in pairs]
    assert sorted(pairs) == [(one, other) for one in range(10, 10 + size) for other in range(one + 1, 10 + size)]


def test_only_a_pair_far_below_the_others_and_below_a_sane_network_is_slow():
    hosts = dict(enumerate("abc"))

    def judge(*speeds):
        links = [Link(pair, 1e-4, speed) for pair, speed in zip([(0, 1), (0, 2), (1, 2)], speeds, strict=False)]
        return [finding.values["ranks"] for finding in judge_links(links, hosts)]

    assert judge(1e9, 1e9, 1e8) == [(1, 2)]
    assert judge(1e9, 1e9, 1.9e8) == []  # noise
    assert judge(1e8, 1e8, 3e7) == []
    assert judge(1e8, 1e8, 1e7) == [(1, 2)]
    assert judge(1e9, 1e7, 1e7) == [(0, 2), (1, 2)]  # all pairs of one host
    assert (judge(1e6), judge(1e8)) == ([(0, 1)], [])  # two hosts, with no pair to compare theirs with


def test_mistakes_are_refused(tmp_path, capsys):
    (tmp_path / "there").write_text("kept")
    for words in (
        ["joined", "--answer", str(tmp_path / "there")],
        ["joined", "--answer", str(tmp_path / "absent/answer")],
        ["joined", "--folder", str(tmp_path)],
        ["files"],
        ["joined", "--timeout_s", "nan"],
        ["others"],
    ):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith("error: "), words
    assert (tmp_path / "there").read_text() == "kept"


def test_a_folder_that_cannot_be_written_is_a_finding(tmp_path):
    code = main(["files", "--folder", str(tmp_path / "absent"), "--answer", str(tmp_path / "answer.json")])
    [finding] = read(tmp_path)
    assert (code, finding.word) == (1, "WRONG")
    assert "cannot write in" in finding.measured


def test_findings_are_read_as_they_were_written_and_nothing_else_is(tmp_path):
    findings = [Finding("joined", "ok", "two ranks", "", {"ranks": [{"host": "a"}]}), Finding("speed", "SLOW", "rank 1", "look")]
    write_findings(tmp_path / "found.json", findings)
    assert read_findings(tmp_path / "found.json") == findings
    row = json.loads((tmp_path / "found.json").read_text())[0]
    for text in (
        "",
        "{}",
        "[1]",
        "[" * 100_000,
        *(json.dumps([each]) for each in (row | {"word": "fine"}, row | {"more": 1}, row | {"check": 1})),
    ):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UserError, match="is not a list of findings"):
            read_findings(tmp_path / "other.json")
    os.mkfifo(tmp_path / "fifo")
    for name in ("absent", "fifo"):
        with pytest.raises(UserError, match="cannot be read"):
            read_findings(tmp_path / name)


def test_a_file_that_an_editor_keeps_or_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    def hash_all():
        return source.hash_files(tmp_path, tmp_path.rglob("*.py"))

    (tmp_path / "one.py").write_text("1")
    first = hash_all()
    (tmp_path / ".#one.py").symlink_to("user@host.1234")
    assert hash_all() == first
    (tmp_path / "two.py").symlink_to("nowhere")
    second = hash_all()
    (tmp_path / "one.py").write_text("2")
    assert len({first, second, hash_all()}) == 3
