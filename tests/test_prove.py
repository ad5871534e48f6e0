"""The page of launch.prove: its lines, its deadlines, what changed since the last one, and real runs of it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from cluster import ROOT
from test_launch import wait_for

from launch import cluster as slurm
from launch import prove, steps
from launch.drill import KILLED, REQUEUED, UNBROKEN, judge_kill, judge_requeue, judge_signal, judge_tracking
from launch.prove import ORDER, Page, compare_pages, describe_finding
from launch.request import Request
from launch.steps import Check, Checks, Ranks, find_last_words
from mnist_dist.errors import RunError
from mnist_dist.finding import Finding

# Stands for a program of checks: rank zero answers, or does what its first word says.
FAKE = """
import json, os, sys, time
todo, answer = sys.argv[1:3]
rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
if todo == "hang" and rank == "1":
    time.sleep(600)
if todo == "fail":
    sys.exit("error: the node has no bananas")
if todo == "damage":
    open(answer, "w").write("[1]")
elif rank == "0" and todo != "hang":
    row = {"check": todo.split("=")[0], "word": todo.split("=")[1], "measured": "2 ranks", "next_step": "look", "values": {"s": 2.0}}
    open(answer, "w").write(json.dumps([row]))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a check of the program above."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}:{ROOT}")
    return lambda todo, deadline_s=20, name=None: Check((name or todo.partition("=")[0],), ("fake", todo, "{answer}"), deadline_s)


def make_folder(path):
    for name in ("answers", "logs", "findings", "notes", "slurm"):
        (path / name).mkdir(parents=True)
    return path


def run_checks(folder, *checks):
    return [finding for findings in Checks(make_folder(folder), Ranks(2), checks, drills=False).run() for finding in findings]


# Steps


def test_its_help_has_its_own_defaults_and_no_option_that_it_refuses(capsys):
    with pytest.raises(SystemExit):
        prove.main(["--help"])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("(default: 15)", "(default: prove)"))
    assert "max_requeues" not in shown


def test_a_check_that_hangs_is_a_line_and_ends(tmp_path, fake):
    begun = time.monotonic()
    hung, after = run_checks(tmp_path / "work", fake("hang", 2), fake("speed=ok"))
    assert time.monotonic() - begun < 60
    assert (hung.check, hung.word) == ("hang", "WRONG")
    assert "no answer in 2 s" in hung.measured
    assert after.word == "ok"
    assert not subprocess.run(["pgrep", "-f", f"fake hang {tmp_path}"], capture_output=True).stdout


def test_a_check_that_fails_or_answers_nonsense_is_a_line(tmp_path, fake):
    failed, damaged = run_checks(tmp_path / "work", fake("fail"), fake("damage", name="agree"))
    assert (failed.word, failed.measured) == ("WRONG", "ended with 1 and no answer: error: the node has no bananas")
    assert "fail.log" in failed.next_step
    assert damaged.check == "agree"
    assert "not a list of findings" in damaged.measured


def test_where_the_ranks_do_not_meet_nothing_else_is_tried(tmp_path, fake):
    joined, other = run_checks(tmp_path / "work", fake("joined=WRONG"), fake("hang", 60))
    assert joined.word == "WRONG"
    assert (other.word, other.measured) == ("WARN", "not tried, since the ranks did not meet")


def test_the_last_words_are_those_of_the_program():
    log = "step 1\n[rank 1] error: disk full\nbye\nsrun: error: x: task 1: Exited with exit code 1\nslurmstepd: error: x\n"
    assert find_last_words(log) == "[rank 1] error: disk full"
    assert find_last_words("one\n\x1b[31mtwo\n") == "\\x1b[31mtwo"
    assert find_last_words("") == ""
    assert find_last_words("srun: error: x\nsrun: bye\n") == "srun: error: x"  # nobody else has said anything


