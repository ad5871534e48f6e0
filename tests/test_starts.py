"""Each way to start, and how many processes it was asked for: so many train, or the start is refused. None trains in a smaller world."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster import ROOT
from processes import TINY

from mnist_dist.asked import Asked, _read_options, list_ancestors
from mnist_dist.errors import UserError
from mnist_dist.world import count_usable_cores, find_world

SIZES = [1, 2, 4]
MPI = {"openmpi": ["mpirun.openmpi", "--oversubscribe"], "mpich": ["mpirun.mpich"]}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI", "MPI_", "ACCELERATE_")

# Stands for the training: says its world, without the seconds of torch, and does what the test asks for.
PROBE = """
import os, signal, sys, time
if "RANK" in os.environ:
    time.sleep(float(os.environ.get("LATE_S", "0")))  # signals come before the handlers
from mnist_dist.preemption import StopSignals
signals = StopSignals()
if "RANK" in os.environ:
    signals.defer(False)
signals.install()
from mnist_dist.errors import UserError
from mnist_dist.starter import find_size, start_ranks
from mnist_dist.world import find_world
try:
    size, alone = find_size(os.environ)
    if alone:
        status = start_ranks(size, signals)
        assert "torch" not in sys.modules
        sys.exit(status)
    world = find_world(os.environ)
except UserError as error:
    print("refused:", error)
    sys.exit(2)
