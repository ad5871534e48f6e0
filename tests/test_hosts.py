"""Runs over several hosts, for which network namespaces stand. On each, its own name is 127.0.1.1, as on many a Debian."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import making_hosts
from processes import TINY, Train, run_ranks
from safetensors.torch import load_file

from mnist_dist.finding import read_findings

pytestmark = pytest.mark.hosts

LONG = [*TINY, "--steps", "50000", "--log_every", "1"]


@pytest.fixture(scope="module")
def hosts():
    with making_hosts(f"md{os.getpid() % 10_000}", 2) as hosts:
        yield hosts


def finish(processes, timeout_s=120):
    end = time.monotonic() + timeout_s
    texts = [process.communicate(timeout=max(1, end - time.monotonic()))[0] for process in processes]
    return [process.returncode for process in processes], texts


def compare(folder, expected):
    weights, other = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert weights.keys() == other.keys()
    assert max(float((weights[name] - other[name]).abs().max()) for name in weights) < 1e-5


def test_two_hosts_train_to_the_weights_of_one_process(hosts, tmp_path):
    run_ranks(tmp_path, Train([*TINY, "--run_dir", str(tmp_path / "one")]))
    for per_host in (1, 2):
        folder = tmp_path / f"run{per_host}"
        codes, texts = finish(hosts.start_ranks([*TINY, "--run_dir", str(folder)], 29_513, per_host))
        assert codes == [0] * 2 * per_host, texts
        compare(folder, tmp_path / "one")
        assert '"nodes": 2' in (folder / "result.json").read_text()
        assert "error" not in "".join(texts)


def test_torchrun_on_two_hosts(hosts, tmp_path):
    run_ranks(tmp_path, Train([*TINY, "--run_dir", str(tmp_path / "one")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", hosts.names[0], "--master-port", "29514"]
    program = ["-m", "mnist_dist.train", *TINY, "--run_dir", str(tmp_path / "run")]
    codes, texts = finish([hosts.start(name, *command, "--node-rank", str(node), *program) for node, name in enumerate(hosts.names)])
    assert codes == [0, 0], texts
    compare(tmp_path / "run", tmp_path / "one")


def test_the_networks_that_a_user_names_are_taken(hosts, tmp_path):
    command = [sys.executable, "-m", "mnist_dist.train", *TINY, "--run_dir", str(tmp_path / "run"), "--timeout_s", "5"]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": hosts.names[0], "MASTER_PORT": "29515"}
    ranks = [hosts.start(name, *command, **world, RANK=str(rank), GLOO_SOCKET_IFNAME="lo") for rank, name in enumerate(hosts.names)]
    codes, texts = finish(ranks)
    assert codes == [1, 1], texts  # by lo, the hosts do not reach each other
    assert not any("Traceback" in text for text in texts), texts


def test_a_killed_host_is_named_by_rank_and_host(hosts, tmp_path):
    for rank in (1, 0):
        folder = tmp_path / f"run{rank}"
        ranks = hosts.start_ranks([*LONG, "--run_dir", str(folder)], 29_516 + rank)
        end = time.monotonic() + 90
        while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_bytes()) < 500:
            assert time.monotonic() < end
            time.sleep(0.1)
        ranks[rank].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        codes, texts = finish([ranks[1 - rank]], 30)
        assert time.monotonic() - begun < 25
        assert codes == [1]
        gone = f"error: rank {rank} on host {hosts.names[rank]} is gone and left no reason (killed, or the node went down)"
        assert texts[0].strip().endswith(gone), texts
        ranks[rank].wait(60)


def test_who_did_not_come_is_named_with_the_hosts_that_did(hosts, tmp_path):
    ranks = hosts.start_ranks([*TINY, "--run_dir", str(tmp_path / "run"), "--timeout_s", "20"], 29_518, 2)
    ranks[2].kill()
    codes, texts = finish([rank for number, rank in enumerate(ranks) if number != 2])
    assert codes == [1, 1, 1], texts
    came = f"rank 2 of 4 did not come; ranks 0-1 on host {hosts.names[0]}, rank 3 on host {hosts.names[1]} came"
    assert all(came in text for text in texts), texts
    ranks[2].wait(60)


def test_a_rank_zero_that_is_not_at_its_address_is_told(hosts, tmp_path):
    arguments = [*TINY, "--run_dir", str(tmp_path / "run"), "--timeout_s", "6"]
    codes, texts = finish(hosts.start_ranks(arguments, 29_519, main=hosts.names[1]))
    assert codes == [1, 1], texts
    assert f"no address of this host is MASTER_ADDR, {hosts.names[1]}, where the others look for rank zero" in texts[0]
    assert "rank zero is not there (Connection refused)" in texts[1]


def test_a_name_server_that_is_silent_is_told(tmp_path):
    with making_hosts(f"mn{os.getpid() % 10_000}", 2) as hosts:
        for name in hosts.names:
            (Path("/etc/netns") / name / "resolv.conf").write_text("nameserver 10.213.77.200\n")
            hosts.lose(name, "10.213.77.200")
        codes, texts = finish(hosts.start_ranks([*TINY, "--run_dir", str(tmp_path / "run")], 29_524))
        assert codes == [0, 0], texts
        told = re.search(r"torch took \d+ s to open its store, .*/etc/resolv.conf", texts[0])
        assert told, texts


def probe(hosts, check, *options, port):
    ranks = []
    for rank, name in enumerate(hosts.names):
        world = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(hosts.names)), "LOCAL_WORLD_SIZE": "1"}
        world |= {"MASTER_ADDR": hosts.names[0], "MASTER_PORT": str(port)}
        ranks.append(hosts.start(name, sys.executable, "-m", "mnist_dist.probe", check, *options, **world))
    return finish(ranks)


def test_a_port_blocked_between_two_hosts_is_named_with_both_and_without_it_all_is_well(tmp_path):
    with making_hosts(f"mp{os.getpid() % 10_000}", 3) as hosts:
        codes, texts = probe(hosts, "exchange", "--answer", str(tmp_path / "well.json"), port=29_520)
        assert codes == [0, 0, 0], texts
        assert "3 pairs in turn" in read_findings(tmp_path / "well.json")[0].measured
        one, other = hosts.names[1:]
        hosts.lose(one, hosts.addresses[other])
        begun = time.monotonic()
        codes, texts = probe(hosts, "exchange", "--answer", str(tmp_path / "blocked.json"), port=29_521)
        assert time.monotonic() - begun < 100
        assert codes == [1, 1, 1], texts
        [finding] = read_findings(tmp_path / "blocked.json")
        assert finding.word == "WRONG"
        assert f"rank 1 on host {one} does not reach rank 2 on host {other} at {hosts.addresses[other]}:" in finding.measured


def test_large_packets_that_get_lost_in_one_direction_are_named_by_the_pair_in_time(tmp_path):
    with making_hosts(f"ml{os.getpid() % 10_000}", 2) as hosts:
        one, other = hosts.names
        # The first host says that it takes long packets, and the switch, which knows better, drops them and tells nobody.
        for words in (
            ["link", "set", f"{other}v", "mtu", "3000"],
            ["-n", other, "link", "set", "eth7", "mtu", "3000", "gso_max_segs", "1"],
            ["-n", one, "route", "replace", "10.213.77.0/24", "dev", "eth7", "advmss", "2900"],
        ):
            subprocess.run(["ip", *words], check=True, timeout=60)
        begun = time.monotonic()
        codes, texts = probe(hosts, "exchange", "--answer", str(tmp_path / "lost.json"), port=29_522)
        assert time.monotonic() - begun < 60
        assert codes == [1, 1], texts
        [finding] = read_findings(tmp_path / "lost.json")
        assert f"rank 1 on host {other} does not reach rank 0 on host {one} at {hosts.addresses[one]}:" in finding.measured
        # A rank that is out of reach with all that is long ends as the others do, though what it has to send is never taken.
        command = [sys.executable, "-m", "mnist_dist.verify", "--timeout_s", "10"]
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": one, "MASTER_PORT": "29523"}
        codes, texts = finish([hosts.start(name, *command, **world, RANK=str(rank)) for rank, name in enumerate(hosts.names)])
        assert codes == [1, 1], texts
        assert all(text.count("error: ") == 1 and "terminate" not in text for text in texts), texts
