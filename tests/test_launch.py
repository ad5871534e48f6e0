"""Jobs without a cluster: what is refused, what a script and a pickle hold, and the same job on this machine."""

import dataclasses
import errno
import fcntl
import importlib
import json
import math
import os
import pickletools
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from processes import TINY, Train, find_free_port, run_ranks
from pydantic import ValidationError
from submitit.core.utils import JobPaths

from launch import chain, cluster, explain, jobs, submission, submit, sweep
from launch.request import Request, list_arguments
from launch.runs import RunState, find_runs, find_saved_step, read_state
from launch.training import Training, write_note
from mnist_dist import evaluate, report
from mnist_dist.asked import warn_of_smaller_step
from mnist_dist.config import Config, configure, make_config, parse_command_line
from mnist_dist.console import format_duration
from mnist_dist.errors import RunError, UserError
from mnist_dist.files import mark_folder
from mnist_dist.lock import Lock
from mnist_dist.options import make_options
from mnist_dist.world import find_world, list_inherited

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
KEY = "c0ffee" * 6 + "abcd"
SINFO = """\
main*|up|1:00:00|1-infinite|3|idle|2|65536|gpu:2
main*|up|1:00:00|1-infinite|1|down*|2|65536|gpu:2
gpu|up|2-00:00:00|1-4|6|mixed|64|512000+|gpu:a100:4(S:0-1),gpu:h100:4
gpu|up|2-00:00:00|1-4|2|drained|64|512000|gpu:a100:8(S:0-1)
long|inact|infinite|1-infinite|8|allocated|64|512000|(null)
"""


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)


def run(*command, **variables):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-m", *map(str, command)], env=environ, text=True, capture_output=True, timeout=120)


def read_starts(folder):
    path = folder / "starts.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def test_no_program_imports_torch():
    names = "launch.submit, launch.sweep, launch.jobs, launch.explain, launch.chain, launch.training, launch.prove"
    code = f"import sys, {names}; print({{'torch', 'accelerate'}} & {{*sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert answer.stdout == "set()\n", answer.stderr


@pytest.mark.parametrize("name", ["submit", "sweep"])
def test_the_script_is_the_one_that_was_looked_at(no_slurm, tmp_path, capsys, name):
    job = "--config smoke --nodes 2 --tasks_per_node 2 --gpus_per_node 2 --cpus_per_task 8 --memory_gb 64 --time 90 --partition gpu"
    job += " --account team --qos high --constraint a100&ib --name digits --signal_delay_s 300 --max_requeues 5 --dry_run"
    job += " --exclude node[3-5],node9 --nodelist node1 --reservation course --srun --cpu-bind=cores"
    words = ["lr=0.05,0.1", "seed=0,1,2", "--parallel", "2"] if name == "sweep" else ["--run_dir", "runs/a b"]
    words += ["--sbatch", "--mail-type=END --comment='it is; \"$HOME\" #1' --nice"]
    assert sys.modules[f"launch.{name}"].main([*words, *job.split()]) == 0
    answer = capsys.readouterr()
    assert "no Slurm here" in answer.err
    text = answer.out.replace(sys.executable, "PYTHON").replace(str(ROOT), "CHECKOUT").replace(str(tmp_path), "/FOLDER")
    assert text == (GOLDEN / f"{name}.sh").read_text()
    assert subprocess.run(["/bin/bash", "-n"], input=answer.out, text=True).returncode == 0
    assert list(tmp_path.iterdir()) == []


DOCUMENTS = ["README.md", "docs/cluster.md", "configs/sweep.yaml"]
COMMANDS = [
    line.strip("# ") for name in DOCUMENTS for line in (ROOT / name).read_text().splitlines() if re.match("[ #]+python -m launch", line)
]


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if not re.search(" launch.(jobs|explain) | launch.prove --cluster local", f"{line} ")]
)
def test_the_commands_of_the_documents_are_right(no_slurm, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    _, _, program, *words = shlex.split(command, comments=True)
    assert importlib.import_module(program).main([*words, "--dry_run"]) == 0


def test_the_policy_and_its_callers_are_clean_bash():
    for name in ("launch/policy.sh", "slurm/train.sh"):
        assert subprocess.run(["/bin/bash", "-n", ROOT / name]).returncode == 0
    if shutil.which("shellcheck"):
        answer = subprocess.run(["shellcheck", "-x", "launch/policy.sh", "slurm/train.sh"], cwd=ROOT, text=True, capture_output=True)
        assert answer.returncode == 0, answer.stdout


HOSTILE = ["a\nb", "a;b", "a b", "$(id)", "`id`", 'a"b', "a'b", "-x", "", "ä", "a" * 101, "a\\b", "a#b"]


@pytest.mark.parametrize("option", ["name", "partition", "account", "qos", "constraint", "exclude", "nodelist", "reservation"])
def test_a_hostile_value_is_refused(no_slurm, tmp_path, capsys, option):
    for value in HOSTILE:
        if option in ("constraint", "exclude", "nodelist") and value == "a" * 101:
            continue
        assert submit.main(["--config", "smoke", "--dry_run", f"--{option}={value}"]) == 2, value
        answer = capsys.readouterr()
        assert answer.out == ""
        assert re.fullmatch(rf"error: {option} is .*\n", answer.err), answer.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--signal=USR1@5", "--signal is set by the script: use --signal_delay_s"),
        ("--sig=USR1@5", "--signal is set by the script"),  # Slurm takes abbreviations
        ("--ntasks 3", "--ntasks is set by the script: use --nodes and --tasks_per_node"),
        ("--no-requeue", "use --max_requeues"),
        ("--output=x", "the log is in RUN_DIR/slurm"),
        ("--gres=lscratch:5,gpu:2", "use --gpus_per_node"),
        ("--gr gpu:2", "use --gpus_per_node"),
        ("--gpus-per-socket=2", "use --gpus_per_node"),
        ("--tres-per-node=gres/gpu:2", "use --gpus_per_node"),
        ("--cpus-per-task=4", "--cpus-per-task is set by the script: use --cpus_per_task"),  # not read as an option of this program
        ("--nice --nice=3", "--nice stands there twice"),
        ("-C a100", "'-C' is not a long option"),
        ("--Nice", "'--Nice' is not a long option"),
        ("--ni$ce", "is not a long option"),
        ("nice", "'nice' is no option"),
        ("--begin now here", "'here' is no option"),
        ("--comment='a", "its quotes do not match"),
        ("--comment=", "must have 1 to 1000 characters"),
        ("--comment='a\\b'", "no backslash"),
        ("--comment='a\nb'", "printable"),
        ("--comment='a\x1bb'", "printable"),
    ],
)
def test_more_of_slurms_options_are_refused_where_they_are_the_scripts(no_slurm, tmp_path, capsys, text, words):
    for option in ("sbatch", "srun"):
        assert submit.main(["--config", "smoke", "--dry_run", f"--{option}", text]) == 2
        answer = capsys.readouterr()
        assert re.fullmatch(rf"error: {option} is .*\n", answer.err), answer.err
        assert words in answer.err
    assert list(tmp_path.iterdir()) == []