place = f"local {world.local_rank} of {world.local_size} at {world.address}:{world.port}"
print(f"rank {world.rank} of {world.size} {place}\\n", end="", flush=True)
exec(sys.argv[1])
"""
# Stands for `accelerate launch`, which takes three seconds: one process, as it starts without GPUs.
ACCELERATE = """
import subprocess, sys
program = next(index for index, word in enumerate(sys.argv) if word.endswith(".py"))
process = subprocess.Popen([sys.executable, *sys.argv[program:]])
process.wait()
sys.exit(process.returncode)
"""


def make_environ(**variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**clean, **root, "PYTHONPATH": str(ROOT), "HF_HOME": "/nonexistent", **variables}


@pytest.fixture
def probe(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "accelerate").write_text(ACCELERATE)
    return [str(tmp_path / "probe.py")]


def accelerate(tmp_path, *options):
    return [sys.executable, str(tmp_path / "accelerate"), "launch", *map(str, options)]


def run(command, **variables):
    return subprocess.run(command, env=make_environ(**variables), text=True, capture_output=True, timeout=120)


def check_ranks(output, size):
    """All ranks of a world of `size` are there, once, and agree on where they meet; its port."""
    found = sorted(re.findall(r"^rank (\d+) of (\d+) local (\d+) of (\d+) at (.*)$", output, re.MULTILINE))
    assert [row[:4] for row in found] == [(str(rank), str(size), str(rank), str(size)) for rank in range(size)], output
    assert len({row[4] for row in found}) == 1
    return int(found[0][4].split(":")[1])


@pytest.mark.parametrize("size", SIZES)
def test_accelerate_launch_becomes_as_many_processes_as_it_was_asked_for(tmp_path, probe, size):
    done = run([*accelerate(tmp_path, "--cpu", "--num_processes", size), *probe, ""])
    assert done.returncode == 0, done
    port = check_ranks(done.stdout, size)
    assert done.stderr.count(f"one process of the {size} asked for") == (size > 1)
    assert size == 1 or 10_000 <= port < 32_768


def test_ranks_that_are_started_with_a_full_disk_for_the_log_keep_their_exit_status(tmp_path, probe):
    with open("/dev/full", "w") as full:
        command = [*accelerate(tmp_path, "--cpu", "--num_processes", 2), *probe, ""]
        environ = make_environ(PYTHONUNBUFFERED="")  # as most start it
        done = subprocess.run(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=full, timeout=120)
    assert done.returncode == 0, done
    check_ranks(done.stdout, 2)


@pytest.mark.parametrize("size", SIZES)
def test_accelerates_own_file_says_how_many_processes_there_are(tmp_path, probe, size):
    folder = tmp_path / "cache/accelerate"
    folder.mkdir(parents=True)
    text = f"compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: {size}\nuse_cpu: true\n"
    (folder / "default_config.yaml").write_text(text)
    options, home = ([], tmp_path / "cache") if size != 2 else (["--config_file", folder / "default_config.yaml"], "/nonexistent")
    done = run([*accelerate(tmp_path, *options), *probe, ""], HF_HOME=str(home))
    check_ranks(done.stdout, size)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ("--num_processes 2", Asked(2)),
        ("--num-processes=3 --num_processes=2", Asked(2)),
        ("--num_p 2 --cpu", Asked(2)),
        ("-m mnist_dist.train --num_processes 2", Asked()),  # the program's own
        ("-m mnist_dist.train --config {file}", Asked()),
        ("--no_python python -m mnist_dist.train --config {file}", Asked()),
        ("--config_file {file}", Asked(4, 2)),
        ("--config={file} --cpu", Asked(4, 2)),
        ("--config_file {file} --num_processes 2 --num_machines 1", Asked(2)),
        ("--config_file {json}", Asked(8)),
        ("--config_file {odd}", None),
        ("--config_file {missing}", None),
        ("--config_file {odd} --num_processes 2", Asked(2)),
        ("--num_processes x", Asked()),
        ("--num_processes", Asked()),
    ],
)
def test_what_accelerate_was_asked_for_is_read_as_it_reads_it(tmp_path, options, asked):
    files = {"file": "num_processes: 4\nnum_machines: 2\n", "json": '{"num_processes": 8, "x": [1, {"y": null}]}'}
    files |= {"odd": "num_processes: !!python/object/apply:os.getpid []\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    words = options.format(**{name: tmp_path / name for name in ("file", "json", "odd", "missing")}).split()
    assert _read_options(words, {"HF_HOME": "/nonexistent"}) == asked


@pytest.mark.parametrize(
    "content", [b"num_processes: [1", b"\xff\xfe", b"- 1\n", b"a: &a [*a]\nnum_processes: 2\nb: 1\nb: 2\n", b"x: " + b"1" * 9999, None]
)
def test_an_odd_file_of_accelerates_fails_nothing(tmp_path, probe, content):
    file = tmp_path / "odd.yaml"
    os.mkfifo(file) if content is None else file.write_bytes(content)
    one = run([*accelerate(tmp_path, "--config_file", file), *probe, ""])
    check_ranks(one.stdout, 1)
    # Where Accelerate was asked for several it names a port: the number is unknown, and one is too few.
    several = run([*accelerate(tmp_path, "--config_file", file), *probe, ""], **MEETING)
    assert several.returncode == 2
    assert "how many cannot be read" in several.stdout


MEETING = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_several_machines_are_not_made_of_one(tmp_path, probe):
    done = run([*accelerate(tmp_path, "--num_processes", 4, "--num_machines", 2), *probe, ""])
    assert (done.returncode, done.stdout.count("4 processes on 2 machines")) == (2, 1)


WAIT = "while not signals.received: time.sleep(0.01)\ntime.sleep(0.3)\n"


def start(tmp_path, probe, action, size=2, **options):
    command = [*accelerate(tmp_path, "--cpu", "--num_processes", size), *probe, action]
    environ = make_environ(LATE_S="0.5" if action.startswith(WAIT) else "0")
    return subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def find_child(pid):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)
    raise AssertionError(f"{pid} has started nothing")


def wait_for_line(stream, text):
    for line in stream:
        if text in line:
            return
    raise AssertionError(f"no {text!r}")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_reaches_every_rank_once_even_before_its_handlers(tmp_path, probe, number):
    # A second Ctrl-C would end the rank with 130.
    action = WAIT + "print(f'got {int(signals.received)}\\n', end=''); sys.exit(7 + world.rank)"
    process = start(tmp_path, probe, action)
    wait_for_line(process.stderr, "asked for")
    os.kill(find_child(process.pid), number)
    output, _ = process.communicate(timeout=60)
    stop = {signal.SIGUSR1: 1, signal.SIGUSR2: 1, signal.SIGTERM: 2, signal.SIGHUP: 2, signal.SIGINT: 3}[number]
    assert (process.returncode, output.count(f"got {stop}")) == (8, 2)


def test_ctrl_c_on_the_terminal_counts_once(tmp_path, probe):
    action = WAIT + "open('counted', 'a').write('once '); sys.exit(9)"
    process = start(tmp_path, probe, action, start_new_session=True, cwd=tmp_path)
    wait_for_line(process.stdout, "rank")
    starter = find_child(process.pid)
    os.killpg(os.getpgid(starter), signal.SIGINT)  # as the terminal does: to its whole foreground group
    process.communicate(timeout=60)  # Accelerate itself ends of it
    wait_until_none_is_left(tmp_path)
    assert (tmp_path / "counted").read_text() == "once once "  # a rank that had heard it twice would have ended at once


@pytest.mark.parametrize(
    ("action", "status"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(85 if world.rank else 0)", 85),
        ("sys.exit((3, 1)[world.rank])", 3),
        ("os.kill(os.getpid(), 9 if world.rank else 0)", 137),
        ("os.kill(os.getpid(), 11)", 139),
    ],
)
def test_the_exit_status_is_the_one_of_srun(tmp_path, probe, action, status):
    process = start(tmp_path, probe, action)
    process.communicate(timeout=60)
    assert process.returncode == status


def find_left(tmp_path):
    """The processes of the probe that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(tmp_path).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(path)
        except OSError:
            continue
    return found


