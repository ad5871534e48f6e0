import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from processes import TINY, Train, find_free_port, run_ranks, start_ranks

from mnist_dist import distributed, machine
from mnist_dist.config import configure
from mnist_dist.distributed import join_group
from mnist_dist.errors import RunError, UserError
from mnist_dist.world import MPI_VARIABLES, RANK_VARIABLES, World, choose_threads, count_usable_cores, find_world, first_host, ignore_job

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
}
SUBMITIT = {"SUBMITIT_LOCAL_JOB_ID": "9", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1"}


def test_ranks_come_from_the_launcher():
    assert find_world({}) == World(0, 1, 0, 1)
    assert find_world(TORCHRUN) == World(3, 4, 1, 2, "torchrun", "a", 5)
    srun = find_world(SRUN)
    assert (srun.rank, srun.size, srun.local_rank, srun.local_size, srun.address) == (3, 5, 1, 2, "gpu07")
    assert find_world(SRUN | {"SLURM_NODEID": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "0"}).local_size == 1
    assert srun.unchosen == ("MASTER_ADDR", "MASTER_PORT")
    assert find_world(SRUN | {"MASTER_ADDR": "b", "MASTER_PORT": "6"}).address == "b"
    assert find_world(SRUN | {"MASTER_ADDR": "b", "MASTER_PORT": "6"}).unchosen == ()
    assert find_world(SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | TORCHRUN).launcher == "torchrun"  # one for each of two nodes
    submitit = find_world(SUBMITIT)
    assert (submitit.rank, submitit.size, submitit.local_rank, submitit.local_size) == (1, 2, 1, 2)


def test_slurm_says_how_many_threads_a_task_has(monkeypatch):
    monkeypatch.setattr("mnist_dist.world.count_usable_cores", lambda: 16)  # the node's, or the task's own
    for cpus, threads in (("", 8), ("3", 3), ("16", 16), ("64", 16)):
        assert choose_threads(find_world(SRUN | {"SLURM_CPUS_PER_TASK": cpus})) == threads


def test_a_task_with_a_gpu_of_its_own_calls_it_number_zero(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    task = find_world(SRUN)
    assert machine.choose_device(configure(), task) == "cuda"
    variables = distributed._choose_variables(task, "cuda", 1)
    assert (task.local_rank, variables["LOCAL_RANK"], variables["RANK"]) == (1, "0", "3")
    assert "LOCAL_RANK" not in distributed._choose_variables(World(), "cuda", 1)  # or Accelerate would look for other processes
    assert machine.choose_gpu(find_world(SUBMITIT)) == 0
    assert machine.identify_gpu(find_world(SUBMITIT)) == ""  # there is none here


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 9654\n\nprocessor\t: 1\nmodel name\t: AMD EPYC 9654\n", "AMD EPYC 9654"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n", ", CPU implementer 0x41, CPU part 0xd4f"),
    ],
)
def test_a_processor_is_named_by_its_model_also_on_arm(tmp_path, monkeypatch, text, name):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    assert machine.find_processor().endswith(name)


@dataclass(frozen=True)
class TrainOnOtherProcessor(Train):
    """Ranks of which each has a processor of its own kind, but for the last two."""

    def __call__(self):
        machine.find_processor = lambda: f"kind {min(int(os.environ['RANK']), 1)}"
        return super().__call__()


def test_a_start_notes_the_processors_of_all_ranks(tmp_path):
    run_ranks(tmp_path, TrainOnOtherProcessor([*TINY, "--steps", "1", "--run_dir", str(tmp_path / "run")]), 3)
    assert json.loads((tmp_path / "run/starts.jsonl").read_text())["processor"] == "kind 0; kind 1"


def test_a_run_leaves_the_settings_of_torch_as_they_were():
    def read():
        cudnn = torch.backends.cudnn
        mode = torch.get_deterministic_debug_mode()
        fills = torch.utils.deterministic.fill_uninitialized_memory
        return mode, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, fills, torch.get_float32_matmul_precision()

    before = read()
    for device in ("cpu", "cuda"):
        with machine.repeating_bits(device):
            assert read() == (1, True, False, False, False, "highest")
            assert torch.backends.cuda.flash_sdp_enabled() == torch.backends.cuda.cudnn_sdp_enabled() == (device == "cpu")
            assert torch.backends.cuda.math_sdp_enabled()
        assert read() == before == (0, False, False, True, True, "highest")
        assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("name", ["fp32_precision", "cuda.matmul.fp32_precision", "cudnn.conv.fp32_precision"])