def test_a_step_that_slurm_could_not_start_is_tried_again(tmp_path, fake, monkeypatch):
    (tmp_path / "bin").mkdir()
    silence = "srun: error: Unable to confirm allocation for job 1: Unable to contact slurm controller (connect failure)"
    srun = f'[ -e {tmp_path}/up ] || {{ touch {tmp_path}/up; echo "{silence}"; echo "srun: Check SLURM_JOB_ID"; exit 1; }}\nexec "$@"\n'
    (tmp_path / "bin/srun").write_text("#!/bin/sh\n" + srun)
    (tmp_path / "bin/srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(steps, "_RETRY_S", 0.01)

    def run(name):
        (findings,) = Checks(make_folder(tmp_path / name), Ranks(1, ()), (fake("speed=ok"),), drills=False).run()
        return findings[0].word, findings[0].measured

    assert run("away") == ("ok", "2 ranks")
    (tmp_path / "up").unlink()
    monkeypatch.setattr(steps, "_SILENCE_S", 0.0)
    assert run("away for long") == ("WRONG", f"ended with 1 and no answer: {silence}")


def test_no_filter_of_the_users_shell_hides_the_steps_that_are_killed(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    listing = '[ -n "$SQUEUE_PARTITION" ] || printf "12.batch\\n12.0\\n12.1\\n"'
    for name, line in (("squeue", listing), ("scancel", f'echo "$*" >{tmp_path}/killed')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name, value in (("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin"), ("SLURM_JOB_ID", "12"), ("SQUEUE_PARTITION", "x")):
        monkeypatch.setenv(name, value)
    steps._cancel_steps()
    assert (tmp_path / "killed").read_text() == "--signal=KILL 12.0 12.1\n"


# The page


def test_a_line_has_the_next_step_below_it_unless_all_is_well():
    assert describe_finding(Finding("kill", "ok", "fine", "never shown")) == "kill       ok     fine"
    assert describe_finding(Finding("speed", "SLOW", "rank 3", "swap it")) == "speed      SLOW   rank 3\n                  -> swap it"


@pytest.mark.parametrize(("words", "status"), [(["ok", "WARN"], 0), (["ok", "SLOW"], 1), (["WRONG", "ok"], 1)])
def test_the_status_of_a_page(words, status):
    page = Page(Request(cluster="local"), quiet=True)
    page.add([Finding(name, word, "x") for name, word in zip(ORDER, words, strict=False)])
    assert page.status == status
    assert f"{len(words)} checks: 1 ok, 1 {next(word for word in words if word != 'ok')}" in page.summarize()
    assert page.missing == list(ORDER[2:])


def test_what_changed_is_a_word_or_a_measure_that_moved_by_a_third():
    def rows(word, **values):
        return [{"check": "speed", "word": word, "measured": "", "next_step": "", "values": values}]

    now = [Finding("speed", "SLOW", "", values={"step_s": 2.0, "rank": 3, "host": "b"}), Finding("files", "ok", "")]
    assert compare_pages({"findings": rows("ok", step_s=1.0, rank=3, host="a")}, now) == [
        "speed: SLOW, was ok",
        "speed: step_s 2, was 1 (+100 %)",
    ]
    assert compare_pages({"findings": rows("SLOW", step_s=1.6, rank=0)}, now) == []
    assert compare_pages({"findings": rows("SLOW", step_s=2.7)}, now) == ["speed: step_s 2, was 2.7 (-26 %)"]
    for damaged in ({}, {"findings": 1}, {"findings": [1, {"word": 2}, {"word": "ok", "values": 1}]}):
        assert compare_pages(damaged, now) == []


def prove_locally(monkeypatch, folder, *words, checks=(), site=()):
    monkeypatch.setattr(prove, "CHECKS", checks)
    monkeypatch.setattr(prove, "Checks", lambda work, ranks, checks: Checks(work, ranks, checks, drills=False))
    monkeypatch.setattr(prove, "_drill_locally", lambda work, ranks: list(site))
    return prove.main(["--cluster", "local", "--tasks_per_node", "2", "--folder", str(folder), *words])


def test_a_page_is_kept_and_the_next_one_says_what_changed(tmp_path, fake, monkeypatch, capsys):
    folder = tmp_path / "prove"
    site = [Finding("signal", "ok", "2 of 2")]
    assert prove_locally(monkeypatch, folder, checks=(fake("speed=ok"),), site=site) == 0
    first = capsys.readouterr().out
    assert first.splitlines()[0] == "speed      ok     2 ranks"
    assert "2 checks: 2 ok" in first
    assert [path.name for path in folder.iterdir()] == ["prove.json"]

    assert prove_locally(monkeypatch, folder, "--json", checks=(fake("speed=SLOW"),), site=site) == 1
    page = json.loads(capsys.readouterr().out)
    assert page["changes"] == ["speed: SLOW, was ok"]
    assert [finding["word"] for finding in page["findings"]] == ["SLOW", "ok"]
    assert page["status"] == 1
    assert json.loads((folder / "prove.json").read_text()) == page
    assert len(list(folder.glob("prove*.json"))) == 2
    assert len(list(folder.glob("work-*/logs/speed.log"))) == 1  # kept, for whoever looks for the reason

    assert prove_locally(monkeypatch, folder, checks=(fake("speed=SLOW"),), site=site) == 1
    assert "nothing changed" in capsys.readouterr().out


def test_an_interrupted_run_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "launch.prove", "--cluster", "local", "--tasks_per_node", "2", "--folder", str(tmp_path / "prove")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    answers = f"{tmp_path}/prove/work-.*joined"
    wait_for(lambda: subprocess.run(["pgrep", "-f", answers], capture_output=True).stdout)
    program.send_signal(signal.SIGTERM)
    _, error = program.communicate(timeout=60)
    assert program.returncode == 130
    assert error.endswith("interrupted\n")
    assert not (tmp_path / "prove").exists()
    assert not subprocess.run(["pgrep", "-f", answers], capture_output=True).stdout


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("FAILED", "job 7 ended (FAILED) before the first check: error: no python here"),
        ("COMPLETED", "expected a --folder that this machine"),
    ],
)
def test_a_job_that_leaves_nothing_could_not_test(tmp_path, monkeypatch, capsys, state, message):
    folder = tmp_path / "prove"
    cancelled = []

    def submit(_, executor, work, what, jobs):
        (executor.folder / "7.log").write_text("error: no python here\n")
        jobs.append(prove.Watched(f"{7 + len(jobs)}", what))
        return jobs[-1]

    def show_job(number):
        return {"JobState": state if number == "7" else "CANCELLED" if cancelled else "PENDING", "Reason": "Resources"}

    monkeypatch.setattr(prove, "compare_with_cluster", lambda request: None)
    monkeypatch.setattr(prove, "_submit", submit)
    monkeypatch.setattr(slurm, "show_job", show_job)
    monkeypatch.setattr(slurm, "run_slurm", lambda *words: cancelled.append(words))
    for name in ("_SETTLE_S", "_SHARED_S", "_POLL_S"):
        monkeypatch.setattr(prove, name, 0.01)
    assert prove.main(["--folder", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert cancelled[0] == ("scancel", "8")
    assert json.loads((folder / "prove.json").read_text())["status"] == 2


def test_a_silent_controller_says_nothing_of_a_job_and_ends_the_page_after_a_while(tmp_path, monkeypatch, capsys):
    answers = []

    def show_job(number):
        answer = answers.pop(0) if answers else None
        if answer is None:
            raise RunError("scontrol failed with 1: no contact")
        return {"JobState": answer}

    monkeypatch.setattr(slurm, "show_job", show_job)
    monkeypatch.setattr(slurm, "_ASK_S_MAX", 0)
    job = prove.Watched("7", "the checks")
    answers += ["RUNNING", None, None, "RUNNING", "COMPLETED"]
    assert [job.look() for _ in range(5)] == [False, False, False, False, True]
    assert capsys.readouterr().err.splitlines() == [
        "job 7 (the checks): running on ",
        "job 7 (the checks): not known now (scontrol failed with 1: no contact); Slurm is asked again",
        "job 7 (the checks): running on ",
        "job 7 (the checks): completed",
    ]
    cancels = []

    def run_slurm(*words):
        cancels.append(words)
        raise RunError("scancel failed with 1: no contact")

    monkeypatch.setattr(prove, "compare_with_cluster", lambda request: None)
    monkeypatch.setattr(prove, "_submit", lambda _, executor, work, what, jobs: jobs.append(prove.Watched("7", what)) or jobs[-1])
    monkeypatch.setattr(slurm, "run_slurm", run_slurm)
    for name, value in {"_SILENCE_S": 0.05, "_CANCEL_S": 0.05, "_POLL_S": 0.01}.items():
        monkeypatch.setattr(prove, name, value)
    assert prove.main(["--folder", str(tmp_path / "prove")]) == 2
    error = capsys.readouterr().err
    assert re.search(r"could not test: Slurm has not answered for .*: scontrol failed with 1: no contact", error)
    assert "these jobs may still wait or run: 7, 7; look at squeue, and end them with scancel" in error
    assert set(cancels) == {("scancel", "7", "7")}  # not the one that kills, before the first was heard
    assert len(list((tmp_path / "prove").glob("work-*"))) == 1


def test_a_cluster_that_does_not_answer_could_not_be_tested(tmp_path, monkeypatch, capsys):
    def fail(_):
        raise RunError("sinfo failed with 1: no contact")

    monkeypatch.setattr(prove, "compare_with_cluster", fail)
    assert prove.main(["--folder", str(tmp_path / "prove")]) == 2
    assert "could not test: sinfo failed with 1: no contact; --cluster local tests this machine alone" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "reason", "ended"),
    [
        ("PENDING", "JobHeldUser", "is held: JobHeldUser"),
        ("REQUEUE_HOLD", "None", "is held: REQUEUE_HOLD"),
        ("SPECIAL_EXIT", "None", "is held: SPECIAL_EXIT"),
        ("RESV_DEL_HOLD", "ReservationDeleted", "is held: ReservationDeleted"),
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:threshold1", None),
        ("PENDING", "QOSUsageThreshold", None),
        ("RUNNING", "None", None),
    ],
)
def test_a_job_that_somebody_must_release_is_not_waited_for(monkeypatch, state, reason, ended):
    monkeypatch.setattr(slurm, "show_job", lambda _: {"JobState": state, "Reason": reason})
    job = prove.Watched("7", "the checks")
    assert job.look() == (ended is not None)
    assert ended in (None, job.ended)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nodes 2 --time 1", "sinfo and sbatch are not found here"),
        ("--cluster local --max_requeues 3", "max_requeues has no effect here"),
        ("--cluster local --partition gpu", "partition has no effect with cluster local"),
        ("--nodes 2", "sinfo and sbatch are not found here"),
        ("--cluster local --folder a$HOME/%j", "letters, digits"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prove.main(words.split()) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# What the drills left


def note(folder, name, rank, at, stop="REQUEUE"):
    values = {"rank": rank, "host": f"n{rank}", "time": float(at), "stop": stop}
    (folder / "notes" / f"{name}-{rank}.json").write_text(json.dumps(values))


def make_run(folder, part, weights=b"w", starts=(0,), ends=(), processor="x", why="a signal to requeue"):
    run = folder / part
    run.mkdir()
    (run / "model.safetensors").write_bytes(weights)
    rows = [
        {"time": f"2026-01-01T00:00:{at:02}+00:00", "step": step, "processor": processor} for at, step in zip((0, 40), starts, strict=False)
    ]
    (run / "starts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = [{"time": "2026-01-01T00:00:10+00:00", "step": step, "start": 1, "why": f"stopped by {why}, saved"} for step in ends]
    (run / "ends.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ends))


def test_which_ranks_a_signal_reached(tmp_path):
    folder = make_folder(tmp_path / "work")
    assert judge_signal(folder, 2, limit_at=200).word == "WRONG"  # they never came so far
    for rank in range(2):
        note(folder, "ready", rank, 100)
    nobody = judge_signal(folder, 2, limit_at=200)
    assert (nobody.word, nobody.measured) == ("WRONG", "USR1 reached 0 of 2 ranks")
    note(folder, "signal", 0, 110)
    some = judge_signal(folder, 2, limit_at=200)
    assert some.word == "WARN"
    assert "rank 1 on n1 heard nothing" in some.next_step
    note(folder, "signal", 1, 111)
    assert judge_signal(folder, 2, limit_at=200).measured.startswith("USR1 reached 2 of 2 ranks, 89 s before the time limit")
    assert judge_signal(folder, 2, limit_at=200).word == "ok"
    assert judge_signal(folder, 2, limit_at=131).word == "WARN"  # late
    early = judge_signal(folder, 2, limit_at=300)
    assert early.word == "WARN"
    assert judge_signal(folder, 2, sent_at=110.5).measured == "USR1 reached 2 of 2 ranks, 0.50 s after it was sent"


@pytest.mark.parametrize(
    ("limit_at", "word", "text"), [(300, "WARN", "another signal ended the job 190 s before"), (130, "WRONG", "0 of 2")]
)
def test_another_signal_is_not_the_one_before_the_time_limit(tmp_path, limit_at, word, text):
    folder = make_folder(tmp_path / "work")
    for rank in range(2):
        note(folder, "ready", rank, 100)
        note(folder, "signal", rank, 110, "TERMINATE")
    finding = judge_signal(folder, 2, limit_at=limit_at)
    assert finding.word == word
    assert text in finding.measured


def test_a_run_is_not_blamed_where_there_is_nothing_to_compare_it_with(tmp_path):
    folder = make_folder(tmp_path / "work")
    make_run(folder, REQUEUED, starts=(0, 26), ends=(26,))
    make_run(folder, KILLED, starts=(0, 20))
    note(folder, "kill", 1, 100)
    killed = judge_kill(folder, 2, log="rank 1 on n1 is gone", ended_at=101.0, status=0)
    for finding in (judge_requeue(folder, by="Slurm"), killed):
        assert finding.word == "WARN"
        assert "the run unbroken left no weights to compare" in finding.measured
        assert "see why the run that was to be compared with did not finish" in finding.next_step


@pytest.mark.parametrize(
    ("run", "forbidden", "word", "text"),
    [
        ({"starts": (0, 26), "ends": (26,)}, False, "ok", "Slurm after 30 s, at step 26; weights bit-equal"),
        (
            {"starts": (0, 26), "ends": (26,)},
            True,
            "WARN",
            "did not requeue the job; submitted again, it went on at step 26; weights bit-equal",
        ),
        ({"starts": (0, 26), "ends": (26,), "weights": b"v"}, False, "WRONG", "weights differ"),
        ({"starts": (0, 26), "ends": (26,), "weights": b"v", "processor": "y"}, False, "WARN", "different processors or GPUs (x, y)"),
        ({"starts": (0, 20), "ends": (26,)}, False, "WRONG", "saved at step 26, but went on at step 20"),
        ({"starts": (0,), "ends": (26,)}, False, "WRONG", "never came back (cancelled)"),
        ({"starts": (0,), "ends": ()}, False, "WARN", "not tried"),
        (
            {"starts": (0, 26), "ends": (26,), "why": "a signal to end, or Stop on W&B"},
            False,
            "WARN",
            "another signal than USR1 ended the run",
        ),
    ],
)
def test_whether_a_run_came_back(tmp_path, run, forbidden, word, text):
    folder = make_folder(tmp_path / "work")
    make_run(folder, UNBROKEN)
    make_run(folder, REQUEUED, **run)
    finding = judge_requeue(folder, by="Slurm", is_forbidden=forbidden, state="cancelled")
    assert finding.word == word
    assert text in finding.measured
    assert bool(finding.next_step) == (word != "ok")


def test_ranks_of_several_kinds_may_have_been_placed_otherwise(tmp_path):
    folder = make_folder(tmp_path / "work")
    make_run(folder, UNBROKEN, processor="x; y")
    make_run(folder, REQUEUED, starts=(0, 26), ends=(26,), weights=b"v", processor="x; y")
    finding = judge_requeue(folder, by="Slurm")
    assert finding.word == "WARN"
    assert "the ranks had different processors or GPUs (x, y)" in finding.measured


def test_how_the_others_ended_when_a_rank_was_killed(tmp_path):
    folder, log = make_folder(tmp_path / "work"), "[rank 0] error: rank 1 on n1 is gone and left no reason\n"
    make_run(folder, UNBROKEN)
    assert judge_kill(folder, 2, log=log, ended_at=101.0, status=0).word == "WRONG"  # never killed
    note(folder, "kill", 1, 100)
    make_run(folder, KILLED, starts=(0, 20))
    well = judge_kill(folder, 2, log=log, ended_at=101.0, status=0)
    assert well.word == "ok"
    assert well.measured.startswith(
        "rank 1 on n1 was killed; the others ended after 1.0 s and named it; the same command went on at step 20"
    )
    assert "did not name it" in judge_kill(folder, 2, log="rank 11 is gone", ended_at=101.0, status=0).measured
    assert "did not end" in judge_kill(folder, 2, log=log, ended_at=None, status=0).measured
    assert "ended with status 1" in judge_kill(folder, 2, log=log, ended_at=101.0, status=1).measured
    (folder / KILLED / "model.safetensors").write_bytes(b"v")
    assert judge_kill(folder, 2, log=log, ended_at=101.0, status=0).word == "WRONG"


@pytest.mark.parametrize(
    ("log", "word", "text"),
    [
        ("W&B mirrors this run: https://wandb.ai/me/p/runs/x\n", "ok", "online: https://wandb.ai/me/p/runs/x"),
        (
            "W&B keeps this run offline, because there is no API key; upload it later with: wandb sync /x\n",
            "ok",
            "offline: there is no API key",
        ),
        ("W&B keeps this run offline, because timed out; metrics.jsonl has everything\n", "WARN", "offline: timed out"),
        ("W&B keeps this run offline; upload it later with: wandb sync\n", "ok", "offline: W&B's own settings ask for it"),
        ("this run is not mirrored to W&B: wandb is not installed\n", "WARN", "wandb is not installed"),
        ("finished\n", "ok", "disabled"),
    ],
)
def test_what_is_said_of_tracking(log, word, text):
    finding = judge_tracking(log)
    assert finding.word == word
    assert text in finding.measured


# The real thing


def run_real(folder, environ, *words, timeout=500):
    command = [sys.executable, "-m", "launch.prove", "--folder", str(folder), "--json", *words]
    answer = subprocess.run(command, env={**environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=timeout)
    return answer, json.loads(answer.stdout)


def list_jobs(environ):
    return subprocess.run(["squeue", "--noheader"], env=environ, text=True, capture_output=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_two_ranks_here_are_all_well(tmp_path):
    answer, page = run_real(tmp_path / "prove", os.environ, "--cluster", "local", "--tasks_per_node", "2")
    words = {finding["check"]: finding["word"] for finding in page["findings"]}
    assert answer.returncode == 0, answer
    assert set(words) == set(ORDER)
    assert set(words.values()) <= {"ok", "WARN"}, page
    assert {name: words[name] for name in ("signal", "requeue", "kill", "W&B")} == dict.fromkeys(("signal", "requeue", "kill", "W&B"), "ok")


@pytest.mark.slurm
@pytest.mark.timeout(1500)
def test_a_sane_cluster_is_all_well(cluster, tmp_path):
    answer, page = run_real(tmp_path / "prove", cluster, "--nodes", "2", "--tasks_per_node", "2", timeout=1400)
    words = {finding["check"]: finding["word"] for finding in page["findings"]}
    assert answer.returncode == 0, answer
    assert set(words) == set(ORDER)
    assert {name: words[name] for name in ("signal", "requeue", "kill", "W&B")} == dict.fromkeys(("signal", "requeue", "kill", "W&B"), "ok")
    assert re.search(r"Slurm started it again after \d+ s", next(row["measured"] for row in page["findings"] if row["check"] == "requeue"))
    assert list_jobs(cluster) == []
    assert [path.name for path in (tmp_path / "prove").iterdir()] == ["prove.json"]


@pytest.fixture
def on_slurm(cluster, tmp_path, fake, monkeypatch):
    """Runs the program here, with one made-up check before the drills; what it found, by check."""
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    monkeypatch.setattr(prove, "CHECKS", (fake("joined=ok"),))
    monkeypatch.setattr(prove, "ORDER", ("joined", "signal", "requeue", "kill", "W&B"))
    folder = tmp_path / "shared"

    def run():
        status = prove.main(["--nodes", "1", "--tasks_per_node", "2", "--folder", str(folder)])
        return status, {row["check"]: row for row in json.loads((folder / "prove.json").read_text())["findings"]}

    return run


@pytest.mark.slurm
def test_a_site_that_forbids_requeue_is_named_and_the_run_goes_on(cluster, on_slurm):
    over = threading.Event()

    def forbid():
        while not over.wait(0.5):
            for job in slurm.read_jobs():
                if job.is_active:
                    subprocess.run(["scontrol", "update", f"JobId={job.number}", "Requeue=0"], env=cluster, capture_output=True)

    thread = threading.Thread(target=forbid)
    thread.start()
    try:
        status, found = on_slurm()
    finally:
        over.set()
        thread.join()
    assert {check: row["word"] for check, row in found.items()} == {
        "joined": "ok",
        "signal": "ok",
        "requeue": "WARN",
        "kill": "ok",
        "W&B": "ok",
    }
    assert "this site did not requeue the job; submitted again, it went on" in found["requeue"]["measured"]
    assert "bit-equal" in found["requeue"]["measured"]
    assert status == 0


@pytest.mark.slurm
def test_a_signal_that_does_not_arrive_is_named(on_slurm, monkeypatch):
    make = prove.make_slurm_executor

    def make_deaf(*arguments):
        executor = make(*arguments)
        executor.parameters["additional_parameters"]["signal"] = "CONT@75"  # which nobody hears
        return executor

    monkeypatch.setattr(prove, "make_slurm_executor", make_deaf)
    monkeypatch.setattr(prove, "HOLD_S", 40.0)
    status, found = on_slurm()
    assert status == 1
    assert (found["signal"]["word"], found["signal"]["measured"]) == ("WRONG", "USR1 reached 0 of 2 ranks")
    assert found["requeue"]["word"] == "WARN"
    assert found["kill"]["word"] == "ok"


@pytest.mark.slurm
def test_an_interrupted_run_cancels_its_jobs(cluster, tmp_path):
    command = [sys.executable, "-m", "launch.prove", "--nodes", "2", "--folder", str(tmp_path / "prove")]
    program = subprocess.Popen(command, env={**cluster, "PYTHONPATH": str(ROOT)}, text=True, stderr=subprocess.PIPE)
    wait_for(lambda: len(list_jobs(cluster)) == 2)
    time.sleep(3)
    program.send_signal(signal.SIGINT)
    assert program.wait(90) == 130
    assert list_jobs(cluster) == []
    assert not (tmp_path / "prove").exists()
