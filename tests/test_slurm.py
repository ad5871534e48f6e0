"""slurm/train.sh on the development cluster: real Slurm, real signals."""

import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import ROOT, SLOW_TASK, Job

ENDLESS = "--dataset synthetic --steps 100000 --batch_size 32 --threads 1 --log_every 20 --checkpoint_every 0 --run_dir run"
ENDLESS += f" --task {SLOW_TASK}"
pytestmark = pytest.mark.slurm


def starts(folder):
    return [json.loads(line)["step"] for line in (folder / "run/starts.jsonl").read_text().splitlines()]


def saved(job):
    return [int(step) for step in re.findall(r"stopped by a signal after step (\d+)", job.log)]


def test_two_nodes_of_two_tasks(cluster, tmp_path):
    job = Job(cluster, tmp_path, "--nodes=2 --ntasks-per-node=2", "--config smoke --threads 1 --run_dir 'runs/a b'")
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.log
    assert job.show("ExitCode") == "0:0"
    result = json.loads((tmp_path / "runs/a b/result.json").read_text())
    assert (result["world_size"], result["step"]) == (4, 60)


def test_time_limit_saves_requeues_and_continues(cluster, tmp_path):
    job = Job(cluster, tmp_path, "--nodes=2 --ntasks-per-node=1 --time=10 --signal=USR1@90", ENDLESS)
    job.wait_for("step 20/")
    job.bring_limit_near()
    job.wait_for("launch: requeued")
    job.update(TimeLimit=10)
    job.wait_for("from step", 2)
    assert "Exited with exit code 85" in job.log
    # Counted in the log, not by Slurm: its own count has each launch that it failed to make and repeated.
    assert job.log.count("launch: requeued") == len(saved(job)) == 1, job.log
    assert saved(job)[0] > 0
    assert starts(tmp_path) == [0, saved(job)[0]]


def test_scontrol_requeue_and_scancel(cluster, tmp_path):
    job = Job(cluster, tmp_path, "--nodes=2 --ntasks-per-node=1", ENDLESS)
    job.wait_for("step 20/")
    job.run("scontrol", "requeue", job.id)
    job.wait_for("from step", 2)
    assert starts(tmp_path) == [0, saved(job)[0]]
    time.sleep(3)
    job.run("scancel", job.id)
    job.wait_state("CANCELLED")
    assert job.show("ExitCode") == "143:0"
    assert len(starts(tmp_path)) == len(saved(job)) == 2, job.log


@pytest.mark.parametrize(
    ("grace", "user_signal", "code", "requeued"),
    [(30, True, 85, True), (30, False, 143, True), (0, True, 143, False)],
    ids=["the job's own signal", "TERM", "at once"],
)
def test_preemption(cluster, tmp_path, request, grace, user_signal, code, requeued):
    config = Path(cluster["SLURM_CONF"])
    usual = config.read_text()

    def set_policy(seconds, text):
        config.write_text(text)
        subprocess.run(["scontrol", "reconfigure"], env=cluster, check=True)
        subprocess.run(["scontrol", "update", "PartitionName=main", f"GraceTime={seconds}"], env=cluster, check=True)

    request.addfinalizer(lambda: set_policy(30, usual))
    assert "\nSlurmctldParameters=preempt_send_user_signal\n" in usual
    set_policy(grace, usual if user_signal else usual.replace("SlurmctldParameters=", "# "))
    job = Job(cluster, tmp_path, "--nodes=2 --ntasks-per-node=1", ENDLESS)
    job.wait_for("step 20/")
    subprocess.run(
        ["sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"],
        env=cluster,
        check=True,
        cwd=tmp_path,
    )
    job.wait_state("PENDING")
    job.wait_for("from step", 2)
    assert f"Exited with exit code {code}" in job.log
    assert ("launch: requeued" in job.log) == requeued
    assert starts(tmp_path) == [0, saved(job)[0]]