def wait_until_none_is_left(tmp_path):
    end = time.monotonic() + 60
    while find_left(tmp_path):
        assert time.monotonic() < end, find_left(tmp_path)
        time.sleep(0.02)


def test_a_rank_that_is_lost_takes_the_others_with_it_after_a_while(tmp_path, probe):
    (tmp_path / "probe.py").write_text(
        PROBE.replace("from mnist_dist.world", "import mnist_dist.starter as s; s._GRACE_S = 0.3\nfrom mnist_dist.world")
    )
    process = start(tmp_path, probe, "os.kill(os.getpid(), 9) if world.rank else time.sleep(60)")
    process.communicate(timeout=60)
    assert process.returncode == 137
    assert not find_left(tmp_path)


def test_the_ranks_end_with_the_process_that_started_them(tmp_path, probe):
    process = start(tmp_path, probe, "time.sleep(60)")
    for _ in range(2):
        wait_for_line(process.stdout, "rank")
    os.kill(find_child(process.pid), signal.SIGKILL)
    wait_until_none_is_left(tmp_path)
    process.communicate(timeout=60)


def test_a_mistake_in_the_options_is_one_message(tmp_path, probe):
    (tmp_path / "train.py").write_text("import sys\nfrom mnist_dist.train import main\nsys.exit(main())\n")
    for options, words in (
        ([*TINY, "--batch_size", "1"], "less than the 2 processes"),
        ([*TINY, "--world_size", "3"], "but 3 was asked for"),
    ):
        done = run([*accelerate(tmp_path, "--cpu", "--num_processes", 2), str(tmp_path / "train.py"), *options])
        assert (done.returncode, done.stderr.count("error: "), done.stderr.count(words)) == (2, 1, 1), done.stderr


def test_a_program_that_calls_ours_is_not_started_again(tmp_path, probe):
    (tmp_path / "mine.py").write_text(
        "import sys\nfrom mnist_dist.train import main\nprint('begun', flush=True)\nsys.exit(main(sys.argv[1:]))\n"
    )
    done = run([*accelerate(tmp_path, "--cpu", "--num_processes", 2), str(tmp_path / "mine.py"), *TINY])
    assert (done.returncode, done.stdout.count("begun")) == (2, 1)
    assert "asked for 2 processes but started one" in done.stderr


def list_mpi(kind):
    if shutil.which(MPI[kind][0]) is None:
        pytest.skip(f"{MPI[kind][0]} is not installed")
    return MPI[kind]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MPI)
def test_mpirun_starts_as_many_as_it_was_asked_for(probe, kind, size):
    command = [*list_mpi(kind), "-n", str(size), sys.executable, *probe, ""]
    first = run(command)
    assert first.returncode == 0, first
    port = check_ranks(first.stdout, size)
    if size > 1:  # a script between, and MPICH's ranks still agree; and another job has another port
        script = [*list_mpi(kind), "-n", str(size), "sh", "-c", f"'{sys.executable}' {probe[0]} ''; true"]
        assert check_ranks(run(script).stdout, size) != port