def test_a_task_may_have_set_the_precision_by_torchs_newer_names(name):
    owner, _, setting = f"torch.backends.{name}".rpartition(".")
    owner = functools.reduce(getattr, owner.split(".")[1:], torch)
    chosen = "tf32" if name != "cudnn.conv.fp32_precision" else "ieee"
    cudnn = torch.backends.cudnn
    try:
        setattr(owner, setting, chosen)
        cudnn.benchmark = True
        with machine.repeating_bits("cuda"):
            assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark) == ("ieee", "ieee", False)
            with cudnn.flags(enabled=False):  # which some of torch's code does, and which fails where its names contradict each other
                pass
        assert getattr(owner, setting) == chosen
        assert cudnn.benchmark
    finally:
        setattr(owner, setting, "none")
        cudnn.allow_tf32, cudnn.benchmark = True, False


@pytest.mark.slow
def test_float32_means_float32_though_the_environment_says_otherwise():
    program = """import torch
from mnist_dist.machine import repeating_bits
found = [torch.get_float32_matmul_precision()]
with repeating_bits("cpu"):
    found.append(torch.get_float32_matmul_precision())
print(*found, torch.get_float32_matmul_precision())"""
    environ = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    answer = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert answer.stdout.split() == ["high", "highest", "high"], answer.stderr


def test_ports_of_jobs_differ_and_stay_below_the_ephemeral_ones():
    ports = [find_world(SRUN | {"SLURM_JOB_ID": str(job)}).port for job in range(500, 600)]
    assert len(set(ports)) == len(ports)
    assert all(10_000 < port < 32_768 for port in ports)
    assert find_world(SRUN | {"SLURM_STEP_ID": "1"}).port != find_world(SRUN).port


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,9],cpu1", "gpu03"), ("n[7]", "n7"), ("r[1-2]n[3-4],x", "r1n3"), ("a-b[10-12]", "a-b10")],
)
def test_the_first_host_of_slurms_compressed_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, "RANK but not WORLD_SIZE, LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE but not RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK but not RANK, WORLD_SIZE"),
        (dict.fromkeys(TORCHRUN, "1") | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "99999"}, "is 99999; allowed: 1 to 65535"),
        ({name: TORCHRUN[name] for name in TORCHRUN if name != "MASTER_PORT"}, "but not MASTER_PORT"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4"),
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x'"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "local rank 2 of 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "of 8"),
        (SRUN | {"SLURM_LOCALID": ""}, "SLURM_LOCALID is ''"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "start it with srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is ''"),
        (SRUN | TORCHRUN, "5 tasks, but torchrun says that there are 4"),
    ],
)
def test_a_half_set_or_contradictory_environment_is_refused(environ, words):
    with pytest.raises(UserError, match=re.escape(words)):
        find_world(environ)


@pytest.mark.parametrize("name", [*RANK_VARIABLES, *MPI_VARIABLES])
def test_a_variable_that_is_empty_is_none(monkeypatch, name):
    monkeypatch.setenv(name, "")
    with join_group(find_world(os.environ), configure()) as group:
        assert group.size == 1


def test_a_batch_script_of_one_task_is_one_process():
    assert find_world({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).size == 1


def test_a_program_that_may_run_alone_does_so_in_a_job_of_any_size():
    shell = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}  # of a batch script, or of salloc
    assert find_world(ignore_job(shell)) == World()
    assert find_world(ignore_job(SRUN)) == find_world(SRUN)
    with pytest.raises(UserError, match="5 tasks, but torchrun says that there are 4"):
        find_world(ignore_job(SRUN | TORCHRUN))


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed precision fp16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "allowed: 1"),
    ],
)
def test_what_accelerate_was_told_and_we_cannot_do_is_refused(monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words), join_group(World(), configure()):
        pass


def test_a_sum_that_threads_hurry_to_has_the_same_bits_each_time(caplog):
    weights, rows, factors = torch.randn(50, 64, requires_grad=True), torch.randint(0, 50, (20_000,)), torch.randn(20_000, 64)

    def count_results():
        return len({torch.autograd.grad((weights[rows] * factors).sum(), weights)[0].numpy().tobytes() for _ in range(20)})

    threads = torch.get_num_threads()
    try:
        with join_group(World(), configure(threads=4)):
            assert count_results() == 1
            for _ in range(2):
                torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        warnings = [record.getMessage() for record in caplog.records if "threads is" not in record.getMessage()]
        assert warnings == ["torch's put_ does not give the same bits each time: two equal runs may differ"]
        assert count_results() > 1  # else this would show nothing
    finally:
        torch.set_num_threads(threads)


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="device is cuda"), join_group(World(), configure(device="cuda")):
        pass


def test_a_second_rank_that_never_comes_is_waited_for_only_so_long():
    world = World(0, 2, 0, 2, "torchrun", port=find_free_port())
    with pytest.raises(RunError, match=r"rank 0 of 2 could not join .* within 2 s"), join_group(world, configure(timeout_s=2)):
        pass


