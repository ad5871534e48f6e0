"""Submitted jobs on the development cluster: real Slurm, real signals, and the weights of a run that was never stopped."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cluster import ROOT, SLOW_TASK, Job, Submitted, launch
from processes import find_free_port
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm

RECIPE = "--dataset synthetic --steps 150 --batch_size 8 --threads 1 --precision fp32 --optimizer sgd"
RECIPE += " --momentum 0.9 --learning_rate 0.0005 --schedule constant"
RECIPE += " --test_size 200 --report false --checkpoint_every 0 --wandb disabled"
# The pauses slow the run down until there is a file `quick`, so that faults can find it. They leave its weights alone.
SLOW = RECIPE + f" --log_every 1 --task {SLOW_TASK} --pause_s 2 --until quick"


class Launched(Submitted):
    """A job of launch.submit, and what its run has recorded."""

    @property
    def steps(self):
        path = self.path / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def starts(self):
        path = self.path / "starts.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def saved(self):
        return [int(step) for step in re.findall(r"stopped by a signal after step (\d+)", self.log)]

    def wait_until(self, condition, timeout=240):
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"{self.show('JobState')}:\n{self.log}"
            time.sleep(0.2)

    def wait_start(self, number):
        """Wait for its start of that number, and for some steps of it.

        Slurm delays a requeued job until its old credential is void. To start it sooner (scontrol update StartTime=now) would now and then
        launch it with a credential of the second in which the old one was revoked, and so fail it.
        """
        self.wait_until(lambda: len(self.starts) >= number and self.steps[-1:] >= [self.starts[-1] + 5])

    def assert_nothing_lost(self, weights):
        assert self.wait_state("COMPLETED", "FAILED") == "COMPLETED", self.log
        assert self.steps == list(range(1, 151))
        assert self.starts == [0, *self.saved]  # no step was repeated
        here = load_file(self.path / "model.safetensors")
        assert all(torch.equal(value, here[name]) for name, value in weights.items())


def weigh(folder, world):
    """The weights of a run that nothing stops, in `world` processes on this machine."""
    command = f"{RECIPE} --run_dir {folder}/unbroken"
    train = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", f"--master-port={find_free_port()}"]
    train += ["-m", "mnist_dist.train"]
    subprocess.run([*train, *command.split()], cwd=ROOT, check=True, capture_output=True, timeout=120)
    return load_file(folder / "unbroken/model.safetensors")


@pytest.fixture(scope="module")
def weights_of_two(tmp_path_factory):
    return weigh(tmp_path_factory.mktemp("two"), 2)


def test_submit_and_sbatch_train_as_one_process_does(cluster, tmp_path):
    recipe = RECIPE.replace("--wandb disabled", "--wandb offline")
    environ = {**cluster, "WANDB_API_KEY": "c0ffee" * 6 + "abcd"}
    folder = tmp_path / "a b"
    folder.mkdir()
    submitted = Launched(environ, folder, f"--nodes 2 --tasks_per_node 2 --time 5 {recipe}", "runs/x=1,y")
    batch = Job(environ, folder, "--nodes=2 --ntasks-per-node=2", f"{recipe} --run_dir runs/batch")
    one = weigh(tmp_path, 1)
    listing = launch(environ, folder, "jobs", "--json").stdout
    assert {row["job"] for row in json.loads(listing)} >= {submitted.id}
    for job, run in ((submitted, submitted.path), (batch, folder / "runs/batch")):
        assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.log
        assert json.loads((run / "result.json").read_text())["world_size"] == 4
        here = load_file(run / "model.safetensors")
        assert max(float((value - here[name]).abs().max()) for name, value in one.items()) < 1e-4
        assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    rows = {row["path"]: (row["job"], row["state"]) for row in json.loads(launch(environ, folder, "jobs", "--json").stdout)}
    assert rows == {"runs/x=1,y": (submitted.id, "finished"), "runs/batch": (batch.id, "finished")}
    assert not [path for path in folder.rglob("*") if path.is_file() and b"c0ffee" in path.read_bytes()]
    names = {path.name for path in (submitted.path / "slurm").iterdir() if not path.name.startswith(".")}
    assert names == {"job.json", "end.json", f"{submitted.id}.log", f"{submitted.id}_submission.sh", f"{submitted.id}_submitted.pkl"}
    answer = launch(environ, folder, "submit", f"--nodes 2 --tasks_per_node 2 {recipe} --run_dir 'runs/x=1,y'")
    assert answer.stdout.endswith("nothing to do\n")
    assert "steps: 150 there, 151 asked for" in launch(environ, folder, "submit", f"{recipe} --run_dir 'runs/x=1,y' --steps 151").stderr


@pytest.mark.timeout(1200)
def test_signals_and_a_lost_rank(cluster, tmp_path, weights_of_two):
    limited = Launched(cluster, tmp_path, f"--nodes 2 --time 10 --signal_delay_s 90 {SLOW}", "limited")
    requeued = Launched(cluster, tmp_path, f"--nodes 2 --time 10 {SLOW}", "requeued")
    job = "--nodes 1 --tasks_per_node 2 --time 10"
    lost = Launched(cluster, tmp_path, f"{job} {SLOW} --checkpoint_every 10", "lost")
    for one in (limited, requeued, lost):
        one.wait_start(1)
    assert [one.show("JobState") for one in (limited, requeued, lost)] == ["RUNNING"] * 3
    limited.bring_limit_near()

    def lift_limit():  # as soon as it is requeued, however long the rest takes: its next start would be stopped as well
        limited.wait_for("launch: requeued")
        limited.update(TimeLimit=10)

    lifted = ThreadPoolExecutor(1).submit(lift_limit)
    assert limited.show("NodeList") == requeued.show("NodeList")  # two jobs on the same nodes, at the same time
    following = subprocess.Popen(
        [sys.executable, "-m", "launch.jobs", "follow", str(requeued.path)],
        env={**cluster, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
    )
    requeued.run("scontrol", "requeue", requeued.id)
    assert "is in use by job" in launch(cluster, tmp_path, "submit", f"{job} {SLOW} --run_dir lost").stderr
    lost.wait_until(lambda: lost.steps[-1] > 10)
    pid = lost.run("scontrol", "listpids", f"{lost.id}.0", lost.show("NodeList")).stdout.splitlines()[1].split()[0]
    os.kill(int(pid), 9)
    lost.wait_state("FAILED")
    assert len(lost.starts) == 1
    listing = launch(cluster, tmp_path, "jobs", ".").stdout
    assert re.search(r"^lost +failed", listing, re.MULTILINE), listing

    # A killed run repeats what came after its last checkpoint; one that is cancelled repeats nothing.
    again = Launched(cluster, tmp_path, f"{job} {SLOW}", "lost")
    again.wait_start(2)
    assert again.starts[1] in range(10, 150, 10)
    answer = launch(cluster, tmp_path, "jobs", "cancel lost")
    assert f"saved at step {again.saved[-1]}" in answer.stdout, answer
    assert again.show("JobState") == "CANCELLED"
    again.submit(f"{job} {SLOW}")

    lifted.result()
    requeued.wait_until(lambda: len(requeued.starts) == 2)
    (tmp_path / "quick").touch()
    assert "Exited with exit code 85" in limited.log
    limited.wait_start(2)
    for one in (limited, requeued):
        one.assert_nothing_lost(weights_of_two)
        assert len(one.starts) == 2, one.log
    assert again.wait_state("COMPLETED", "FAILED") == "COMPLETED", again.log
    assert again.steps == list(range(1, 151))
    out, _ = following.communicate(timeout=120)
    assert following.returncode == 0
    assert out.count(" from step ") == 2
    assert out.endswith(f"{requeued.path}: finished, step 150 of 150\n")


def test_preemption_a_lost_node_and_a_new_controller(cluster, tmp_path, weights_of_two):
    job = Launched(cluster, tmp_path, f"--nodes 2 --time 10 {SLOW}")
    job.wait_start(1)
    urgent = ["sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"]
    subprocess.run(urgent, env=cluster, check=True, cwd=tmp_path)
    job.wait_for("launch: requeued")
    job.wait_start(2)

    [_, down] = job.run("scontrol", "show", "hostnames", job.show("NodeList")).stdout.split()
    # Not the first node: the log is written there, and would miss the last line.
    for state in ("DOWN", "DRAIN"):  # a node that is only down is up again as soon as its daemon says a word
        job.run("scontrol", "update", f"NodeName={down}", f"State={state}", "Reason=test")
    try:
        job.wait_start(3)
        assert down not in job.run("scontrol", "show", "hostnames", job.show("NodeList")).stdout.split()
        answer = launch(cluster, tmp_path, "submit", "--config smoke --nodes 3 --batch_size 33 --dry_run")
        assert "only 2 of the nodes" in answer.stderr
    finally:
        job.run("scontrol", "update", f"NodeName={down}", "State=RESUME")

    controller = int((ROOT / cluster["DEV_CLUSTER_DIR"] / "slurmctld.pid").read_text())
    os.kill(controller, 15)
    while os.path.exists(f"/proc/{controller}"):
        time.sleep(0.1)
    before = job.steps[-1]
    job.wait_until(lambda: job.steps[-1] > before + 2)  # it runs on without one
    subprocess.run(["slurmctld"], env={**cluster, "PATH": cluster["PATH"] + ":/usr/sbin:/sbin"}, check=True)
    job.wait_until(lambda: "is UP" in job.run("scontrol", "ping").stdout)
    (tmp_path / "quick").touch()
    job.assert_nothing_lost(weights_of_two)
    assert len(job.starts) == 3


def test_requeues_are_counted(cluster, tmp_path):
    job = Launched(cluster, tmp_path, f"--time 5 --max_requeues 1 {SLOW}")
    for start in (1, 2):
        job.wait_start(start)
        job.run("scancel", "--signal=USR1", job.id)
    assert job.wait_state("FAILED") == "FAILED"
    assert job.show("ExitCode") == "85:0"
    assert "not requeued again (max_requeues is 1)" in job.log


def test_what_is_passed_on_reaches_the_job(cluster, tmp_path):
    (tmp_path / "site.yaml").write_text("exclude: 127.0.0.1\nsrun: --label\n")
    more = """--nice=7 --comment='it is; "$HOME" #1'"""
    job = Launched(cluster, tmp_path, f"--time 5 --job site.yaml --sbatch {shlex.quote(more)} {RECIPE.replace('150', '5')}")
    text = job.run("scontrol", "show", "job", job.id).stdout
    assert "Nice=7 " in text
    assert 'Comment=it is; "$HOME" #1' in text
    assert "ExcNodeList=127.0.0.1" in text
    assert job.wait_state("COMPLETED", "FAILED") == "COMPLETED", job.log
    assert "0: " in job.log  # by srun --label
    answer = launch(cluster, tmp_path, "submit", f"{RECIPE} --run_dir other --reservation nosuch")
    assert "sbatch refused the job" in answer.stderr
    assert not (tmp_path / "other").exists()


def test_a_chain_is_looked_after_as_one_run(cluster, tmp_path):
    chain = Launched(cluster, tmp_path, f"--nodes 2 --time 5 --chain 3 {SLOW}")
    chain.wait_start(1)
    listing = launch(cluster, tmp_path, "jobs", ".").stdout
    assert re.search(r"^run +running, 2 more in its chain", listing, re.MULTILINE), listing
    assert "is in use by job" in launch(cluster, tmp_path, "submit", f"{SLOW} --run_dir run").stderr
    chain.run("scancel", chain.id)  # this one job alone: the next goes on
    chain.wait_state("CANCELLED")
    chain.wait_until(lambda: len(chain.starts) == 2)
    answer = launch(cluster, tmp_path, "jobs", "cancel run")
    assert "run is stopped; saved at step" in answer.stdout, answer
    end = time.monotonic() + 60
    while queue := chain.run("squeue", "--noheader", "--states=PENDING,RUNNING").stdout:
        assert time.monotonic() < end, queue
        time.sleep(0.2)
    assert len(chain.starts) == 2


def test_a_job_submitted_from_within_a_job_is_its_own(cluster, tmp_path):
    command = f"{shlex.quote(sys.executable)} -m launch.submit --time 5 --nodes 2 {RECIPE.replace('150', '5')} --run_dir run"
    environ = {**cluster, "PYTHONPATH": str(ROOT)}
    subprocess.run(["srun", "-n", "1", "-c", "2", "bash", "-c", command], env=environ, cwd=tmp_path, check=True, timeout=120)
    answer = launch(cluster, tmp_path, "jobs", "follow run")
    assert answer.returncode == 0, answer
    assert json.loads((tmp_path / "run/result.json").read_text())["world_size"] == 2


def test_a_sweep_is_one_array_and_repeats_only_what_failed(cluster, tmp_path):
    recipe = RECIPE.replace("--learning_rate 0.0005", "--steps 40")
    words = f"s.yaml --momentum 0 --run_dir sweep --time 5 --parallel 4 {recipe}"
    (tmp_path / "s.yaml").write_text("sweep: {learning_rate: [0.003, 0.01, 100.0], seed: [0, 1]}\n")
    answer = launch(cluster, tmp_path, "sweep", words)
    number = re.search(r"submitted job (\d+): 6 of 6 runs", answer.stdout)[1]
    queue = subprocess.run(["squeue", "--array", "--noheader", "--format=%F"], env=cluster, text=True, capture_output=True).stdout.split()
    assert set(queue) <= {number}
    again = launch(cluster, tmp_path, "sweep", words)
    assert "0 of 6 runs are finished and 6 queued or running" in again.stderr, again
    assert launch(cluster, tmp_path, "jobs", "follow 'sweep/learning_rate=0.003,seed=1'").returncode == 0
    end = time.monotonic() + 240
    while subprocess.run(["squeue", "--noheader"], env=cluster, text=True, capture_output=True).stdout:
        assert time.monotonic() < end
        time.sleep(0.5)
    table = launch(cluster, tmp_path, "sweep", f"{words} --table").stdout.splitlines()
    assert [line.split()[-1] for line in table[1:3]] == ["finished", "finished"]
    assert table[3].split() == ["100.0", "0/2", "failed", "(exit", "status", "1)"]
    assert (tmp_path / "sweep/learning_rate=0.003,seed=0/result.json").exists()
    script = (tmp_path / f"sweep/slurm/{number}_submission.sh").read_text()
    assert "#SBATCH --array=0-5%4" in script
    assert "export WANDB_RUN_GROUP=sweep" in script
    answer = launch(cluster, tmp_path, "sweep", words)
    assert "2 of 6 runs" in answer.stdout, answer


def test_what_this_cluster_cannot_do_is_refused_before_it_is_queued(cluster, tmp_path):
    refused = {
        "--partition nix": "partition is 'nix', which this cluster does not have; allowed: main, urgent",
        "--time 61": "time is 61 min; partition main allows at most 60 min",
        "--nodes 4": "nodes is 4; partition main has 3 nodes",
        "--gpus_per_node 4": "the largest node of partition main has 2 GPUs",
        "--nodes 3 --batch_size 2": "batch_size is 2, less than the 3 processes",
        "--steps 0": "steps is '0'",
    }
    for words, message in refused.items():
        answer = launch(cluster, tmp_path, "submit", f"--config smoke {words}")
        assert answer.returncode == 2
        assert message in answer.stderr
    answer = launch(cluster, tmp_path, "sweep", "lr=0.1,-1 seed=0 --config smoke --partition nix")
    assert answer.returncode == 2
    assert "learning_rate is '-1'" in answer.stderr
    assert list(tmp_path.iterdir()) == []
    # What only Slurm itself knows: one line, and no traceback.
    answer = launch(cluster, tmp_path, "submit", "--config smoke --constraint nosuch")
    assert answer.returncode == 2
    assert answer.stderr == "error: sbatch refused the job: Batch job submission failed: Invalid feature specification\n"