def test_a_rank_left_in_the_environment_makes_no_world_of_one(probe):
    left = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9999"}
    for variables in ({"PMI_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}, SRUN):
        with pytest.raises(UserError, match="has 2 tasks, but torchrun says that there are 1"):
            find_world(left | variables)


OMPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
JOB = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "n[1-2]"}
SRUN = JOB | STEP | {"SLURM_NTASKS": "2", "SLURM_NNODES": "2"}


def test_mpi_on_several_hosts_must_be_told_where_to_meet():
    for variables in (OMPI | {"PMIX_NAMESPACE": "1@2"}, PMI):
        with pytest.raises(UserError, match=r"several hosts, and MASTER_ADDR .*must say where"):
            find_world(variables)
        # What accelerate launch sets where nobody chose is this host.
        with pytest.raises(UserError, match="several hosts"):
            find_world(variables | MEETING)
        world = find_world(variables | {"MASTER_ADDR": "n1", "MASTER_PORT": "6"})
        assert (world.rank, world.size, world.local_rank, world.local_size, world.address, world.port) == (3, 4, 1, 2, "n1", 6)
    assert find_world(OMPI | {"PMIX_NAMESPACE": "1@2", "MASTER_ADDR": "n1"}).port > 10_000
    with pytest.raises(UserError, match="and MASTER_PORT must say"):
        find_world(PMI | {"MASTER_ADDR": "n1"})


def test_mpirun_within_slurm_is_not_taken_for_srun():
    # Slurm's variables are those of the one daemon of each host.
    world = find_world(SRUN | OMPI | {"MASTER_ADDR": "n1", "PMIX_NAMESPACE": "5"})
    assert (world.rank, world.size, world.launcher) == (3, 4, "mpirun")
    assert find_world(SRUN | {"PMI_RANK": "1", "PMI_SIZE": "2"}).launcher == "srun"  # --mpi=pmi2


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (JOB | {"SLURM_NTASKS": "4"}, "4 tasks, but this process is not one of them"),
        (JOB | {"SLURM_NNODES": "2"}, "2 tasks, but this process is not one of them"),
        (SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, "not one of them"),  # the shell of salloc
        (SRUN | {"SLURM_NTASKS": "4"}, "4 tasks, but srun says that there are 2"),
        (SRUN | {"SLURM_NNODES": "3"}, "3 tasks, but srun says that there are 2"),
        (SRUN | {"SLURM_HET_SIZE": "2"}, "heterogeneous"),
        (SRUN | {"SLURM_DISTRIBUTION": "arbitrary"}, "set MASTER_ADDR"),
        (SRUN | {"SLURM_PROCID": "0"}, "set MASTER_ADDR"),
    ],
)
def test_a_part_of_a_slurm_job_is_refused(environ, words):
    with pytest.raises(UserError, match=words):
        find_world(environ)


def test_rank_zero_is_where_slurm_put_it(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# the order of the ranks\n n2*1\nn1\n")
    arbitrary = SRUN | {"SLURM_DISTRIBUTION": "arbitrary", "SLURM_HOSTFILE": str(hosts)}
    assert find_world(arbitrary | {"SLURM_NODEID": "0"}).address == "n2"
    assert find_world(arbitrary | {"SLURM_PROCID": "0", "SLURMD_NODENAME": "n2"}).address == "n2"
    with pytest.raises(UserError, match="set MASTER_ADDR"):  # the file was changed since
        find_world(arbitrary | {"SLURM_PROCID": "0", "SLURMD_NODENAME": "n1"})
    assert find_world(SRUN).address == "n1"
    assert find_world(SRUN | {"SLURM_DISTRIBUTION": "arbitrary", "MASTER_ADDR": "n2"}).address == "n2"
    assert find_world(SRUN | MEETING).address == "n1"  # accelerate launch as the task


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["torchrun", "accelerate", "accelerate with mpirun", *MPI])
def test_each_way_trains_with_as_many_as_it_was_asked_for(tmp_path, way, size):

    python, count = sys.executable, str(size)
    launch = [python, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--num_processes", count]
    (tmp_path / "hosts").write_text(f"localhost slots={size}\n")
    if way == "torchrun":
        command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    elif way.startswith("accelerate"):
        mpirun = shutil.which("mpirun")
        version = subprocess.run([mpirun, "--version"], text=True, capture_output=True).stdout if mpirun else ""
        if way != "accelerate" and "Open MPI" not in version:
            pytest.skip("mpirun is not installed, or not that of Open MPI")
        if way != "accelerate" and size > count_usable_cores():
            pytest.skip("Accelerate lets mpirun bind each process to a core of its own, and refuses more")
        command = launch if way == "accelerate" else [*launch, "--mpirun_hostfile", str(tmp_path / "hosts")]
    else:
        command = [*list_mpi(way), "-n", count, python]
    bound = {"OMPI_MCA_hwloc_base_binding_policy": "none", "OMPI_MCA_rmaps_base_oversubscribe": "1"}  # more ranks than cores here
    done = subprocess.run(
        [*command, "-m", "mnist_dist.train", *TINY, "--run_dir", str(tmp_path / "run")],
        env=make_environ(**bound),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["world_size"] == size
    assert done.stderr.strip().splitlines()[-1].startswith("[rank 0] finished" if size > 1 else "finished")


def test_the_ancestors_that_can_be_seen_are_listed(monkeypatch):
    parent = os.getppid()
    assert list_ancestors()[0] == parent
    seen = {parent: 71, 71: 72}  # the parent of 72, another user's, is told to nobody

    class Process:
        def __init__(self, pid):
            self.pid = pid

        def ppid(self):
            if self.pid not in seen:
                raise psutil.AccessDenied(self.pid)
            return seen[self.pid]

    monkeypatch.setattr(psutil, "Process", Process)
    assert list_ancestors() == [parent, 71, 72]
    seen[71] = 0  # of a container, whose first process has none
    assert list_ancestors() == [parent, 71]