@dataclass(frozen=True)
class Join:
    """A rank that starts the group and says what came of it."""

    threads: int = 0
    lone: bool = False

    def __call__(self):
        if self.lone:  # the planted fault: Accelerate finds no group, and each rank would train alone
            import accelerate.state

            accelerate.state.PartialState._prepare_backend = lambda *_: (None, accelerate.state.DistributedType.NO)
        try:
            with join_group(find_world(os.environ), configure(threads=self.threads)) as group:
                assert group.broadcast(f"from {group.rank}") == "from 0"
                assert group.on_main(lambda: f"on {group.rank}") == "on 0"
                assert group.sum(torch.tensor(group.rank + 1.0)) == group.size * (group.size + 1) / 2
                print("joined", group.rank, group.size, torch.get_num_threads(), group.precision)
        except UserError as error:
            print("refused:", error)
            return 2


@pytest.mark.parametrize("launched_with", ["1", "64", None])
def test_each_process_takes_its_share_of_the_cores_whatever_the_launcher_set(tmp_path, launched_with):
    environ = {"OMP_NUM_THREADS": launched_with} if launched_with else {}
    for world in (1, 2):
        text = run_ranks(tmp_path, Join(), world, environ)
        assert text.count(f"{world} {max(1, count_usable_cores() // world)} ") == world
        assert "Warning" not in text
    assert " 1 3 " in run_ranks(tmp_path, Join(threads=3), 1, environ)


def test_a_world_of_two_singles_is_refused_by_every_rank(tmp_path):
    text = run_ranks(tmp_path, Join(lone=True), 2, expect=2)
    assert text.count("Accelerate found rank 0 of 1: each process would train alone") == 2


@dataclass(frozen=True)
class Fail:
    """A rank zero whose own work fails."""

    def __call__(self):
        def work():
            raise UserError("the disk of rank zero")

        with join_group(find_world(os.environ), configure()) as group:
            try:
                group.on_main(work)
            except UserError as error:
                print("told:", error)


def test_every_rank_is_told_what_failed_on_rank_zero(tmp_path):
    assert run_ranks(tmp_path, Fail(), 3).count("told: the disk of rank zero") == 3


def test_a_world_that_was_not_asked_for_is_refused_before_any_file_is_opened(tmp_path):
    from processes import TINY, Train

    folder = tmp_path / "run"
    text = run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder), "--world_size", "3"]), 2, expect=2)
    assert text.count("world_size is 2, but 3 was asked for") == 2
    text = run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder), "--batch_size", "1"]), 2, expect=2)
    assert text.count("batch_size is 1, less than the 2 processes") == 2
    assert not folder.exists()


@pytest.mark.parametrize("option", ["--seed", "--log_every", "--evaluate_every"])
def test_ranks_that_were_given_different_options_are_refused(tmp_path, option):
    from processes import TINY, Train

    port = str(find_free_port())
    ranks = []
    for rank in range(2):
        environ = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        work = Train([*TINY, "--run_dir", str(tmp_path / "run"), option, str(rank + 1)])
        ranks += start_ranks(tmp_path / str(rank), work, 1, {name: str(value) for name, value in environ.items()})
    assert [rank.wait() != 0 for rank in ranks] == [True, True]
    assert f"this rank has other options than rank zero ({option.removeprefix('--')})" in ranks[1].text


@dataclass(frozen=True)
class PretendGpus(Train):
    """Ranks that find a GPU each, by these names of one letter: a space is one whose name is not known, and - is none."""

    names: str

    def __call__(self):
        distributed.choose_device = lambda _, world: "cpu" if self.names[world.rank] == "-" else "cuda"
        distributed.choose_gpu = lambda _: 0
        distributed.identify_gpu = lambda world: self.names[world.rank].strip()
        return super().__call__()


@pytest.mark.parametrize(("names", "sharing"), [("aba", "ranks 0, 2"), ("abb", "ranks 1-2"), ("aaa", "ranks 0-2")])
def test_ranks_that_have_the_same_gpu_are_named_on_every_rank(tmp_path, names, sharing):
    text = run_ranks(tmp_path, PretendGpus([*TINY, "--run_dir", str(tmp_path / "run"), "--timeout_s", "20"], names), 3, expect=2)
    assert text.count(f"{sharing} on host {platform.node()} have the same GPU; allowed: at most one process for each GPU") == 3
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("names", "environ"), [("abc", {}), ("   ", {}), ("aaa", {"NCCL_MULTI_RANK_GPU_ENABLE": "1"})])
def test_ranks_with_a_gpu_each_or_that_may_share_one_go_on(tmp_path, names, environ):
    work = PretendGpus([*TINY, "--run_dir", str(tmp_path / "run"), "--timeout_s", "20"], names)
    text = run_ranks(tmp_path, work, 3, environ, expect=1)  # NCCL finds none here
    assert "the same GPU" not in text