def test_srun_gets_the_very_words_that_were_given(no_slurm, tmp_path, capsys):
    """What a hostile value would run is data in the script: bash, which runs it here, hands it on to a stand-in for srun."""
    value = "a b; touch x `touch y` $(touch z) \"q\" 'p' #c"
    assert submit.main(["--config", "smoke", "--dry_run", f"--srun=--label --comment={shlex.quote(value)}"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("srun_options=")]
    program = f'{line}\nprintf "%s\\n" "${{srun_options[@]}}"'
    assert subprocess.run(["/bin/bash", "-c", program], text=True, capture_output=True).stdout == f"--label\n--comment={value}\n"
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_job_come_from_a_file(no_slurm, tmp_path, capsys):
    (tmp_path / "site.yaml").write_text("partition: gpu\ntime: 30\nsbatch: --mail-type=END --comment='a b'\nsrun: --label\n")
    for program, words in ((submit, []), (sweep, ["seed=0,1"])):
        assert program.main([*words, "--config", "smoke", "--dry_run", "--job", "site.yaml", "--time", "9", "--nodelist=n1"]) == 0
        out = capsys.readouterr().out
        given = ["partition=gpu", "time=9", "mail-type=END", "comment='a b'", "nodelist=n1"]
        assert {f"#SBATCH --{words}" for words in given} <= {*out.splitlines()}
        assert "srun_options=(--label)\n" in out
    (tmp_path / "site.yaml").write_text("partitoin: gpu\n")
    assert submit.main(["--config", "smoke", "--dry_run", "--job", "site.yaml"]) == 2
    assert "did you mean 'partition'?); --help lists all (in site.yaml)" in capsys.readouterr().err


def test_a_number_in_the_file_of_the_job_is_a_text_where_a_text_is_expected(no_slurm, tmp_path, capsys):
    def ask(text):
        (tmp_path / "site.yaml").write_text(text)
        status = submit.main(["--config", "smoke", "--dry_run", "--job", "site.yaml"])
        return status, capsys.readouterr()

    status, answer = ask("account: 123\nqos: 0123\nexclude: 12\ngpu_type: 1080\ngpus_per_node: 2\n")
    assert status == 0, answer.err
    given = ["account=123", "qos=0123", "exclude=12", "gpus-per-node=1080:2"]
    assert {f"#SBATCH --{words}" for words in given} <= {*answer.out.splitlines()}
    for text, words in (("on", "True"), ("1.10", "1.1")):
        status, answer = ask(f"account: {text}\n")
        assert (status, answer.err) == (2, f"error: account is {words}; allowed: text, or none; write it in quotes (in site.yaml)\n")
    assert "quotes" not in ask("account: [a]")[1].err
    assert "quotes" not in ask("nodes: on")[1].err


@pytest.mark.parametrize("folder", ["runs/100%j", "runs/a'b", 'runs/a"b', "runs/a\\b", "runs/a&b", "runs/a;b", "runs/a#b"])
def test_a_folder_that_slurm_would_misread_is_refused(no_slurm, tmp_path, capsys, folder):
    assert submit.main(["--config", "smoke", "--dry_run", "--run_dir", folder]) == 2
    assert "letters, digits, spaces" in capsys.readouterr().err


def test_every_mistake_is_named_before_anything_is_made(no_slurm, tmp_path, capsys):
    def refuse(*arguments):
        assert submit.main(["--config", "smoke", *arguments]) == 2
        assert list(tmp_path.iterdir()) == []
        return capsys.readouterr().err

    error = refuse("--nodes", "0", "--batch_size", "x", "--time", "1", "--cluster", "local")
    assert [line.split(" is ")[0] for line in error.splitlines()] == ["error: nodes", "error: batch_size"]
    assert "less than the 3 processes" in refuse("--batch_size", "2", "--nodes", "3", "--cluster", "local")
    assert "less than 60 s" in refuse("--time", "1", "--cluster", "local")
    assert "world_size is 2, and --nodes 4 --tasks_per_node 1 start 4 processes" in refuse(
        "--nodes", "4", "--world_size", "2", "--cluster", "local"
    )
    assert "did you mean 'partition'" in refuse("--partiton", "x")
    assert "--cluster local" in refuse()


def nodes():
    return [cluster._parse_nodes(line) for line in SINFO.splitlines()]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"partition": "gpus"}, "partition is 'gpus', which this cluster does not have; allowed: gpu, long, main"),
        ({"time": 61}, "time is 61 min; partition main allows at most 60 min"),
        ({"nodes": 5}, "nodes is 5; partition main has 4 nodes and allows 4 for a job"),
        ({"nodes": 5, "partition": "gpu"}, "partition gpu has 8 nodes and allows 4 for a job"),
        ({"tasks_per_node": 3}, "3 tasks of 1 CPUs on a node are asked for; the largest node of partition main has 2 CPUs"),
        ({"cpus_per_task": 4}, "1 tasks of 4 CPUs"),
        ({"gpus_per_node": 9, "partition": "gpu"}, "gpus_per_node 9 on a node are asked for; the largest node of partition gpu has 8 GPUs"),
        ({"gpus_per_node": 1, "partition": "long"}, "has 0 GPUs"),
        ({"memory_gb": 65}, "memory_gb 65.0 on a node are asked for"),
        ({"gpus_per_node": 5, "gpu_type": "h100", "partition": "gpu"}, "the largest node of partition gpu has 4 h100 GPUs"),
    ],
)
def test_a_request_that_the_cluster_can_never_grant_is_refused(request_, words, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch, which may know better
    with pytest.raises(UserError, match=re.escape(words)):
        cluster.check_request(Request(**request_), nodes())


def test_a_request_that_only_has_to_wait_is_a_note():
    assert cluster.check_request(Request(nodes=3), nodes()) == []
    assert cluster.check_request(Request(nodes=4), nodes()) == ["only 3 of the nodes that this job can use are up; it waits for 4"]
    assert cluster.check_request(Request(gpus_per_node=8, nodes=4, partition="gpu"), nodes()) == []
    assert cluster.check_request(Request(time=10_000, partition="long"), nodes()) == ["partition long is not up; the job waits until it is"]
    [note] = cluster.check_request(Request(), nodes()[2:])
    assert "no default one: its own rules must choose it; there are gpu, long" in note
    # A quality of service may allow more.
    assert cluster.check_request(Request(time=61, qos="long"), nodes()) == ["time is 61 min; partition main allows at most 60 min"]


def test_a_partition_that_the_cluster_chooses_by_its_own_rules_is_the_one_that_is_looked_at(fake_slurm, tmp_path):
    fake_slurm()
    answer = "sbatch: Job 5 to start at 2030-01-02T03:04:05 using 8 processors on nodes n1 in partition gpu"
    (tmp_path / "bin/sbatch").write_text(f'#!/bin/sh\necho "$*" >>../calls\necho {answer} >&2\n')
    asked = Request(time=61, gpus_per_node=8, gpu_type="a100", tasks_per_node=1, memory_gb=2)
    choice, waits = cluster.check_request(asked, nodes())
    assert choice == "this cluster's own rules choose the partition gpu for such a job"
    assert waits.startswith("only 0 of the nodes that this job can use are up")
    asked = "--test-only --nodes=1 --ntasks-per-node=1 --time=61 --gpus-per-node=a100:8 --mem=2048M --wrap=true\n"
    assert (tmp_path / "calls").read_text() == asked
    with pytest.raises(UserError, match="partition gpu has 8 nodes"):
        cluster.check_request(Request(time=61, nodes=9), nodes())
    with pytest.raises(UserError, match="time is 61 min"):  # in a partition that the user chose
        cluster.check_request(Request(time=61, partition="main"), nodes())
    (tmp_path / "bin/sbatch").write_text(f"#!/bin/sh\necho {answer.replace('gpu', 'main')} >&2\n")  # where the job would wait for ever
    with pytest.raises(UserError, match="time is 61 min"):
        cluster.check_request(Request(time=61), nodes())


def test_a_cluster_for_sbatch_alone_is_refused(monkeypatch):
    monkeypatch.setenv("SBATCH_CLUSTERS", "other")
    with pytest.raises(UserError, match="SBATCH_CLUSTERS is 'other', which sbatch alone would heed: set SLURM_CLUSTERS instead"):
        cluster.check_request(Request(), nodes())
    with pytest.raises(ValidationError, match="set SLURM_CLUSTERS"):
        Request(sbatch="--clusters=other")


def test_a_partition_of_the_users_own_environment_is_the_one_that_is_looked_at(monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "long,gpu")
    assert cluster.check_request(Request(gpus_per_node=8, nodes=4), nodes()) == []
    with pytest.raises(UserError, match="largest node of partition main has 2 GPUs"):
        cluster.check_request(Request(gpus_per_node=8, partition="main"), nodes())


def test_a_job_submitted_within_another_inherits_nothing_of_it(fake_slurm, tmp_path, monkeypatch):
    fake_slurm(sinfo=(0, SINFO), squeue=(0, "PENDING 2030-01-02T03:04:05"))
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\nenv >../seen\necho Submitted batch job 11\n")
    outer = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100", "SLURM_CPU_BIND": "none", "SLURM_GPUS_PER_TASK": "1", "RANK": "3"}
    outer["SRUN_CPUS_PER_TASK"] = "8"
    own = {"SLURM_CONF": "/x", "SBATCH_ACCOUNT": "mine", "SBATCH_EXCLUSIVE": "user"}
    over = {"SBATCH_PARTITION": "gpu", "SBATCH_TIMELIMIT": "1", "SBATCH_SIGNAL": "B:TERM", "SBATCH_MEM_PER_CPU": "1", "SBATCH_WAIT": "1"}
    for name, value in (outer | own | over).items():
        monkeypatch.setenv(name, value)

    def see(run_dir, *options):
        assert submit.main(["--config", "smoke", "--run_dir", run_dir, *options]) == 0
        seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
        return {name for name in {*outer, *own, *over} if name in seen}

    assert see("runs/a", "--partition", "main", "--memory_gb", "1") == {*own}
    assert {*outer} <= {*os.environ}  # this process keeps them
    assert see("runs/b") == {*own, "SBATCH_PARTITION", "SBATCH_MEM_PER_CPU"}  # the user's defaults, where nothing else is asked for
    # Outside of a job they are the user's own choice.
    monkeypatch.delenv("SLURM_JOB_ID")
    assert {"SLURM_CPU_BIND", "SRUN_CPUS_PER_TASK"} <= see("runs/c")


def test_what_sbatch_would_heed_beside_the_options_of_a_job_is_dropped_and_no_more(monkeypatch):
    def see(request, **values):
        for name, value in values.items():
            monkeypatch.setenv(f"SBATCH_{name}", value)
        with submission.queueing(make_options(Request, request)):
            return {name for name in values if f"SBATCH_{name}" in os.environ}

    own = {"GRES": "gpu:1", "TRES_PER_TASK": "gres/gpu:1", "CPUS_PER_GPU": "4"}
    assert see({}, **own) == {*own}
    assert see({"gpus_per_node": 2}, **own) == {"CPUS_PER_GPU"}
    assert see({"cpus_per_task": 2}, **own | {"TRES_PER_TASK": "cpu:4"}) == {"GRES"}
    assert see({"gpus_per_node": 2}, GRES="lscratch:5") == {"GRES"}
    assert {name for name in own if f"SBATCH_{name}" in os.environ} == {*own}


def test_a_queue_that_gives_no_answer_is_not_an_empty_one(fake_slurm, tmp_path, capsys):
    fake_slurm(sinfo=(0, SINFO), squeue=(1, "slurm_load_jobs error: Socket timed out"))
    Path("runs/a/slurm").mkdir(parents=True)
    Path("runs/a/slurm/job.json").write_text(json.dumps({"job": "12", "folder": mark_folder(Path("runs/a"))}))
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a"]) == 1
    assert "Socket timed out" in capsys.readouterr().err
    assert jobs.main(["cancel", "runs/a"]) == 1
    assert jobs.main([]) == 0
    answer = capsys.readouterr()
    assert "Socket timed out; jobs that only wait in the queue are not known" in answer.err
    assert re.search(r"^a +not started", answer.out, re.MULTILINE)


def test_a_cluster_of_many_nodes_is_read_in_the_short_forms_of_their_numbers(fake_slurm, capsys):
    line = "main*|up|1:00:00|1-{most}|{count}|idle|64|512000|(null)"
    for most, count, allowed in (("1K", "1500", 1024), ("1.50K", "2K", 1536), ("infinite", "4K", 4096), ("?", "8", 8)):
        nodes = [cluster._parse_nodes(line.format(most=most, count=count))]
        assert cluster.check_request(Request(nodes=allowed), nodes) == []
        with pytest.raises(UserError, match=f"allows {allowed} for a job"):
            cluster.check_request(Request(nodes=allowed + 1), nodes)
    fake_slurm(sinfo=(0, line.format(most="1K", count="1500")))
    assert submit.main(["--config", "smoke", "--dry_run", "--nodes", "2"]) == 0
    assert capsys.readouterr().err == ""


def test_gpus_of_one_type_and_several_partitions_may_be_asked_for(no_slurm, capsys):
    assert cluster.check_request(Request(gpus_per_node=4, gpu_type="h100", nodes=3, partition="long,gpu"), nodes()) == []
    options = ["--config", "smoke", "--dry_run", "--partition", "long,gpu"]
    assert submit.main([*options, "--gpus_per_node", "4", "--gpu_type", "h100"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=h100:4\n" in text
    assert "#SBATCH --partition=long,gpu\n" in text
    assert submit.main([*options, "--gpus_per_node", "1", "--tasks_per_node", "2"]) == 2
    assert "tasks_per_node is 2, and gpus_per_node 1: at most one process for each GPU is allowed" in capsys.readouterr().err
    assert submit.main([*options, "--gpu_type", "h100"]) == 2
    assert "gpu_type has no effect without GPUs" in capsys.readouterr().err
    assert submit.main([*options[:-1], "long,"]) == 2
    assert "partition is 'long,'; allowed: " in capsys.readouterr().err


def test_where_ranks_meet_is_the_users_choice_and_no_launchers(monkeypatch):
    own = {"MASTER_ADDR": "node1", "MASTER_PORT": "23456"}
    assert list_inherited(own) == []
    assert {*list_inherited(own | {"RANK": "0"})} == {*own, "RANK"}


def test_more_tasks_than_cpus_may_be_asked_for_in_so_many_words():
    with pytest.raises(UserError, match="the largest node of partition main has 2 CPUs"):
        cluster.check_request(Request(tasks_per_node=3), nodes())
    assert cluster.check_request(Request(tasks_per_node=3, sbatch="--overcommit"), nodes()) == []


def test_the_filters_and_formats_of_a_users_shell_hide_no_job(fake_slurm, tmp_path, monkeypatch):
    fake_slurm(sinfo=(0, SINFO))
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\nenv >../seen\n")
    kept = {"SLURM_CONF": "/x", "SLURM_CLUSTERS": "a"}
    dropped = {"SQUEUE_PARTITION": "x", "SQUEUE_STATES": "PD", "SINFO_FORMAT": "%P", "SLURM_TIME_FORMAT": "relative"}
    dropped["SCANCEL_STATE"] = "PENDING"
    for name, value in (kept | dropped).items():
        monkeypatch.setenv(name, value)
    assert cluster.read_jobs() == []
    seen = (tmp_path / "seen").read_text().splitlines()
    assert [name for name, value in (kept | dropped).items() if f"{name}={value}" in seen] == [*kept]


def test_a_command_of_slurms_that_takes_too_long_is_told_in_words(fake_slurm, tmp_path):
    fake_slurm()
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\nexec sleep 30\n")
    with pytest.raises(RunError, match=r"^squeue gives no answer within 0\.1 s$"):
        cluster.run_slurm("squeue", "--me", timeout_s=0.1)


def test_slurms_times_and_counts_are_read():
    times = {"30:00": 30, "1:30": 1.5, "2:00:00": 120, "1-12:00:00": 2160, "infinite": float("inf"), "UNLIMITED": float("inf")}
    assert {text: cluster.parse_time(text) for text in times} == times
    counts = {"(null)": 0, "gpu:2": 2, "gpu:a100:4(S:0-1),gpu:h100:4": 8, "shard:8,gpu:1": 1, "mygpu:3": 0, "gpu:v100-16:2(IDX:0,1)": 2}
    assert {text: cluster.count_gpus(text) for text in counts} == counts


def test_a_job_gets_the_very_config_that_was_checked():
    values = {
        "run_dir": "/a b/c",
        "dataset": "synthetic",
        "steps": 7,
        "report": False,
        "warmup": 1e-7,
        "wandb_project": "x y",
        "seed": 2**62,
    }
    config = make_config(values)
    assert parse_command_line(list_arguments(config)) == config
    assert list_arguments(make_config({})) == ()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_job_on_this_machine_is_started_leaves_none_behind(tmp_path, monkeypatch, number):
    events = []

    class Process:
        def poll(self):
            return 143 if "told" in events else None

        def send_signal(self, _):
            events.append("told")

    class Started:
        job_id, _process = "1", Process()

        def done(self):
            return "told" in events

    def start(*_):
        signal.raise_signal(number)  # to this thread, and now
        time.sleep(0.1)
        events.append("started")
        return Started()

    monkeypatch.setattr(submission, "_start_locally", start)
    monkeypatch.setattr(submission, "_prepare_environment", lambda *_: None)
    assert submission.run_locally(make_options(Request, {}), [make_config({"run_dir": str(tmp_path / "run")})])
    assert events == ["started", "told"]


@pytest.mark.parametrize(
    ("visible", "driver", "expected"),
    [
        ("2,3", 8, ["2", "3", "2"]),  # the user's own, and no others
        (" 2 ,3,2,-1,5", 8, ["2", "3", "2"]),
        ("GPU-8f12, MIG-77", 8, ["GPU-8f12", "MIG-77", "GPU-8f12"]),
        ("3", 8, ["3", "3", "3"]),  # two runs at a time share it
        (None, 8, ["0", "1", "0"]),
        (None, 0, ["0", "0", "0"]),  # where the driver does not tell
    ],
)
def test_runs_on_this_machine_have_the_gpus_that_their_user_has(tmp_path, monkeypatch, visible, driver, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(submission, "_GPUS", tmp_path / "gpus")
    for number in range(driver):
        (tmp_path / "gpus" / f"0000:{number:02}:00.0").mkdir(parents=True)
    given, running = [], []

    class Started:
        job_id, _process = "1", None

        def done(self):
            is_first = running[0] is self
            if is_first and len(running) > 1:  # the older of two ends
                running.remove(self)
                return True
            return len(given) == 3

    def start(request, config, gpus):
        given.append(*gpus)
        running.append(Started())
        return running[-1]

    monkeypatch.setattr(submission, "_start_locally", start)
    monkeypatch.setattr(submission, "_prepare_environment", lambda *_: None)
    configs = [make_config({"run_dir": str(tmp_path / name)}) for name in "abc"]
    submission.run_locally(make_options(Request, {"cluster": "local", "gpus_per_node": 1}), configs, parallel=2)
    assert given == expected


def test_a_run_that_another_submission_has_come_to_first_is_left_out(tmp_path, monkeypatch, capsys):
    configs = {name: make_config({"run_dir": str(tmp_path / name)}) for name in ("locked", "in use", "finished")}
    read = lambda path, _: RunState(path, path.name, is_active=path.name == "in use", is_finished=path.name == "finished", job="12")  # noqa: E731
    monkeypatch.setattr(submission, "read_state", read)
    monkeypatch.setattr(submission, "_prepare_environment", lambda *_: None)
    monkeypatch.setattr(submission.LocalExecutor, "submit", None)
    (tmp_path / "locked/slurm").mkdir(parents=True)
    with submission._submitting_alone(tmp_path / "locked/slurm"):
        statuses = submission.run_locally(make_options(Request, {}), [*configs.values()])
    assert statuses == {config.run_dir: 0 if name == "finished" else 2 for name, config in configs.items()}
    locked, used = capsys.readouterr().err.splitlines()
    assert locked == f"error: another submission to {tmp_path / 'locked'} is under way: wait for it"
    assert used == f"error: run_dir {tmp_path / 'in use'} is in use by job 12 (in use): wait for it, or use another run_dir"
    assert not list(tmp_path.glob("*/slurm/job.json"))


def test_a_run_on_this_machine_sees_its_gpus_alone(tmp_path, monkeypatch):
    submitted, seen = [], []

    def submit(_, work):
        submitted.append(work)
        raise KeyboardInterrupt

    monkeypatch.setattr(submission.LocalExecutor, "submit", submit)
    monkeypatch.setattr("launch.training.main", lambda _: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]) or 0)
    config = make_config({"run_dir": str(tmp_path / "run")})
    (tmp_path / "run/slurm").mkdir(parents=True)
    for gpus in (["7", "MIG-3"], []):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with pytest.raises(KeyboardInterrupt):
            submission._start_locally(make_options(Request, {}), config, gpus)
        with pytest.raises(SystemExit):
            submitted[-1]()
    assert seen == ["7,MIG-3", ""]


@pytest.mark.parametrize(
    ("visible", "words"),
    [("2", "names 1"), ("", "names 0"), ("-1", "names 0"), ("NoDevFiles", "names 0"), ("0,0", "names 1"), (None, "this machine has 1")],
)
def test_more_gpus_than_this_machine_has_are_refused(tmp_path, monkeypatch, capsys, visible, words):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "gpus/0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr(submission, "_GPUS", tmp_path / "gpus")
    arguments = ["--cluster", "local", "--nodes", "2", "--gpus_per_node", "1", "--run_dir", str(tmp_path / "run")]
    assert submit.main(arguments) == 2
    assert re.search(rf"nodes times gpus_per_node is 2, and .*{words}$", capsys.readouterr().err.strip())
    assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_ends_all_of_a_job_though_one_of_its_processes_has_just_ended(tmp_path, monkeypatch):
    gone = subprocess.Popen(["sleep", "60"])
    list_gone = [psutil.Process(gone.pid)]
    gone.kill()
    gone.wait()
    # The rank is killed first: it must not be what lets its controller end.
    controller = subprocess.Popen(["bash", "-c", "sleep 60 & wait; sleep 60"])
    list_children = psutil.Process.children
    monkeypatch.setattr(psutil.Process, "children", lambda self, **how: list_gone + list_children(self, **how))
    while not list_children(psutil.Process(controller.pid)):
        time.sleep(0.01)
    (rank,) = list_children(psutil.Process(controller.pid))
    config = make_config({"run_dir": str(tmp_path / "run")})
    runs = submission._LocalRuns(make_options(Request, {}), 1, [], deque())
    runs.active[config.run_dir] = submission._LocalRun(config, 0, [], SimpleNamespace(_process=controller))
    runs.is_stopping = True
    runs.stop()
    assert controller.wait(10) == -signal.SIGKILL
    psutil.wait_procs([rank], 10)
    assert not rank.is_running()


DIVERGING = [*TINY, "--learning_rate", "100", "--schedule", "constant", "--momentum", "0.99"]


@dataclasses.dataclass(frozen=True)
class TrainInJob:
    """What a job runs, as work for a rank."""

    run_dir: str

    def __call__(self):
        Training(self.run_dir, (*DIVERGING, "--run_dir", self.run_dir))()


@pytest.mark.slow
def test_how_a_failed_run_of_several_ranks_ends_is_noted(tmp_path):
    # slurm/train.sh starts the same as a program.
    arguments = [*DIVERGING, "--run_dir", str(tmp_path / "program")]
    port = str(find_free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.training", *arguments],
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in "01"
    ]
    run_ranks(tmp_path, TrainInJob(str(tmp_path / "submitit")), 2, expect=1)
    assert [rank.wait(120) for rank in ranks] == [1, 1]
    for name in ("submitit", "program"):
        assert json.loads((tmp_path / name / "slurm/end.json").read_text())["status"] == 1


@pytest.mark.parametrize("job", ["9" * 5000, "-1", "1e3", "x"])
def test_a_note_of_a_job_that_can_be_none_is_no_obstacle(tmp_path, job):
    (tmp_path / "slurm").mkdir()
    note = {"job": job, "log": "1_0_log.out", "folder": mark_folder(tmp_path)}
    (tmp_path / "slurm/job.json").write_text(json.dumps(note))
    assert read_state(tmp_path, []).state == "not started"


def test_a_run_on_this_machine_that_only_starts_is_active(tmp_path):
    folder = tmp_path / "run"
    (folder / "slurm").mkdir(parents=True)
    # As submitit's controller, before a rank has taken the lock.
    words = ["-c", "import time; time.sleep(60)", "submitit.local._local", str(folder / "slurm")]
    with subprocess.Popen([sys.executable, *words]) as controller:
        log = folder / f"slurm/{controller.pid}_0_log.out"
        (folder / "slurm/job.json").write_text(json.dumps({"job": str(controller.pid), "log": str(log), "folder": mark_folder(folder)}))
        wait_for(lambda: read_state(folder, []).state == "starting")
        state = read_state(folder, [])
        assert (state.is_active, state.pid) == (True, controller.pid)
        with pytest.raises(UserError, match=rf"in use by job {controller.pid} \(starting\): wait for it"):
            submission.check_free(state, configure(run_dir=str(folder)))
        controller.kill()
    assert read_state(folder, []).state == "not started"


@pytest.mark.slow
def test_a_job_on_this_machine_goes_on_after_signals_and_is_looked_after(tmp_path):
    folder = tmp_path / "runs/a b"
    command = ["launch.submit", "--cluster", "local", "--tasks_per_node", "2", *TINY, "--steps", "100000", "--run_dir", str(folder)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_API_KEY": KEY, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "9"}
    process = subprocess.Popen([sys.executable, "-m", *command], env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        state = wait_for(lambda: (now := read_state(folder, [])).pid and now.step and now)
        assert (state.state, state.total, state.restarts) == ("running", 100_000, 0)
        assert run(*command[:-1], folder).stderr.endswith("(running): wait for it, or use another run_dir\n")

        os.kill(state.pid, signal.SIGSTOP)
        old = time.time() - 300
        for name in ("metrics.jsonl", "starts.jsonl"):
            os.utime(folder / name, (old, old))
        listing = run("launch.jobs", tmp_path / "runs").stdout
        os.kill(state.pid, signal.SIGCONT)
        assert re.search(r"^a b +running, silent for 5 min \d\d s +\d+/100000 ", listing, re.MULTILINE), listing

        os.kill(state.pid, signal.SIGUSR1)  # as before a time limit: saved, and started again
        wait_for(lambda: len(read_starts(folder)) == 2)
        assert read_starts(folder)[1] > 0
        assert not (folder / "slurm/end.json").exists()  # how the first start ended says nothing of the second
        wait_for(lambda: read_state(folder, []).step > read_starts(folder)[1])

        answer = run("launch.jobs", "cancel", folder)
        saved = re.search(r"is stopped; saved at step (\d+)\. The same command", answer.stdout)
        assert saved, answer
        assert process.wait(60) == 143
        assert process.stdout.read().endswith(f"{folder}: stopped, saved after step {saved[1]}\n")
    finally:
        process.terminate()  # it hands this on to its ranks
        process.wait(60)
    assert run("launch.jobs", "cancel", folder).returncode == 2

    again = [*command[:-1], str(folder), "--steps", str(int(saved[1]) + 5)]
    assert "steps: 100000 there" in run(*again).stderr

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert (folder / "slurm").stat().st_mode & 0o777 == 0o700
    pickles = list((folder / "slurm").glob("*.pkl"))
    assert len(pickles) == 2
    for path in pickles:
        assert path.stat().st_mode & 0o777 == 0o600
        names = [argument for operation, argument, _ in pickletools.genops(path.read_bytes()) if operation.name.endswith("UNICODE")]
        assert {name for name in names if name.startswith(("launch", "submitit", "mnist_dist", "cloudpickle"))} == {
            "launch.training",
            "submitit.core.utils",
        }


@pytest.mark.slow
def test_a_sweep_on_this_machine_shows_what_failed_and_repeats_only_that(tmp_path):
    folder = tmp_path / "sweep"
    rest = [*TINY, "--steps", "4", "--schedule", "constant", "--momentum", "0", "--run_dir", str(folder)]
    rest = [*[word for word in rest if word not in ("--learning_rate", "0.01")], "--cluster", "local", "--parallel", "2"]
    answer = run("launch.sweep", "lr=0.01,100", *rest)
    assert answer.returncode == 1, answer
    assert answer.stdout.count("started here") == 2
    table = [line.split() for line in answer.stdout.splitlines()[-2:]]
    assert table[0][0] == "0.01"
    assert table[0][-2:] == ["1/1", "finished"]
    assert table[1] == ["100.0", "0/1", "failed", "(exit", "status", "1)"]
    answer = run("launch.sweep", "lr=0.01,100", *rest)
    assert re.findall("learning_rate=(.*): started here", answer.stdout) == ["100.0"]
    assert run("launch.sweep", "lr=0.01", *rest).stderr.endswith("1 of 1 runs are finished and 0 queued or running\n")


def test_a_sweeps_mistakes_are_all_named_and_nothing_is_made(no_slurm, tmp_path, capsys):
    def refuse(*words):
        assert sweep.main([*words, "--config", "smoke", "--cluster", "local"]) == 2
        return capsys.readouterr().err

    error = refuse("lr=0.05,-1,x", "batch_size=32,0")
    assert [line for line in error.splitlines() if "learning_rate" in line] == [
        "error: learning_rate is '-1'; allowed: a number, above 0, at most 100",
        "error: learning_rate is 'x'; allowed: a number, above 0, at most 100",
    ]
    assert error.count("batch_size is '0'") == 1
    assert "did you mean 'learning_rate'" in refuse("learning_rat=1")
    assert "swept and also given" in refuse("seed=0,1", "--seed", "2")
    assert "give it once, as --run_dir" in refuse("run_dir=a,b")
    assert "nothing to sweep" in refuse()
    assert "value (without dashes)" in refuse("--lr=0.1,0.2")
    assert "'lr' is not a file, and not of the form option=value,value" in refuse("lr", "0.1", "0.2")
    (tmp_path / "mine.py").write_text('"""A task: no YAML."""\n')
    for order in (["mine.py", "width=32,64"], ["width=32,64", "mine.py"]):
        assert "'mine.py' is not a sweep: write --task mine.py" in refuse(*order)
    (tmp_path / "mine.py").unlink()
    assert "no option 'nodes' here: it is one of the job, --nodes or in the file of --job" in refuse("nodes=1,2")
    assert "no option '--mem' here: use --memory_gb" in refuse("seed=0,1", "--mem", "8")
    assert "no option '--ntasks' here: use --nodes and --tasks_per_node" in refuse("seed=0,1", "--ntasks=4")
    assert "no option '--export' here: the script of the job sets it: the training needs" in refuse("seed=0,1", "--export=ALL")
    assert "no option 'parallel' here: it is --parallel of launch.sweep" in refuse("parallel=2", "seed=0,1")
    assert "no option 'chain' here: it is --chain of launch.submit" in refuse("chain=2", "seed=0,1")
    assert "give it once, as --config" in refuse("config=smoke,fast")
    (tmp_path / "job.yaml").write_text("seed: 2\n")
    words = "no option 'seed' here: it is one of the training, --seed or in the file of --config (in job.yaml)"
    assert words in refuse("lr=0.1,0.2", "--job", "job.yaml")
    (tmp_path / "job.yaml").unlink()
    assert "at most 1000" in refuse("seed=" + ",".join(map(str, range(1001))))
    assert "less than the 3 processes" in refuse("seed=0,1", "--batch_size", "2", "--tasks_per_node", "3")
    for text, words in (
        ("sweep: {seed: 3}", "seed needs a list"),
        ("swep: {seed: [3]}", "has 'swep'; allowed: config, sweep, fixed"),
        ("sweep: {seed: [true]}", "seed is True"),
        ("sweep: {}", "nothing to sweep"),
        ("sweep: [1]", "must hold lines"),
        ("sweep: {seed: [1]}\nfixed: {nodes: 2}", "no option 'nodes' here: it is one of the job"),
        ("sweep: {seed: [1], seed: [2]}", "stands there twice"),
        ("!!python/object/apply:os.system ['id']", "is not valid YAML"),
    ):
        (tmp_path / "s.yaml").write_text(text)
        assert words in refuse("s.yaml"), text
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


def test_each_run_of_a_sweep_that_differs_is_told_with_its_differences(no_slurm, tmp_path, capsys):
    for rate in ("0.1", "0.2"):
        folder = tmp_path / f"sweep/learning_rate={rate}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(configure(run_dir=str(folder), learning_rate=rate, seed=4).to_yaml())
    assert sweep.main(["lr=0.1,0.2", "--cluster", "local", "--run_dir", str(tmp_path / "sweep")]) == 2
    error = capsys.readouterr().err
    assert error.count("holds another run") == error.count("  seed: 4 there, 0 asked for") == 2
    assert len(re.findall(r"\nerror: +to go on with what is there, .*: --config (\S+)/config\.yaml --run_dir \1", error)) == 2


def test_a_file_that_is_the_value_of_a_tasks_option_is_not_taken_for_the_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "class Mine(Mnist):\n    table_file: str = option('', 'a table')\n"
    Path("mine.py").write_text(f"from mnist_dist.task import option\nfrom mnist_dist.tasks.mnist import Mnist\n\n\n{code}")
    Path("data.csv").write_text("a,b\n1,2\n")
    Path("s.yaml").write_text("config: null\nsweep: {seed: [0, 1]}\nfixed: {task: mine.py}\n")
    for words in (["--table_file", "data.csv", "s.yaml"], ["s.yaml", "--table_file", "data.csv"], ["--table_file=data.csv", "s.yaml"]):
        assert sweep.main([*words, "--dry_run"]) == 0, capsys.readouterr().err
        assert "--array=0-1" in capsys.readouterr().out


def test_the_sweep_of_the_package_is_found_from_any_folder_as_a_recipe_is(no_slurm, tmp_path, capsys):
    assert sweep.main(["configs/sweep.yaml", "--dry_run"]) == 0, capsys.readouterr().err
    assert "--array=0-5" in capsys.readouterr().out
    assert sweep.main(["configs/sweeps.yaml", "--dry_run"]) == 2
    assert "'configs/sweeps.yaml' is not a file, and not of the form option=value,value" in capsys.readouterr().err
    (tmp_path / "sweep.yaml").write_text("sweep: {seed: [0, 1]}\n")  # a file of one's own comes first
    assert sweep.main(["sweep.yaml", "--dry_run"]) == 0
    assert "--array=0-1" in capsys.readouterr().out


def test_a_sweep_that_is_given_as_a_recipe_is_told_as_one(no_slurm, tmp_path, capsys):
    (tmp_path / "my sweep.yaml").write_text("config: smoke\nfixed: {seed: 1}\n")
    for program, words in ((submit, ["--cluster", "local"]), (sweep, ["momentum=0.1,0.2", "--dry_run"])):
        assert program.main([*words, "--config", "my sweep.yaml"]) == 2
        error = capsys.readouterr().err
        assert error == "error: config file my sweep.yaml is a sweep: python -m launch.sweep 'my sweep.yaml'\n"
        assert program.main([*words, "--config", "configs/sweep.yaml"]) == 2
        assert "configs/sweep.yaml is a sweep: python -m launch.sweep /" in capsys.readouterr().err


def test_a_sweep_counts_its_combinations_before_it_makes_them(no_slurm, capsys):
    thousand = ",".join(map(str, range(1000)))
    start = time.process_time()
    words = [f"seed={thousand}", f"learning_rate={thousand}", f"momentum={thousand}", f"weight_decay={thousand}"]
    assert sweep.main([*words, "--config", "smoke", "--cluster", "local"]) == 2
    assert f"the sweep has {1000**4} combinations; at most 1000 are allowed" in capsys.readouterr().err
    assert time.process_time() - start < 1


def test_an_option_is_swept_once_and_its_folder_is_found_as_everywhere(no_slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for words in (["seed=0", "seed=1,2"], ["lr=0.1", "learning_rate=0.2,0.3"]):
        assert sweep.main([*words, "--config", "smoke", "--dry_run"]) == 2
        assert "is swept twice" in capsys.readouterr().err
    (tmp_path / "s.yaml").write_text("sweep: {seed: [1]}\nfixed: {lr: 0.1, learning_rate: 0.2}\n")
    assert sweep.main(["s.yaml", "--dry_run"]) == 2
    assert "stands there twice" in capsys.readouterr().err
    assert sweep.main(["seed=0,1", "--config", "smoke", "--run_dir=~/sweeps", "--dry_run"]) == 0
    assert f"{tmp_path}/home/sweeps/slurm" in capsys.readouterr().out


def test_a_sweep_reads_its_recipe_once(no_slurm, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("# " + "x" * 30_000 + "\n" + "steps: 5\ndataset: synthetic\n")
    start = time.process_time()
    assert sweep.main(["seed=" + ",".join(map(str, range(300))), "--config", "recipe.yaml", "--dry_run"]) == 0
    assert time.process_time() - start < 5
    assert capsys.readouterr().out


@pytest.mark.parametrize("value", ["a/b", "../x", "/tmp/x"])
def test_a_swept_value_does_not_make_a_folder_elsewhere(no_slurm, tmp_path, capsys, value):
    assert sweep.main([f"wandb_project=a,{value}", "--config", "smoke", "--cluster", "local"]) == 2
    assert "cannot hold a /" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory_gb", ["0.0004", "0", "1e-9", "0.00099"])
def test_memory_that_slurm_would_read_as_all_is_refused(no_slurm, capsys, memory_gb):
    assert submit.main(["--config", "smoke", "--dry_run", "--memory_gb", memory_gb]) == 2
    assert "allowed: a number (GB), at least 0.001" in capsys.readouterr().err
    assert submit.main(["--config", "smoke", "--dry_run", "--memory_gb", "0.001"]) == 0
    assert "--mem=1M\n" in capsys.readouterr().out


@pytest.fixture
def fake_slurm(monkeypatch, tmp_path):
    """Slurm's commands, each of which prints a text and ends with a status."""

    def make(**answers):
        for name, (status, text) in ({"squeue": (0, ""), "scontrol": (0, ""), "sbatch": (0, ""), "srun": (0, "")} | answers).items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\ncat <<'END' >&{1 if status == 0 else 2}\n{text}\nEND\nexit {status}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")

    return make


def test_a_dry_run_needs_no_controller_that_answers(fake_slurm, capsys):
    fake_slurm(sinfo=(1, "slurm_load_partitions: Unable to contact slurm controller"))
    assert submit.main(["--config", "smoke", "--dry_run"]) == 0
    answer = capsys.readouterr()
    assert "#SBATCH" in answer.out
    assert "Unable to contact slurm controller; the request is not compared with the cluster" in answer.err
    assert submit.main(["--config", "smoke"]) == 1
    assert "Unable to contact slurm controller" in capsys.readouterr().err


def test_a_job_that_sbatch_refuses_leaves_no_folder_but_those_that_were_there(fake_slurm, tmp_path, capsys):
    fake_slurm(sinfo=(0, SINFO), sbatch=(1, "sbatch: error: Batch job submission failed: Invalid account"))
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a"]) == 2
    assert "sbatch refused the job: Batch job submission failed: Invalid account" in capsys.readouterr().err
    assert list(Path().iterdir()) == []
    Path("runs/a/slurm").mkdir(parents=True)
    Path("runs/a/slurm/notes").write_text("mine")
    Path("runs/a/slurm").chmod(0o755)
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a"]) == 2
    assert Path("runs/a/slurm/notes").read_text() == "mine"
    assert Path("runs/a/slurm").stat().st_mode & 0o777 == 0o755


def test_what_a_site_prints_beside_sbatchs_answer_is_no_job(fake_slurm, capsys):
    fake_slurm(sinfo=(0, SINFO), sbatch=(0, "NOTE: you have 5 job 3 slots left\nSubmitted batch job 17 on cluster one\nsee job 4"))
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a"]) == 0
    assert "submitted job 17:" in capsys.readouterr().out
    assert json.loads(Path("runs/a/slurm/job.json").read_text())["job"] == "17"
    (Path("../bin") / "sbatch").write_text("#!/bin/sh\necho 'job 5 it is'\n")
    assert submit.main(["--config", "smoke", "--run_dir", "runs/b"]) == 1
    assert "sbatch's answer has no number of a job, which may be queued all the same" in capsys.readouterr().err


def test_an_answer_of_squeue_in_another_format_is_no_empty_queue(fake_slurm, capsys):
    fake_slurm(sinfo=(0, SINFO), squeue=(0, "  JOBID PARTITION NAME\n   31 debug run"))
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a"]) == 1
    assert "squeue's answer is not in the format that was asked for: '  JOBID PARTITION NAME'" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_of_two_submissions_at_once_to_one_folder_the_second_is_refused(fake_slurm, capsys):
    fake_slurm(sinfo=(0, SINFO))
    (Path("../bin") / "sbatch").write_text("#!/bin/sh\nmkfifo ../go; cat ../go >/dev/null\necho 'Submitted batch job 17'\n")
    options = ["--config", "smoke", "--run_dir", "runs/a"]
    first = subprocess.Popen([sys.executable, "-m", "launch.submit", *options], env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not Path("../go").exists():
        assert first.poll() is None
        time.sleep(0.05)
    assert submit.main([*options, "--seed", "2"]) == 2
    assert re.search("another submission to .*/runs/a is under way: wait for it", capsys.readouterr().err)
    assert Path("runs/a/slurm").is_dir()
    Path("../go").write_text("on")
    assert first.wait(60) == 0
    assert json.loads(Path("runs/a/slurm/job.json").read_text())["job"] == "17"


def test_a_log_on_a_full_disk_ends_no_job():
    program = f"source {ROOT}/launch/policy.sh; say hello; echo reached"
    answer = subprocess.run(["bash", "-c", f"{program} 2>/dev/full"], text=True, capture_output=True)
    assert (answer.returncode, answer.stdout) == (0, "reached\n")


def test_of_a_chain_that_slurm_has_forgotten_the_last_job_is_shown(no_slurm, tmp_path):
    write_note(tmp_path, "job", {"job": "12", "chain": "12:13:14", "log": str(tmp_path / "slurm/12.log")})
    write_note(tmp_path, "end", {"job": "13", "status": 85})
    assert read_state(tmp_path, []).job == "13"


def count_up(first):
    """A stand-in for sbatch that keeps what it is called with, and numbers its jobs; it refuses those from `first` on."""
    return f"""#!/bin/sh
echo "sbatch $*" >>../calls
number=$(grep -c ^sbatch ../calls)
[ "$number" -lt {first} ] || {{ echo "sbatch: error: Batch job submission failed: too many" >&2; exit 1; }}
echo "Submitted batch job 1$number"
"""


def test_a_chain_is_queued_as_jobs_that_wait_for_each_other(fake_slurm, tmp_path, capsys):
    fake_slurm(sinfo=(0, SINFO), squeue=(0, "PENDING 2030-01-02T03:04:05"))
    (tmp_path / "bin/sbatch").write_text(count_up(9))
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a", "--chain", "3"]) == 0
    out = capsys.readouterr().out
    assert "submitted job 11: 1 process on 1 node; log: " in out
    assert "its chain goes on with 12, 13;" in out
    assert "Slurm expects it to start at 2030-01-02 03:04:05\n" in out
    scripts = [Path(f"runs/a/slurm/{job}_submission.sh").read_text() for job in (11, 12, 13)]
    assert not re.search("dependency|leave_if_done", scripts[0])
    assert "#SBATCH --dependency=afterany:11\n" in scripts[1]
    assert "#SBATCH --dependency=afterany:11:12\n" in scripts[2]
    folder = tmp_path / "here/runs/a"
    assert f"\nleave_if_done {sys.executable} -P -m launch.chain 11:12 --run_dir={folder}\n" in scripts[2]
    note = json.loads(Path("runs/a/slurm/job.json").read_text())
    assert (note["job"], note["chain"], note["log"]) == ("11", "11:12:13", str(folder / "slurm/11.log"))
    assert {path.stat().st_mode & 0o777 for path in Path("runs/a/slurm").glob("*.pkl")} == {0o600}


def test_the_chain_of_the_documents_is_queued_on_a_cluster_of_several_and_ends_with_a_refusal(fake_slurm, tmp_path):
    fake_slurm()
    refusal = '[ "$number" -lt 4 ] || { echo "sbatch: error: too many" >&2; exit 1; }'
    calls = 'echo "$CHAIN $*" >>../calls\nnumber=$(grep -c . ../calls)'
    (tmp_path / "bin/sbatch").write_text(f'#!/bin/sh\n{calls}\n{refusal}\necho "1$number;alpha"\n')
    [loop] = re.findall(r"^    jobs=\n.*?^    done\n", (ROOT / "docs/launching.md").read_text(), re.MULTILINE | re.DOTALL)
    assert subprocess.run(["/bin/bash", "-c", loop], text=True, capture_output=True).stderr == "sbatch: error: too many\n"
    script = "slurm/train.sh --config mnist"
    waits = [f"{jobs} --parsable --dependency=afterany:{jobs} {script}" for jobs in ("11", "11:12", "11:12:13")]
    assert (tmp_path / "calls").read_text().splitlines() == [f" --parsable {script}", *waits]


def test_a_chain_of_which_a_part_is_refused_is_taken_back(fake_slurm, tmp_path, capsys):
    fake_slurm(sinfo=(0, SINFO))
    (tmp_path / "bin/sbatch").write_text(count_up(3))
    (tmp_path / "bin/scancel").write_text('#!/bin/sh\necho "scancel $*" >>../calls\n')
    (tmp_path / "bin/scancel").chmod(0o755)
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a", "--chain", "3"]) == 2
    assert "sbatch refused the job: Batch job submission failed: too many" in capsys.readouterr().err
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "scancel 12 11"
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_an_estimate_of_the_start_never_delays(fake_slurm, tmp_path):
    fake_slurm(squeue=(0, "PENDING N/A"))
    for text in ("PENDING N/A", "RUNNING 2030-01-02T03:04:05", "", "odd"):
        (tmp_path / "bin/squeue").write_text(f"#!/bin/sh\necho '{text}'\n")
        start = time.monotonic()
        assert cluster.estimate_start("12") == ""
        assert time.monotonic() - start < 15
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\nexec sleep 30\n")
    start = time.monotonic()
    assert cluster.estimate_start("12") == ""
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("end", "last", "reason"),
    [
        ({}, {}, None),  # killed, or the node failed
        ({"job": "12", "status": 143}, {}, None),
        ({"job": "12", "status": 85}, {}, None),
        ({"job": "12", "status": 1}, {"why": "failed: rank 1 is gone", "lasting": False}, None),
        ({"job": "12", "status": 1}, {"why": "failed: of an older version"}, None),
        ({"job": "12", "status": 2}, {}, "has failed for good in job 12, by a mistake"),
        ({"job": "11", "status": 2}, {}, None),  # before the chain
        ({"job": "13", "status": 1}, {"why": "failed: the loss is nan", "lasting": True}, "in job 13 (failed: the loss is nan)"),
        ({"job": "13", "status": 143}, {"why": "failed: the loss is nan", "lasting": True}, None),
        ({"job": "12", "status": 1}, {"why": "failed: the loss is nan", "lasting": True}, None),  # of job 13: 12 did not come to train
    ],
)
def test_a_job_of_a_chain_leaves_where_nothing_is_left_to_do(tmp_path, capsys, end, last, reason):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/end.json").write_text(json.dumps(end))
    (tmp_path / "starts.jsonl").write_text(json.dumps({"time": "2026-11-26T07:44:00+00:00", "step": 0, "job": "13"}) + "\n")
    (tmp_path / "ends.jsonl").write_text(json.dumps({"step": 3, "start": 1} | last) + "\n" if last else "")
    assert chain.main(["12:13", f"--run_dir={tmp_path}"]) == (1 if reason is None else 0)
    assert (reason or "") in capsys.readouterr().out


def test_a_job_of_a_chain_says_that_the_run_is_finished_without_torch(tmp_path):
    result = {"step": 60, "elapsed_s": 1.0, "images_per_s": 1.0, "world_size": 1, "test/loss": 0.5, "test/accuracy": 0.9}
    (tmp_path / "result.json").write_text(json.dumps(result))
    code = "import sys; from launch import chain; print(chain.main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "12", "--config", "smoke", f"--run_dir={tmp_path}"]
    answer = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert answer.stdout == f"{tmp_path} is finished: this job of its chain has nothing to do\n0 False\n", answer.stderr


@pytest.mark.parametrize("words", [[], ["x"], ["12:"], ["12;id"], ["12", "--steps", "x"]])
def test_a_chain_that_is_misspelt_is_a_mistake(capsys, words):
    assert chain.main(words) == 2
    assert re.match("error: (CHAIN|steps) is ", capsys.readouterr().err)


def test_a_chain_is_one_run_for_those_who_look(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/job.json").write_text(json.dumps({"job": "12", "chain": "12:13:14", "log": f"{tmp_path}/slurm/12.log"}))

    def read(*states):
        queue = [cluster.Job(str(12 + index), str(12 + index), state, "Dependency", "", 0) for index, state in enumerate(states)]
        run = read_state(tmp_path, queue)
        return run.job, run.state, run.waiting

    assert read("RUNNING", "PENDING", "PENDING") == ("12", "running", ("13", "14"))
    assert read("TIMEOUT", "PENDING", "PENDING") == ("13", "pending (Dependency)", ("14",))
    assert read("FAILED", "RUNNING", "PENDING") == ("13", "running", ("14",))
    assert read("PREEMPTED") == ("12", "preempted", ())  # and no longer active: where a site cancels, it does not come back
    assert jobs.locate_log(read_state(tmp_path, [cluster.Job("13", "13", "RUNNING", "", "", 0)])) == f"{tmp_path}/slurm/13.log"
    (tmp_path / "slurm/end.json").write_text(json.dumps({"job": "12", "status": 1}))
    assert read("FAILED", "COMPLETED", "COMPLETED") == ("12", "failed (exit status 1)", ())  # the others had nothing to do
    # The next one waits, and has no log yet: what there is to see is in the last one's.
    queue = [cluster.Job(str(number), str(number), "PENDING", "Dependency", "", 0) for number in (13, 14)]
    assert read_state(tmp_path, queue).job == "13"
    for number in (12, 13):
        (tmp_path / f"slurm/{number}.log").touch()
        assert jobs.locate_log(read_state(tmp_path, queue)) == f"{tmp_path}/slurm/{number}.log"
    (tmp_path / "slurm/13.log").unlink()
    result = {"step": 60, "elapsed_s": 1.0, "images_per_s": 1.0, "world_size": 1, "test/loss": 0.5, "test/accuracy": 0.9}
    (tmp_path / "result.json").write_text(json.dumps(result))
    run = read_state(tmp_path, queue)
    assert (run.job, run.is_finished, run.is_ending, jobs.locate_log(run)) == ("12", True, False, f"{tmp_path}/slurm/12.log")


def test_a_sweep_excludes_who_submits_one_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "_submit", lambda *_: [["12"]])
    monkeypatch.setattr(submission, "read_jobs", list)
    one, other = (make_config({"run_dir": str(tmp_path / f"sweep/{name}")}) for name in "ab")

    def submit_one(config):
        return submission.submit_to_slurm(make_options(Request, {}), [config], Path(config.run_dir) / "slurm")

    assert submit_one(one) == [["12"]]
    for how, expected in ((fcntl.LOCK_SH, [["12"]]), (fcntl.LOCK_EX, None)):
        with submission._submitting_alone(tmp_path / "sweep", how):
            if expected:
                assert submit_one(other) == expected  # another run is submitted at the same time
            else:
                with pytest.raises(UserError, match=f"^another submission to {tmp_path}/sweep is under way: wait for it$"):
                    submit_one(other)
    # What is left of a sweep may be a single run.
    with submission._submitting_alone(tmp_path / "sweep/a/slurm"), pytest.raises(UserError, match=r"sweep/a is under way"):
        submission.submit_to_slurm(make_options(Request, {}), [one], tmp_path / "sweep/slurm")


@pytest.fixture
def policy(tmp_path):
    """Runs launch/policy.sh in bash, where srun ends with a status, and scontrol knows one job."""

    def run(lines, status=0, show="JobId=12 NumTasks=2 CPUs/Task=1 NtasksPerN:B:S:C=0:0:*:* ", **variables):
        stand_ins = f"""
            scontrol() {{ case $1 in requeue) echo "requeue $2";; *) echo '{show}';; esac; }}
            srun() {{ echo "srun $*; ${{SLURM_NTASKS-none}} ${{RANK-none}} ${{SLURM_ARRAY_JOB_ID-none}}"; return {status}; }}"""
        environ = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", **variables}
        program = f"source {ROOT}/launch/policy.sh\n{stand_ins}\n{lines}"
        return subprocess.run(["/bin/bash", "-c", program], env=environ, text=True, capture_output=True, timeout=120)

    return run


def test_the_policy_says_what_srun_starts(policy):
    answer = policy("srun_options=(--label)\nrun_training prog 'a b'", SLURM_NTASKS="9", RANK="3", SLURM_ARRAY_JOB_ID="5")
    assert answer.returncode == 0, answer
    assert answer.stdout.startswith("srun --kill-on-bad-exit=0 --wait=120 --export=ALL --nodes=2 --ntasks=2 --label bash -c ")
    assert answer.stdout.endswith(" bash prog a b; none none none\n")  # what an outer job or launcher has left is gone
    assert policy("run_training prog", show="JobId=12 HetJobId=12 ").returncode == 2
    assert "--ntasks=3" in policy("run_training prog", show="", SLURM_NTASKS="3").stdout  # a controller that does not answer


@pytest.mark.parametrize(("state", "words"), [("PENDING", "requeued already"), ("RUNNING", "could not be requeued; the same command")])
def test_the_policy_says_whether_a_job_that_scontrol_does_not_requeue_is_requeued(policy, state, words):
    show = f"JobId=12 JobState={state} NumTasks=2 CPUs/Task=1 NtasksPerN:B:S:C=0:0:*:* "
    lines = f"scontrol() {{ [[ $1 != requeue ]] && echo '{show}'; }}\nMAX_REQUEUES=3\nrun_training prog"
    answer = policy(lines, 85)
    assert answer.returncode == 85
    assert f"launch: {words}" in answer.stdout + answer.stderr


def test_the_policy_leaves_srun_only_what_the_job_has(policy):
    names = ["MEM_PER_NODE", "MEM_PER_CPU", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "CPU_BIND", "CPU_BIND_TYPE", "GPU_BIND"]
    outer = {f"SLURM_{name}": "1" for name in names} | {"SRUN_CPUS_PER_TASK": "8"}
    shown = "JobId=12 NumTasks=2 CPUs/Task=1 NtasksPerN:B:S:C=0:0:*:* "

    def see(more, **variables):
        lines = "srun() { env | grep -E '^(SLURM_(MEM|GPU|CPU_)|SRUN_)' | cut -d= -f1; }\nrun_training prog"
        return {line.removeprefix("SLURM_") for line in policy(lines, 0, shown + more, **outer, **variables).stdout.split()}

    bound = {"CPU_BIND", "CPU_BIND_TYPE", "GPU_BIND"}
    assert see("MinMemoryNode=4G TresPerNode=gres:gpu:1 ") == {"MEM_PER_NODE", "GPUS_PER_NODE"} | bound
    assert see("MinMemoryCPU=500M TresPerTask=cpu:1,gres:gpu:1 ") == {"MEM_PER_CPU", "GPUS_PER_TASK"} | bound
    assert see("MinMemoryNode=0 ", SLURM_STEP_NODELIST="n1") == set()


def test_the_policy_requeues_up_to_its_limit_and_one_job_of_an_array(policy):
    answer = policy("run_training prog", 85)
    assert (answer.returncode, answer.stdout.splitlines()[-1]) == (85, "requeue 12")
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    shown = "JobId=11 ArrayJobId=12 NumTasks=1 CPUs/Task=1 \nJobId=12 ArrayJobId=12 NumTasks=2 CPUs/Task=1 "
    answer = policy("run_training prog", 85, shown, **array)
    assert "--ntasks=2" in answer.stdout
    assert answer.stdout.splitlines()[-1] == "requeue 12_3"  # `requeue 12` would requeue all of the array
    answer = policy("MAX_REQUEUES=2\nrun_training prog", 85, SLURM_RESTART_COUNT="2")
    assert "requeue" not in answer.stdout
    assert "not requeued again (max_requeues is 2)" in answer.stderr
    assert policy("MAX_REQUEUES=08\nrun_training prog", 85, SLURM_RESTART_COUNT="7").stdout.splitlines()[-1] == "requeue 12"
    answer = policy("MAX_REQUEUES=unlimited\nrun_training prog", 85)
    assert (answer.returncode, answer.stdout) == (2, "")  # before there is something to lose
    assert "MAX_REQUEUES is 'unlimited'; expected a whole number" in answer.stderr
    for status in (0, 1, 2, 143):
        answer = policy("run_training prog", status)
        assert (answer.returncode, "requeue" in answer.stdout) == (status, False)


def test_the_policy_hears_that_it_is_requeued_though_the_job_is_told_to_end_at_once(policy, tmp_path):
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\nkill -TERM $$\necho requeue $2\n")
    program.chmod(0o755)
    answer = policy(f"unset -f scontrol\nPATH={tmp_path}:$PATH\nrun_training prog", 85)
    assert (answer.returncode, answer.stdout.splitlines()[-1]) == (85, "requeue 12")
    assert answer.stderr.endswith("launch: requeued\n")


@pytest.mark.parametrize(("status", "end", "goes_on"), [(0, 0, False), (2, 2, False), (1, 0, True), (137, 0, True)])
def test_the_policy_asks_before_a_job_of_a_chain_begins(policy, status, end, goes_on):
    answer = policy(f"leave_if_done bash -c 'exit {status}'\nrun_training prog")
    assert (answer.returncode, "srun" in answer.stdout) == (end, goes_on)


def test_a_job_notes_its_end_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for name in ("new", "somebodys"):
        training = Training(str(tmp_path / name), ())
        if name == "somebodys":
            (tmp_path / name).mkdir()
            (tmp_path / name / "thesis.tex").touch()
        training._note_end(2)
    assert json.loads((tmp_path / "new/slurm/end.json").read_text())["status"] == 2
    assert [path.name for path in (tmp_path / "somebodys").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("tasks", "flag", "warns"), [(4, 1, True), (2, 1, False), (1, 1, False), (4, 0, False)])
def test_a_step_that_is_smaller_than_its_batch_job_is_noticed(fake_slurm, tasks, flag, warns):
    lines = [f"JobId={job} JobName=x BatchFlag={flag} NumTasks={count} CPUs/Task=1" for job, count in ((11, 99), (12, tasks))]
    fake_slurm(scontrol=(0, "\n".join(lines)))
    said = []
    warn_of_smaller_step(2, {"SLURM_JOB_ID": "12"}, said.append).join(20)
    assert [("has 4 tasks, and srun started 2 of them" in line, "unset SLURM_NTASKS" in line) for line in said] == [(True, True)] * warns


def test_a_sweep_of_a_file_and_of_words_is_the_same(no_slurm, tmp_path):
    (tmp_path / "s.yaml").write_text("config: smoke\nsweep: {learning_rate: [0.1, 0.10, 1e-3], seed: [0, 1]}\nfixed: {steps: 3}\n")
    task, recipe = sweep._find_task(["s.yaml"])
    options = [*Config.model_fields, *task.model_fields]
    fixed, axes, name = sweep.read_axes({sweep._WORDS: ["s.yaml"], "config": None}, options)
    configs = sweep.combine(axes, fixed, recipe, name)
    assert [config.run_dir for config in configs] == [
        f"runs/s/learning_rate={rate},seed={seed}" for rate in ("0.1", "0.001") for seed in (0, 1)
    ]
    words = ["lr=0.1,1e-3", "seed=0,1"]
    task, recipe = sweep._find_task([*words, "--config", "smoke"])
    _, axes, _ = sweep.read_axes({sweep._WORDS: words, "config": "smoke"}, options)
    assert sweep.combine(axes, {"steps": "3"}, recipe, "s") == configs
    assert {(config.task.dataset, config.steps) for config in configs} == {("synthetic", 3)}


def test_the_table_has_a_row_for_each_group_of_seeds_the_best_first():
    configs = [make_config({"learning_rate": rate, "seed": seed}) for rate in (0.1, 0.2, 0.3) for seed in (0, 1)]
    accuracies = [0.90, 0.92, 0.95, 0.97, None, 0.99]
    states = ["finished"] * 4 + ["failed (exit status 1)", "running"]
    runs = [
        RunState(Path("x"), state, best=accuracy, measure="test/accuracy", is_finished=state == "finished")
        for state, accuracy in zip(states, accuracies, strict=True)
    ]
    table = [line.split() for line in sweep.make_results(["learning_rate", "seed"], configs, runs).splitlines()]
    assert table[1:3] == [["0.2", "96.00%", "1.41%", "2/2", "finished"], ["0.1", "91.00%", "1.41%", "2/2", "finished"]]
    assert " ".join(table[3]) == "0.3 0/2 failed (exit status 1) (seed 0); running (seed 1)"


def test_the_state_of_a_run_is_what_its_folder_and_the_queue_say(tmp_path):
    def state(*queue, **files):
        folder = tmp_path / str(time.monotonic_ns())
        (folder / "slurm").mkdir(parents=True)
        for name, value in files.items():
            path = folder / {"lock": "lock"}.get(name, f"slurm/{name}.json")
            path.write_text(value if name == "lock" else json.dumps(value))
        return read_state(folder, [cluster.Job(*words) for words in queue]).state

    job = {"job": "12_1"}
    assert state() == "not started"
    assert state(("12_1", "12", "PENDING", "Resources", "", 0), job=job) == "pending (Resources)"
    assert state(("12_1", "14", "RUNNING", "None", "n1", 0), job=job) == "running"
    gone = "gone to another cluster of the federation"
    assert state(("12_1", "14", "REVOKED", "None", "", 0), job=job) == gone
    assert state(("12_1", "14", "BOOT_FAIL", "None", "n1", 0), job=job) == "node failed"
    assert state(("12_1", "14", "COMPLETING", "None", "n1", 1), job=job) == "completing"
    assert state(("12_1", "14", "TIMEOUT", "None", "n1", 1), job=job) == "out of time"
    assert state(("12_1", "14", "CANCELLED", "None", "n1", 1), job=job, end={"job": "12_1", "status": 143}) == "cancelled, saved"
    assert state(job=job, end={"job": "12_1", "status": 1}) == "failed (exit status 1)"
    assert state(job=job, end={"job": "11", "status": 1}) == "not started"
    assert state(("15", "15", "RUNNING", "None", "n1", 0), lock="process 1 on elsewhere (Slurm job 15)") == "running"
    assert state(lock=f"process {os.getpid()} on {os.uname().nodename}") == "not started"  # lives, but does not hold it


def test_a_job_that_another_cluster_of_the_federation_took_is_not_submitted_again(fake_slurm, capsys):
    fake_slurm(sinfo=(0, SINFO), squeue=(0, "12|12|REVOKED|None||0||"), sbatch=(0, "Submitted batch job 13"))
    Path("runs/a/slurm").mkdir(parents=True)
    Path("runs/a/slurm/job.json").write_text(json.dumps({"job": "12", "folder": mark_folder(Path("runs/a"))}))
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a"]) == 2
    assert "is in use by job 12 (gone to another cluster of the federation): wait for it" in capsys.readouterr().err


def test_jobs_lists_and_refuses(no_slurm, tmp_path, capsys):
    assert jobs.main(["elsewhere"]) == 2
    (tmp_path / "runs/x/slurm").mkdir(parents=True)
    assert jobs.main([]) == 0
    assert capsys.readouterr().out == "no runs in runs\n"
    (tmp_path / "runs/x/lock").touch()
    assert jobs.main(["--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["path"], row["state"]) == ("runs/x", "not started")
    assert jobs.main(["cancel", "runs/x"]) == 2
    assert "runs/x does not run: it is not started" in capsys.readouterr().err
    assert jobs.main(["follow", "nowhere"]) == 2
    assert jobs.main(["a", "b"]) == 2


def test_jobs_names_the_measure_by_which_runs_are_compared(no_slurm, tmp_path, capsys):
    def make(name, measure, value):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(make_config({"dataset": "synthetic"}).to_yaml())
        (folder / "starts.jsonl").write_text(json.dumps({"time": "early", "step": 0, "best": measure}) + "\n")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, f"test/{measure}": value}) + "\n")

    def list_runs():
        assert jobs.main([]) == jobs.main(["--json"]) == 0
        header, *rest = capsys.readouterr().out.splitlines()
        rows = json.loads("\n".join(rest[len(list((tmp_path / "runs").iterdir())) :]))
        return {*header.split()} & {"accuracy", "perplexity", "best"}, rest[0].split(), [(row["measure"], row["best"]) for row in rows]

    make("one", "accuracy", 0.75)
    column, words, found = list_runs()
    assert (column, found) == ({"accuracy"}, [("test/accuracy", 0.75)])
    assert "75.00%" in words
    make("two", "loss", 1.5)
    shutil.rmtree(tmp_path / "runs/one")
    assert jobs.main([]) == 0
    assert "  its loss" in capsys.readouterr().out  # beside that of the training
    shutil.rmtree(tmp_path / "runs/two")
    make("one", "accuracy", 0.75)
    make("two", "perplexity", 12.5)
    column, _, found = list_runs()
    assert (column, found) == ({"best"}, [("test/accuracy", 0.75), ("test/perplexity", 12.5)])


def test_a_record_of_any_speed_is_listed(no_slurm, tmp_path, capsys):
    folder = tmp_path / "runs/a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(make_config({"dataset": "synthetic"}).to_yaml())
    (folder / "starts.jsonl").write_text(json.dumps({"time": "early", "step": 0}) + "\n")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/images_per_s": 5e-324}) + "\n")
    assert jobs.main([]) == jobs.main(["--json"]) == 0
    assert '"left_s": null' in capsys.readouterr().out
    assert [format_duration(seconds) for seconds in (1e30, math.inf)] == ["more than a century"] * 2


def test_ranks_of_a_local_job_find_their_world():
    world = find_world({"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_LOCALID": "1"})
    assert (world.rank, world.size) == (1, 2)


def test_a_checkpoint_that_is_being_written_is_not_saved_yet(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert find_saved_step(tmp_path) is None
    for name in ("step_00000003-0123456789abcdef.pt", "step_00000010-0123456789abcdef.pt", "step_00000012-0123456789abcdef.pt.tmp"):
        (tmp_path / "checkpoints" / name).touch()
    assert find_saved_step(tmp_path) == 10


SLURM_ONLY = ["partition=a", "account=a", "qos=a", "constraint=a", "memory_gb=1", "cpus_per_task=1", "dry_run"]
SLURM_ONLY += ["exclude=a", "nodelist=a", "reservation=a", "sbatch=--nice", "srun=--label", "chain=2"]


@pytest.mark.parametrize("option", SLURM_ONLY)
def test_what_only_slurm_understands_is_refused_without_it(no_slurm, capsys, option):
    assert submit.main(["--config", "smoke", "--cluster", "local", f"--{option}"]) == 2
    assert "has no effect with cluster local" in capsys.readouterr().err


def test_the_options_of_the_job_come_first(capsys):
    for program in (submit, sweep):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        text = capsys.readouterr().out
        assert text.index("\n  --nodes") < text.index("\n  --run_dir") < text.index("\n  --batch_size")


def test_a_fresh_checkout_has_no_runs_yet(no_slurm, capsys):
    assert jobs.main([]) == 0
    assert "no runs yet in runs; python -m mnist_dist.train" in capsys.readouterr().out
    assert jobs.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_chain_that_is_interrupted_is_taken_back(fake_slurm, tmp_path):
    fake_slurm(sinfo=(0, SINFO))
    # Ctrl-C reaches every process of the terminal, sbatch as well, which then would not say which job it has queued.
    interrupt = 'if [ "$number" = 2 ]; then kill -INT $PPID $$; fi\necho "Submitted'
    (tmp_path / "bin/sbatch").write_text(count_up(9).replace('echo "Submitted', interrupt))
    (tmp_path / "bin/scancel").write_text('#!/bin/sh\necho "scancel $*" >>../calls\n')
    (tmp_path / "bin/scancel").chmod(0o755)
    words = [sys.executable, "-m", "launch.submit", "--config", "smoke", "--run_dir", "runs/a", "--chain", "3"]
    answer = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=60)
    assert (answer.returncode, answer.stdout, answer.stderr) == (130, "", "interrupted\n")
    assert [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()] == ["sbatch", "sbatch", "scancel"]
    assert (tmp_path / "calls").read_text().endswith("scancel 12 11\n")
    assert list(Path().iterdir()) == []


def test_a_sweep_that_is_interrupted_is_taken_back(fake_slurm, tmp_path):
    fake_slurm(sinfo=(0, SINFO))
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\necho you have job 3 of 500\nkill -INT $PPID $$\necho Submitted batch job 21\n")
    (tmp_path / "bin/scancel").write_text('#!/bin/sh\necho "scancel $*" >>../calls\n')
    (tmp_path / "bin/scancel").chmod(0o755)
    words = [sys.executable, "-m", "launch.sweep", "--config", "smoke", "--run_dir", "runs/a", "seed=1,2"]
    answer = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=60)
    assert (answer.returncode, answer.stdout, answer.stderr) == (130, "", "interrupted\n")
    assert (tmp_path / "calls").read_text() == "scancel 21\n"
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("program", [submit, sweep])
def test_a_job_that_is_queued_though_sbatchs_answer_is_lost_is_taken_back_or_told(fake_slurm, tmp_path, capsys, program):
    words = ["--config", "smoke", "--run_dir", "runs/a", *(["seed=1,2"] if program is sweep else [])]
    script = tmp_path / "here/runs/a/slurm/.submission_file_1.sh"
    fake_slurm(sinfo=(0, SINFO), sbatch=(1, "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"))
    rows = [f"31_1|31|PENDING|Priority||0|{script}|", "7|7|PENDING|Priority||0|/x/y|"]
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    (tmp_path / "bin/scancel").write_text('#!/bin/sh\necho "scancel $*" >>../calls\n')
    (tmp_path / "bin/scancel").chmod(0o755)
    assert program.main(words) == 2
    assert "sbatch refused the job: Batch job submission failed: Socket timed out" in capsys.readouterr().err
    assert (tmp_path / "calls").read_text() == "scancel 31\n"
    assert list(Path().iterdir()) == []
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\n")
    assert program.main(words) == 1
    *_, doubt = capsys.readouterr().err.splitlines()
    assert doubt == "error: it may be queued all the same (squeue does not show it yet): look with squeue --me, and scancel it"
    assert list(script.parent.glob("*.pkl"))  # for the job, should it begin


@pytest.mark.parametrize("program", [submit, sweep])
def test_what_a_site_prints_may_be_of_any_encoding(fake_slurm, tmp_path, capsys, program):
    words = ["--config", "smoke", "--run_dir", "runs/a", *(["seed=1,2"] if program is sweep else [])]
    fake_slurm(sinfo=(0, SINFO))
    # Latin-1 on both streams, and a letter of UTF-8 in two writes, while the job is not queued yet.
    site = "printf 'gew\\344hlt\\303'; sleep 0.3; printf '\\244\\n'; printf 'gew\\344hlt\\n' >&2; sleep 0.3\n"
    (tmp_path / "bin/sbatch").write_text(f"#!/bin/sh\n{site}echo Submitted batch job 17\n")
    assert program.main(words) == 0
    assert "submitted job 17" in capsys.readouterr().out
    assert list(Path("runs/a/slurm").glob("17*_submission.sh"))
    shutil.rmtree("runs")
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\nprintf 'sbatch: error: Konto nicht gew\\344hlt\\n' >&2\nexit 1\n")
    assert program.main(words) == 2
    assert "error: sbatch refused the job: Konto nicht gew\ufffdhlt\n" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_a_job_that_is_queued_though_sbatch_was_killed_is_taken_back(fake_slurm, tmp_path, capsys):
    script = tmp_path / "here/runs/a/slurm/.submission_file_1.sh"
    fake_slurm(sinfo=(0, SINFO))
    (tmp_path / "bin/sbatch").write_text(f"#!/bin/sh\necho '31|31|PENDING|Priority||0|{script}|' >../queue\nkill -KILL $$\n")
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\ncat ../queue 2>/dev/null\nexit 0\n")
    (tmp_path / "bin/scancel").write_text('#!/bin/sh\necho "scancel $*" >>../calls\n')
    (tmp_path / "bin/scancel").chmod(0o755)
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a"]) == 2
    assert "error: sbatch refused the job: it ended with -9 and no response\n" in capsys.readouterr().err
    assert (tmp_path / "calls").read_text() == "scancel 31\n"
    assert list(Path().iterdir()) == []


def test_jobs_that_cannot_be_withdrawn_are_named_and_keep_their_files(fake_slurm, tmp_path, capsys):
    fake_slurm(sinfo=(0, SINFO), scancel=(1, "scancel: error: Socket timed out"))
    (tmp_path / "bin/sbatch").write_text(count_up(3))
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a", "--chain", "3"]) == 1
    refused, left = capsys.readouterr().err.splitlines()
    assert refused == "error: sbatch refused the job: Batch job submission failed: too many"
    assert left.startswith("error: these jobs are queued, and cannot be withdrawn (scancel failed with 1: scancel: error: Socket timed out")
    assert left.endswith(": scancel 12 11")
    assert json.loads(Path("runs/a/slurm/job.json").read_text())["chain"] == "11:12"
    assert len(list(Path("runs/a/slurm").glob("*_submission.sh"))) == 2


def test_a_job_whose_files_cannot_be_put_in_place_is_cancelled(fake_slurm, tmp_path, monkeypatch, capsys):
    fake_slurm(sinfo=(0, SINFO), sbatch=(0, "Submitted batch job 31"))
    (tmp_path / "bin/scancel").write_text(f"#!/bin/sh\necho $@ >> '{tmp_path}/cancelled'\n")
    (tmp_path / "bin/scancel").chmod(0o755)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JobPaths, "move_temporary_file", fail)
    assert submit.main(["--config", "smoke", "--run_dir", "runs/a"]) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert (tmp_path / "cancelled").read_text() == "31\n"
    assert not Path("runs").exists()


def test_what_cannot_save_now_is_not_cancelled(fake_slurm, tmp_path, capsys):
    fake_slurm(sinfo=(0, SINFO), squeue=(0, "31|31|SUSPENDED|None|n1|0|"))
    (tmp_path / "here/runs/a/slurm").mkdir(parents=True)
    folder = tmp_path / "here/runs/a"
    write_note(folder, "job", {"job": "31", "log": "31.log"})
    assert jobs.main(["cancel", "runs/a"]) == 2
    assert "is suspended, and cannot save: scontrol resume 31" in capsys.readouterr().err
    assert explain.main(["runs/a"]) == 0
    assert "scontrol resume 31" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("log", "script"),
    [
        ("slurm/31_0_log.out", ""),  # a process on this machine has a number, too
        ("slurm/31.log", "/elsewhere/slurm/submission_file_1.sh"),  # of another cluster with the same home
    ],
)
def test_another_job_of_the_same_number_is_left_alone(fake_slurm, tmp_path, capsys, log, script):
    fake_slurm(sinfo=(0, SINFO), squeue=(0, f"31|31|RUNNING|None|n1|0|{script}|"))
    folder = tmp_path / "here/runs/a"
    (folder / "slurm").mkdir(parents=True)
    write_note(folder, "job", {"job": "31", "log": str(folder / log)})
    assert jobs.main(["cancel", "runs/a"]) == 2
    assert "does not run: it is not started" in capsys.readouterr().err
    mine = script.replace("/elsewhere", str(folder)) or f"{folder}/slurm/submission_file_1.sh"
    [job] = [dataclasses.replace(job, script=mine) for job in cluster.read_jobs()]
    assert read_state(folder, [job]).is_in_queue == (log == "slurm/31.log")


def test_what_a_stranger_left_ends_no_listing_and_forges_no_row_of_it(fake_slurm, tmp_path, capsys):
    fake_slurm(sinfo=(0, SINFO))
    folder = tmp_path / "here/runs/a\nmine  finished"
    (folder / "slurm").mkdir(parents=True)
    write_note(folder, "job", {"job": "31", "log": "31.log"})
    write_note(folder, "end", {"job": ["31"], "status": 1})
    assert jobs.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("a\\nmine  finished")


def test_a_config_of_another_program_hides_no_run_below_it(tmp_path):
    for name, files in {".": ["config.yaml"], "a": ["config.yaml", "metrics.jsonl"], "a/inner": ["config.yaml"], "b": ["lock"]}.items():
        (tmp_path / name).mkdir(exist_ok=True)
        for file in files:
            (tmp_path / name / file).touch()
    assert [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)] == [".", "a", "b"]


def test_a_folder_that_may_not_be_read_is_named(no_slurm, tmp_path, capsys, monkeypatch):
    for name in ("theirs", "more", "mine"):
        (tmp_path / name).mkdir()
    scandir = os.scandir

    def scan_as_a_stranger(path="."):
        if os.path.basename(path) in ("theirs", "more"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan_as_a_stranger)
    assert jobs.main([str(tmp_path)]) == 0
    assert f"note: {tmp_path / 'more'} and 1 more folder cannot be read" in capsys.readouterr().err
    for main, *words in ((jobs.main,), (jobs.main, "follow"), (explain.main,), (report.main,), (evaluate.main,)):
        assert main([*words, str(tmp_path / "theirs")]) == 2
        assert f"{tmp_path / 'theirs'} cannot be read: Permission denied" in capsys.readouterr().err


def test_a_link_to_a_run_is_listed_and_no_other_link_is_followed(tmp_path):
    for path in ("runs/a", "scratch/b"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "config.yaml").touch()
    (tmp_path / "runs/b").symlink_to(tmp_path / "scratch/b")
    (tmp_path / "runs/all").symlink_to(tmp_path)
    assert [path.name for path in find_runs(tmp_path / "runs")] == ["a", "b"]


def test_slurm_is_asked_ever_more_rarely_until_something_changes(monkeypatch):
    now = 0.0
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now)
    patience, asked = cluster.Patience(), []
    for second in range(70):
        now = float(second)
        if patience.is_due():
            asked.append(second)
        if second == 40:
            patience.hasten()
    assert asked == [0, 2, 6, 14, 29, 41, 43, 47, 55]