@pytest.mark.parametrize("most", [0, 1])
def test_requeues_are_counted(cluster, tmp_path, most):
    job = Job(cluster, tmp_path, "--nodes=1", ENDLESS, MAX_REQUEUES=str(most))
    for start in range(1, most + 2):
        job.wait_for("from step", start)
        time.sleep(1)
        job.run("scancel", "--signal=USR1", job.id)
    assert job.wait_state("FAILED") == "FAILED"
    assert job.show("ExitCode") == "85:0"
    assert f"not requeued again (max_requeues is {most})" in job.log


def test_user_mistake_is_not_requeued(cluster, tmp_path):
    job = Job(cluster, tmp_path, "--nodes=2 --ntasks-per-node=2", "--config smoke --batch_size 3")
    job.wait_state("FAILED")
    assert job.show("ExitCode") == "2:0"
    assert "batch_size is 3, less than the 4 processes" in job.log


def submit_chain(cluster, folder, training):
    """Three jobs, each after those before it, as docs/launching.md says."""
    jobs = []
    for _ in range(3):
        before = ":".join(job.id for job in jobs)
        options = f"--nodes=2 --ntasks-per-node=1 --dependency=afterany:{before}" if before else "--nodes=2 --ntasks-per-node=1"
        jobs.append(Job(cluster, folder, options, training, CHAIN=before))
    return jobs


def assert_left(job, words):
    """Whether a job of a chain ended at once, well, and without srun."""
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.log
    assert words in job.log
    assert "launch: job" not in job.log
    times = [datetime.datetime.fromisoformat(job.show(name)) for name in ("StartTime", "EndTime")]
    assert (times[1] - times[0]).total_seconds() < 60  # of which Python takes one, where a machine is idle


def test_a_chain_goes_on_until_the_run_is_finished(cluster, tmp_path):
    slow = "--steps 60 --log_every 1 --pause_s 2 --until quick --report false --wandb disabled"
    first, second, third = submit_chain(cluster, tmp_path, f"{ENDLESS} {slow}")
    first.wait_for("step 3/")
    assert [job.show("JobState") for job in (first, second, third)] == ["RUNNING", "PENDING", "PENDING"]
    first.run("scancel", first.id)
    (tmp_path / "quick").touch()
    assert second.wait_state("COMPLETED", "FAILED") == "COMPLETED", second.log
    assert starts(tmp_path) == [0, saved(first)[0]]
    assert_left(third, "run is finished: this job of its chain has nothing to do")


@pytest.mark.parametrize(
    ("training", "code", "words"),
    [
        ("--optimizer sgd --learning_rate 100 --schedule constant --steps 40", "1:0", "run has failed for good in job {} (failed: the "),
        ("--batch_size 1 --steps 40", "2:0", "run has failed for good in job {}, by a mistake that its log names"),
    ],
)
def test_a_chain_ends_where_it_would_fail_again(cluster, tmp_path, training, code, words):
    first, *others = submit_chain(cluster, tmp_path, f"--dataset synthetic --threads 1 --wandb disabled --run_dir run {training}")
    for job in others:
        assert_left(job, words.format(first.id))
    assert first.show("ExitCode") == code