@pytest.mark.parametrize(("names", "without"), [("-bc", 0), ("ab-", 2)])
def test_a_rank_without_the_gpu_that_the_others_have_is_named_on_every_rank(tmp_path, names, without):
    begun = time.monotonic()
    work = PretendGpus([*TINY, "--run_dir", str(tmp_path / "run"), "--timeout_s", "20"], names)
    text = run_ranks(tmp_path, work, 3, expect=1)
    assert time.monotonic() - begun < 15
    assert text.count(f"rank {without} on host {platform.node()} would compute on the CPU (torch ") == 3
    others = "ranks 1-2" if without == 0 else "ranks 0-1"
    assert text.count(f"{others} on host {platform.node()} would compute on a GPU") == 3
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def launch(tmp_path, *command):
    from processes import TINY

    folder = tmp_path / "run"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE"))}
    done = subprocess.run([*command, "mnist_dist.train", *TINY, "--run_dir", str(folder)], capture_output=True, text=True, env=environ)
    return done, folder


@pytest.mark.slow  # test_signals.py has one that is not
def test_torchrun_starts_two_ranks_of_one_run(tmp_path):
    done, folder = launch(
        tmp_path, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(find_free_port()), "-m"
    )
    assert done.returncode == 0, done.stderr
    assert '"world_size": 2' in (folder / "result.json").read_text()
    assert "[rank 0] finished" in done.stderr
    assert "[rank 1]" not in done.stderr


@pytest.mark.slow  # test_starts.py has what starts the ranks, without the seconds of torch
@pytest.mark.parametrize("size", [1, 2])
def test_accelerate_launch_starts_the_program_and_two_processes_are_not_one(tmp_path, size):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    done, folder = launch(tmp_path, *command, "--num_processes", str(size), "-m")
    assert done.returncode == 0, done.stderr
    assert f'"world_size": {size}' in (folder / "result.json").read_text()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("port", ["0", "99999", "65536", "x", "-1"])
def test_a_port_that_is_none_is_named(port):
    for environ in (TORCHRUN, SRUN):
        with pytest.raises(UserError, match="PORT"):
            find_world(environ | {"MASTER_PORT": port})


ODD = {
    "ACCELERATE_USE_CPU": "maybe",
    "ACCELERATE_DEBUG_MODE": "maybe",
    "ACCELERATE_CPU_AFFINITY": "maybe",
    "ACCELERATE_DYNAMO_BACKEND": "fast",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "maybe",
    "ACCELERATE_FP8_BACKEND": "none",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many",
    "ACCELERATE_MIXED_PRECISION": "fp12",
    "ACCELERATE_TORCH_DEVICE": "toaster",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_SAGEMAKER": "true",
}


@dataclass(frozen=True)
class StartInOddEnvironments:
    """A process that tries to start with each of the odd variables, and with a compiler."""

    run_dir: str

    def __call__(self):
        from mnist_dist.train import main

        for name, value in [*ODD.items(), ("ACCELERATE_DYNAMO_BACKEND", "inductor")]:
            os.environ[name] = value
            assert main([*TINY, "--run_dir", self.run_dir]) == 2, name
            del os.environ[name]


def test_odd_values_of_accelerates_variables_are_named(tmp_path):
    text = run_ranks(tmp_path, StartInOddEnvironments(str(tmp_path / "run")))
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    for line, (name, value) in zip(lines, ODD.items(), strict=False):
        assert (name in line and value in line) or name == "ACCELERATE_MIXED_PRECISION", line
    assert "ACCELERATE_DYNAMO_BACKEND is inductor; allowed: no" in lines[-1]
    assert len(lines) == len(ODD) + 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("ACCELERATE_LOG_LEVEL", "train --run_dir run"),
        pytest.param("TORCH_LOGS", "report run", marks=pytest.mark.slow),
        pytest.param("TORCH_DISTRIBUTED_DEBUG", "plots run", marks=pytest.mark.slow),
    ],
)
def test_a_variable_at_which_torch_cannot_be_imported_is_named(tmp_path, name, program):
    environ = os.environ | {name: "foo", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", *f"mnist_dist.{program}".split()]
    answer = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 2
    (line,) = answer.stderr.splitlines()
    assert line.startswith("error: torch and Accelerate cannot be imported (")
    assert line.endswith(f"of their variables the environment has {name}='foo': correct or unset them")
    assert not (tmp_path / "run").exists()
