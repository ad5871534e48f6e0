import logging
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from cluster import ROOT

# Before anything starts a process: no test may write the user's own list of tasks that were named.
_state = tempfile.TemporaryDirectory(prefix="mnist-dist-state-")
os.environ["XDG_STATE_HOME"] = _state.name
# Without this variable the tests are of the CPU, also where there is a GPU: their ranks could not share it.
if os.environ.get("TEST_ON_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Nor does one inherit that signals are ignored, as under nohup or in the background of a shell: what is caught here is not so there.
for _number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """What a test computes by itself has one thread: beside other tests, two that wait for each other take many times as long."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def handlers():
    """A program that a test calls within this process leaves its handlers of signals: the next test must not be ended by them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def log_lines():
    """Nor does a program that sent its log lines to standard error keep those of the next test from pytest."""
    log = logging.getLogger("mnist_dist")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before


@pytest.fixture(scope="session")
def daemons():
    folder = f"/tmp/slurm-test-{os.getpid()}"
    # Each of pytest-xdist's workers has a cluster of its own: of each, slurmctld and three nodes.
    port = 31_700 + 4 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    environ = {**os.environ, "DEV_CLUSTER_PORT": str(port), "DEV_CLUSTER_DIR": folder, "SLURM_CONF": f"{folder}/slurm.conf"}
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON"):
        environ.pop(name, None)
    script = str(ROOT / "slurm/dev_cluster.sh")
    try:
        subprocess.run([script, "up"], env=environ, check=True, timeout=180)
        subprocess.run([script, "status"], env=environ, check=True, timeout=60)
        yield environ
    finally:
        subprocess.run([script, "down"], env=environ, check=True, timeout=120)
    assert not Path(folder).exists()
    assert subprocess.run([script, "status"], env=environ, timeout=60).returncode == 1


@pytest.fixture
def cluster(daemons):
    """The environment of Slurm's commands. However a test ends, it leaves no job on the cluster: the next would wait for its nodes."""
    yield daemons
    subprocess.run(["scancel", f"--user={os.getuid()}"], env=daemons, check=True, timeout=60)
    end = time.monotonic() + 60
    while jobs := subprocess.run(["squeue", "--noheader"], env=daemons, check=True, text=True, capture_output=True, timeout=60).stdout:
        assert time.monotonic() < end, jobs
        time.sleep(0.2)