def test_a_batch_script_of_ones_own_may_use_the_policy_and_is_warned_without(cluster, tmp_path):
    """Submitted from within a job of one task, whose SLURM_NTASKS it inherits."""
    train = f"{sys.executable} -P -m mnist_dist.train --config smoke --threads 1 --wandb disabled --run_dir"
    for name, lines in (("bare", f"srun {train} bare"), ("policy", f"source {ROOT}/launch/policy.sh\nrun_training {train} policy")):
        (tmp_path / name).with_suffix(".sh").write_text(f"#!/bin/bash\n{lines}\n")
        command = ["srun", "-n", "1", "sbatch", "--wait", "--nodes=2", f"--output={name}.out", f"{name}.sh"]
        subprocess.run(command, env={**cluster, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, timeout=120, check=True)
        log = (tmp_path / f"{name}.out").read_text()
        size = json.loads((tmp_path / name / "result.json").read_text())["world_size"]
        assert (size, "this Slurm job has 2 tasks, and srun started 1 of them" in log) == ((1, True) if name == "bare" else (2, False)), log


def test_two_jobs_share_nodes(cluster, tmp_path):
    jobs = [
        Job(cluster, tmp_path, "--nodes=2 '--nodelist=127.0.0.[1-2]' --ntasks-per-node=1", f"--config smoke --threads 1 --run_dir {name}")
        for name in "ab"
    ]
    for job in jobs:
        assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.log
    times = [{name: job.show(name) for name in ("StartTime", "EndTime", "NodeList")} for job in jobs]
    assert times[0]["NodeList"] == times[1]["NodeList"]
    assert max(t["StartTime"] for t in times) < min(t["EndTime"] for t in times), "they did not run at once"


def test_one_task_for_each_gpu(cluster, tmp_path):
    job = Job(cluster, tmp_path, "--nodes=2 --gpus-per-node=2 --cpus-per-gpu=1", "--config smoke --threads 1 --run_dir run --device cpu")
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.log
    assert json.loads((tmp_path / "run/result.json").read_text())["world_size"] == 4


def test_nodes_may_have_different_numbers_of_gpus_where_each_task_has_one(cluster, tmp_path):
    training = "--config smoke --threads 1 --run_dir run --device cpu"
    job = Job(cluster, tmp_path, "--nodes=2 --ntasks=3 --gpus-per-task=1", training)
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.log
    assert json.loads((tmp_path / "run/result.json").read_text())["world_size"] == 3
    job = Job(cluster, tmp_path, "--nodes=2 --gpus=3", training)
    assert job.wait_state("COMPLETED", "FAILED") == "FAILED", job.log
    assert "the nodes have different numbers of GPUs in this job: say sbatch --gpus-per-node" in job.log


def test_lost_rank_ends_the_job(cluster, tmp_path):
    job = Job(cluster, tmp_path, "--nodes=2 --ntasks-per-node=1", ENDLESS)
    job.wait_for("step 20/")
    pid = job.run("scontrol", "listpids", f"{job.id}.0", "127.0.0.2").stdout.splitlines()[1].split()[0]
    os.kill(int(pid), 9)
    job.wait_state("FAILED")
    assert job.show("ExitCode") == "137:0"
    assert starts(tmp_path) == [0]


def test_checkout_and_folder_with_spaces(cluster, tmp_path):
    checkout = tmp_path / "a b/co"
    checkout.mkdir(parents=True)
    for name in ("mnist_dist", "launch", "configs", "slurm"):
        shutil.copytree(ROOT / name, checkout / name)
    (checkout / "mnist_dist/train.py").write_text("print(__file__)\nmain = len")
    python = str(ROOT / ".venv/bin/python")
    for script in (checkout / "slurm/train.sh", "../a b/co/slurm/train.sh", "./co/slurm/train.sh"):
        job = Job(cluster, tmp_path / "a b", "", script=script, PYTHON=python)
        job.wait_state("COMPLETED")
        assert str(checkout / "mnist_dist/train.py") in job.log
    job = Job(cluster, tmp_path / "a b", "", script=script, CONDA_PREFIX=str(ROOT / ".venv"))  # as `conda activate` leaves it
    job.wait_state("COMPLETED")
    assert f"with {python}" in job.log


SAY_WORLD = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from mnist_dist.errors import UserError
from mnist_dist.world import find_world
try:
    world = find_world(os.environ)
except UserError as error:
    print("refused:", error, flush=True)
    sys.exit(2)
print(f"rank {{world.rank}} of {{world.size}} local {{world.local_rank}} of {{world.local_size}} at {{world.address}}", flush=True)
"""


@pytest.fixture
def start(cluster, tmp_path):
    """Runs one of Slurm's commands on a program that says its world; what is said, sorted."""
    (tmp_path / "world.py").write_text(SAY_WORLD)
    python = f"{sys.executable} {tmp_path / 'world.py'}"
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def run(command, **variables):
        words = shlex.split(command.format(python=python))
        done = subprocess.run(words, env={**cluster, **root, **variables}, cwd=tmp_path, text=True, capture_output=True, timeout=120)
        # The lines of two ranks may come as one.
        return sorted(re.findall(r"(?:rank \d|refused).*?(?=rank \d+ of \d+ local|$)", done.stdout, re.MULTILINE))

    return run


def list_ranks(size, said):
    """The ranks of a world of `size` that were said, where they are all of it."""
    return [int(line.split()[1]) for line in said if f" of {size} local" in line]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_srun_is_asked_for_and_starts_as_many(start, size):
    for command in (f"srun -n {size} {{python}}", f"salloc -n {size} srun {{python}}", f"salloc -n 4 srun -n {size} {{python}}"):
        said = start(command)
        assert list_ranks(size, said) == list(range(size)), said


@pytest.mark.parametrize(
    "command", ["salloc -n 2 {python}", "salloc -N 2 {python}", "salloc -n 2 srun --interactive --preserve-env {python}"]
)
def test_one_process_of_a_larger_job_is_refused(start, command):
    said = start(command)
    assert len(said) == 1
    assert "2 tasks, but this process is not one of them" in said[0]


@pytest.mark.parametrize("command", ["srun -n 1 {python} : -n 1 {python}", "salloc -n 1 : -n 1 srun {python}"])
def test_a_heterogeneous_job_is_refused(start, command):
    said = start(command)
    assert said
    assert all("heterogeneous" in line for line in said)


def test_rank_zero_is_where_slurm_put_it(start, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.3\n127.0.0.1\n127.0.0.3\n127.0.0.2\n")
    said = start("srun -n 4 -m arbitrary {python}", SLURM_HOSTFILE=str(tmp_path / "hosts"))
    assert said == [f"rank {rank} of 4 local {rank // 2 if rank == 2 else 0} of {1 + (rank in (0, 2))} at 127.0.0.3" for rank in range(4)]
    said = start("srun -n 3 -m arbitrary -w 127.0.0.3,127.0.0.1,127.0.0.2 {python}")  # only srun knows the order
    assert len(said) == 3
    assert all("set MASTER_ADDR" in line for line in said)


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpirun_in_an_allocation(start, kind):
    if shutil.which(f"mpirun.{kind}") is None:
        pytest.skip(f"mpirun.{kind} is not installed")
    assert list_ranks(2, start(f"salloc -N 1 -n 2 mpirun.{kind} {{python}}")) == [0, 1]
    said = start(f"salloc -N 2 -n 2 mpirun.{kind} {{python}}")
    assert all("several hosts, and MASTER_ADDR" in line for line in said)
    assert said


@pytest.mark.parametrize(
    ("outer", "options", "size"),
    [
        ("-n 1", "--nodes=2", 2),
        ("-n 1", "--nodes=2 --ntasks-per-node=2", 4),
        ("-n 1 --gpus-per-node=1 --mem-per-gpu=10 --cpus-per-gpu=1", "--nodes=2 --mem=20", 2),
        ("-n 1", "--nodes=2 --gpus-per-node=2", 4),
        ("-n 2 -N 2", "--nodes=1", 1),
        ("-n 2 -N 2", "--nodes=2 --gpus-per-node=2", 0),
        ("-n 1 -c 2", "--nodes=2 --ntasks-per-node=2", 4),
        ("-n 1", "-n 1 : -n 1", 0),
    ],
)
def test_a_job_submitted_from_within_a_job_is_its_own(cluster, tmp_path, outer, options, size):
    checkout = tmp_path / "co"
    for name in ("mnist_dist", "launch", "slurm"):
        shutil.copytree(ROOT / name, checkout / name)
    (checkout / "mnist_dist/train.py").write_text(SAY_WORLD + "main = len")
    script = checkout / "slurm/train.sh"
    submit = f"[ $SLURM_PROCID != 0 ] || sbatch --wait --output=inner.out {options} {script}"
    if ":" in options:
        submit = f"sbatch --wait --output=inner.out {options} {script}"
    subprocess.run(["srun", *outer.split(), "bash", "-c", submit], env={**cluster, "PYTHON": sys.executable}, cwd=tmp_path, timeout=90)
    log = (tmp_path / "inner.out").read_text()
    if size:
        assert list_ranks(size, sorted(re.findall("^rank.*$", log, re.MULTILINE))) == list(range(size)), log
    else:
        assert "rank" not in log
        assert len(re.findall("would leave some|is heterogeneous", log)) == 1, log