def test_follow_prints_a_log_once_though_slurm_falls_silent(tmp_path, monkeypatch, capsys):
    log = tmp_path / "mnist-dist-12.out"
    log.write_text("one\n")
    logs = [str(log), "", str(log), str(log)]  # as `scontrol` knows it, or not
    monkeypatch.setattr(jobs, "locate_log", lambda run: logs.pop(0))
    read = lambda path, _: RunState(path, "running" if logs[1:] else "finished", is_finished=not logs[1:], is_active=True)  # noqa: E731
    monkeypatch.setattr(jobs, "read_state", read)
    monkeypatch.setattr(jobs, "_POLL_S", 0.01)
    assert jobs.follow(tmp_path) == 0
    assert capsys.readouterr().out == f"one\n{tmp_path}: finished, step 0\n"


def test_follow_shows_a_log_to_its_end_and_anew_where_it_was_emptied(tmp_path, monkeypatch, capsys):
    log = tmp_path / "12_0_log.out"
    log.write_text("step 20/20\n")
    moments = [
        lambda: RunState(tmp_path, "running", is_active=True),
        lambda: log.write_text("emptied\n") and RunState(tmp_path, "finished", is_finished=True, is_ending=True),
        lambda: log.open("a").write("report: x\n") and RunState(tmp_path, "finished", is_finished=True, is_ending=True),
        lambda: RunState(tmp_path, "finished", is_finished=True),
    ]
    monkeypatch.setattr(jobs, "locate_log", lambda run: str(log))
    monkeypatch.setattr(jobs, "read_state", lambda *_: moments.pop(0)())
    monkeypatch.setattr(jobs, "_POLL_S", 0.01)
    assert jobs.follow(tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == ["step 20/20", "emptied", "report: x"]
    # A process that never ends is waited for no longer than that.
    moments = [lambda: RunState(tmp_path, "finished", is_finished=True, is_ending=True)] * 9
    monkeypatch.setattr(jobs, "_ENDING_S", 0.03)
    assert jobs.follow(tmp_path) == 0


def test_a_letter_of_a_log_that_is_written_by_half_is_shown_when_it_is_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "_PIECE_BYTES", 3)
    log, text = tmp_path / "12.log", "so groß\rwie möglich\n"
    log.write_bytes(text.encode()[:7])  # amid the ß
    position = jobs._copy(str(log), 0)
    log.write_bytes(text.encode())
    assert jobs._copy(str(log), position) == len(text.encode())
    assert capsys.readouterr().out == text


def test_a_finished_run_whose_process_still_draws_its_report_is_ending(tmp_path):
    folder = tmp_path / "run"
    run_ranks(tmp_path, Train([*TINY, "--run_dir", str(folder)]))
    assert not read_state(folder, []).is_ending
    lock = Lock(folder)
    state = read_state(folder, [])
    lock.release()
    assert (state.is_finished, state.is_ending, state.is_active) == (True, True, False)
