"""Whatever happens to Weights & Biases, training goes on, and what it logged can be read."""

import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import processes
import psutil
import pytest
import torch
from bad_server import BadServer
from PIL import Image
from processes import TINY, Rank, run_ranks, start_ranks
from torch.utils.data import TensorDataset

from mnist_dist import tracking
from mnist_dist.config import configure, make_config
from mnist_dist.console import set_up_logging
from mnist_dist.distributed import join_group
from mnist_dist.errors import UserError
from mnist_dist.figures import render_pixels
from mnist_dist.loop import train
from mnist_dist.task import Data, Evaluation, Example, Panel
from mnist_dist.tasks.mnist import Mnist
from mnist_dist.tracking import AccelerateTracker, NoTracker, WandbTracker, check_project, open_tracker, starting_ahead
from mnist_dist.world import World

KEY = "c0ffee" * 6 + "abcd"  # looks like a key, and must be found nowhere
WANDB = Path(sys.executable).with_name("wandb")
WANDB_CORE = Path(importlib.util.find_spec("wandb").origin).with_name("bin") / "wandb-core"
BEST = {"train/loss": "min", "test/loss": "min", "holdout/loss": "min", "test/accuracy": "max", "holdout/accuracy": "max"}
RESULT = {"step": 40, "test/accuracy": 0.5, "test/confusion_matrix": [[1, 2], [3, 4]]}
WRONG = torch.full((2, 28, 28), 99, dtype=torch.uint8)


class TwoClasses(Mnist):
    """Of its 12 test images 2 are wrong: a zero and a one."""

    @property
    def class_names(self) -> tuple[str, str]:
        return "zero", "one"

    def show(self) -> list[Panel]:
        """What the trackers get of them."""
        split = TensorDataset(WRONG, torch.tensor([0, 1]))
        examples = [Example(0, [0.25, 0.75]), Example(1, [0.5, 0.5])]
        return self.draw_evaluation(Data(split, split), Evaluation(12, {"confusion_matrix": [[7, 1], [1, 3]]}, examples))


@dataclass(frozen=True)
class Train:
    """A training process: rows `first` to `middle`, a pause until the file `go` is there, rows to `last`, the end."""

    folder: Path
    environ: dict[str, str]
    first: int = 1
    middle: int = 20
    last: int = 40
    result: dict | None = field(default_factory=lambda: RESULT)
    stopped: bool = False
    busy: bool = False
    system_metrics: bool = False
    best: dict = field(default_factory=lambda: BEST)
    file_bytes_max: int = 0
    unknown_user: bool = False
    finish_s: float = 60.0  # a machine with too much to do must not decide what W&B gets

    def __call__(self):
        tracking._FINISH_S = self.finish_s
        if self.unknown_user:
            user = os.getuid()
            if ctypes.CDLL(None).unshare(0x10000000):  # CLONE_NEWUSER
                print("no user namespaces")
                return 0
            Path("/proc/self/uid_map").write_text(f"54321 {user} 1")
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        os.environ.update({"HOME": str(self.folder / "home"), "SOME_TOKEN": KEY, **self.environ})
        if self.unknown_user:
            del os.environ["HOME"]
        os.chdir(self.folder)
        if self.file_bytes_max:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes_max, self.file_bytes_max))
        set_up_logging(0, 1)
        before = dict(os.environ), threading.active_count(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
        config = {"learning_rate": 0.1, "api_key": "hush-hush", "note": f"pasted {KEY} by mistake", "precision": "auto"}
        start = time.perf_counter()
        facts = {"precision": "fp32", "versions": {"torch": "2"}, "job_token": "hush-hush"}
        more = {"job_type": "train", "tags": ["one", "two"], "notes": "on host", "system_metrics": self.system_metrics, "best": self.best}
        with starting_ahead("auto", World()):
            tracker = open_tracker("auto", self.folder / "run", config, facts=facts, **more)
        seconds = {"open": time.perf_counter() - start}
        assert isinstance(tracker, WandbTracker)
        print("mirror", tracker._process.pid)
        logs = []
        for step in range(self.first, self.last + 1):
            row = {
                "step": step,
                "epoch": step / 10,
                "train/loss": 1 / step,
                "test/accuracy": step / 100,
                "test/class_accuracy": [0.5, 0.25],
            }
            start = time.perf_counter()
            tracker.log(row)
            logs.append(time.perf_counter() - start)
            if step == self.middle:
                tracker.log_images(step, {"images/data_sample": self.folder / "sample.png"})
                print("middle")
                while not (self.folder / "go").exists():
                    time.sleep(0.02)
                    tracker.log({"step": step, "extra": 1}) if self.busy else tracker._exchange()  # as the rows of a longer run would
                    if tracker.stop_requested:
                        print("stop requested")
                        break
        if self.result is not None:
            tracker.log_panels(self.last, TwoClasses().show())
            tracker.log_model(self.folder / "sample.png")
        start = time.perf_counter()
        tracker.finish(self.result, stopped=self.stopped)
        seconds |= {"finish": time.perf_counter() - start, "log": sorted(logs)[len(logs) // 2], "longest log": max(logs)}
        tracker.log({"step": self.last + 1})  # too late, and no harm
        assert before == (dict(os.environ), threading.active_count(), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        assert "wandb" not in sys.modules
        print("seconds", json.dumps(seconds))
        return 0


@dataclass
class Play:
    """A training process, its server, and what they leave behind."""

    folder: Path
    server: BadServer
    key: bool = True
    environ: dict[str, str] = field(default_factory=dict)
    rank: Rank = None

    def start(self, **changes) -> None:
        self.temporary.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), 200).save(self.folder / "sample.png")
        (self.folder / "go").unlink(missing_ok=True)
        environ = {"WANDB_BASE_URL": self.server.url, "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1", "TMPDIR": str(self.temporary)}
        environ |= ({"WANDB_API_KEY": KEY} if self.key else {}) | self.environ
        (self.rank,) = start_ranks(self.folder, replace(Train(self.folder, environ), **changes))

    def wait_for(self, text: str) -> None:
        self.rank.wait_for(lambda: text in self.rank.text)

    def wait_for_upload(self, step: int) -> None:
        self.rank.wait_for(lambda: any(row["step"] == step for row in self.server.rows))

    def wait_for_flush(self) -> None:
        def is_flushed() -> bool:
            with contextlib.suppress(subprocess.CalledProcessError, ValueError):  # no file yet, or nothing in it
                return any(piece.steps[-1:] == [20] for piece in self.pieces)
            return False

        self.wait_for("middle")
        self.rank.wait_for(is_flushed)

    def go(self) -> None:
        (self.folder / "go").touch()

    def end(self) -> None:
        self.go()
        assert self.rank.wait() == 0, self.rank.text

    @property
    def temporary(self) -> Path:
        return self.folder / ("t" * 108)  # no socket fits into it

    @property
    def processes(self) -> list[psutil.Process]:
        """The mirrors, and all that live in this play's folder."""
        mirrors = re.findall(r"^mirror (\d+)$", self.rank.text, re.MULTILINE)
        found = [psutil.Process(pid) for pid in map(int, mirrors) if psutil.pid_exists(pid)]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.folder / "run" / "wandb" / "cache") == process.environ().get("WANDB_CACHE_DIR"):
                    found.append(process)
        return found

    @property
    def mirror(self) -> psutil.Process:
        self.wait_for("mirror ")
        return psutil.Process(int(self.rank.text.split("mirror ")[1].split()[0]))

    @property
    def helpers(self) -> list[psutil.Process]:
        """W&B's own; what else the mirror starts lives so shortly that it may be gone before it is asked for its name."""
        found = []
        for child in self.mirror.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name().startswith("wandb-core"):
                    found.append(child)
        return found

    @property
    def helper(self) -> psutil.Process:
        (found,) = self.helpers
        return found

    @property
    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    @property
    def warnings(self) -> int:
        return self.logs.count("metrics.jsonl has everything; upload what W&B has later with: wandb sync --include-online ")

    @property
    def seconds(self) -> dict[str, float]:
        return json.loads(self.rank.text.split("seconds ")[1])

    @property
    def pieces(self) -> list["Piece"]:
        return [read_piece(path) for path in sorted((self.folder / "run" / "wandb").glob("*run-*"), key=lambda path: path.stat().st_ctime)]


@dataclass
class Piece:
    """What W&B's own reader finds in one of its folders."""

    name: str
    steps: list[int]
    images: list[Path]
    config: dict
    records: list[dict]

    @property
    def ended(self) -> bool:
        return self.exit_codes != []

    @property
    def exit_codes(self) -> list[int]:
        return [end["exit_code"] for end in self.find("exit")]  # it may have a runtime, too

    def find(self, kind: str) -> list[dict]:
        return [record[kind] for record in self.records if record["type"] == kind]


def read_records(path: Path) -> list[dict]:
    (file,) = path.glob("*.wandb")
    # What `wandb leet inspect` runs, without the second that it takes to find that out.
    command = [WANDB_CORE, "leet", "inspect", "--no-observability", "--json", "--run-file", file]
    return [json.loads(line) for line in subprocess.run(command, capture_output=True, check=True).stdout.splitlines()]


def read_piece(path: Path) -> Piece:
    records = read_records(path)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    paths = [path / "files" / value for row in rows for name, value in row.items() if name == "images/data_sample.path"]
    config = {name: value for record in records if record["type"] == "run" for name, value in record["run"]["config"]["update"].items()}
    steps = [row["step"] for row in rows if "train/loss" in row]
    return Piece(path.name, steps, paths, config, records)


PLAYS: dict[str, Callable[[Play], None]] = {}


def has_ended(process: psutil.Process) -> bool:
    """Whether it has, though nobody may have asked for its exit status yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def play(function):
    PLAYS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    """All plays, played side by side: they mostly wait. Those of slow tests are played when they are asked for."""
    folder = tmp_path_factory.mktemp("plays")

    def perform(name: str, act: Callable[[Play], None]) -> Play:
        with BadServer() as server:
            performed = Play(folder / name, server)
            try:
                act(performed)
            finally:
                if performed.rank is not None and performed.rank.is_alive:
                    performed.rank.process.kill()
        return performed

    with ThreadPoolExecutor(6) as pool:
        performances = {name: pool.submit(perform, name, act) for name, act in PLAYS.items() if name not in SLOW_PLAYS}

        def get(name: str) -> Play:
            if name not in performances:
                performances[name] = pool.submit(perform, name, PLAYS[name])
            return performances[name].result()

        yield get


def play_bad_start(mode):
    def act(play: Play) -> None:
        play.server.refuse() if mode == "refuse" else setattr(play.server, "mode", mode)
        play.start()
        play.wait_for("keeps this run offline")
        play.end()

    return act


def play_bad_end(mode):
    def act(play: Play) -> None:
        play.start()
        play.wait_for_upload(20)
        play.server.refuse() if mode == "refuse" else setattr(play.server, "mode", mode)
        play.end()

    return act


FAULTS = ("refuse", "hang", "401", "429", "500")
PLAYS |= {f"{mode} at the start": play_bad_start(mode) for mode in FAULTS}
PLAYS |= {f"{mode} in the middle": play_bad_end(mode) for mode in FAULTS}
# Of slow tests, too, and looked at as all are.
LONG_PLAYS = {"stop_pressed_on_the_page", "offline_twice_then_uploaded", "mirror_stopped", "everything_killed_and_started_again"}
SLOW_FAULTS = ("refuse", "hang", "429", "500")  # to the training they are all alike
SLOW_PLAYS = {f"{mode} {when}" for mode in SLOW_FAULTS for when in ("at the start", "in the middle")} | LONG_PLAYS
mark_faults = pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW_FAULTS else f for f in FAULTS])


@mark_faults
def test_a_server_that_fails_at_the_start_leaves_an_offline_run(plays, fault):
    play = plays(f"{fault} at the start")
    (piece,) = play.pieces
    assert piece.name.startswith("offline-run-")
    assert (piece.steps, piece.ended) == ([*range(1, 41)], True)
    assert [image.stat().st_size > 50 for image in piece.images] == [True]
    assert play.warnings == 1, play.logs
    assert play.seconds["open"] < 10
    assert play.seconds["finish"] < 30


@mark_faults
def test_a_server_that_fails_in_the_middle_costs_nothing_but_its_own_copy(plays, fault):
    play = plays(f"{fault} in the middle")
    (piece,) = play.pieces
    assert piece.name.startswith("run-")
    assert (piece.steps, piece.ended, len(piece.images)) == ([*range(1, 41)], True, 1)
    assert play.warnings == 1, play.logs
    assert play.seconds["finish"] < 30
    assert [row["step"] for row in play.server.rows if "train/loss" in row] == [*range(1, 21)]


@play
def immediate_end_while_the_server_hangs(play):
    play.server.mode = "hang"
    play.start()
    play.end()


def test_a_run_that_ends_while_the_server_hangs_waits_no_longer_than_it_may(plays):
    play = plays("immediate_end_while_the_server_hangs")
    assert play.seconds["finish"] < 45
    assert play.warnings == 1, play.logs


REFUSED = {"pictures": "403 at upload/", "a table": "403 at CreateArtifact"}
PLAYS |= {f"{mode} at the end": play_bad_end(mode) for mode in REFUSED.values()}


@pytest.mark.parametrize("what", REFUSED)
def test_a_server_that_refuses_a_part_is_told_of(plays, what):
    play = plays(f"{REFUSED[what]} at the end")
    assert [row["step"] for row in play.server.rows if "train/loss" in row] == [*range(1, 41)]
    assert play.logs.count("W&B refused a part of this run; metrics.jsonl has everything") == 1, play.logs
    assert play.warnings == 1


STAGES = ("RunResumeStatus", "UpsertBucket", "file_stream", "CreateRunFiles", "upload/")


def play_hang(stage):
    def act(play: Play) -> None:
        play.server.mode = f"hang at {stage}"
        play.start()
        play.wait_for("middle")
        play.wait_for("W&B ")
        play.end()

    return act


PLAYS |= {f"hang at {stage}": play_hang(stage) for stage in STAGES}
SLOW_PLAYS |= {f"hang at {stage}" for stage in STAGES}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_wherever_the_server_hangs_the_run_ends_in_time_and_is_there(plays, stage):
    play = plays(f"hang at {stage}")
    (piece,) = play.pieces
    assert (piece.steps, piece.ended, len(piece.images)) == ([*range(1, 41)], True, 1)
    assert play.seconds["finish"] < 30
    assert play.warnings == 1, play.logs


@play
def without_a_key(play):
    play.key = False
    play.start()
    play.end()


def test_without_a_key_the_run_is_offline_and_one_line_says_so(plays):
    play = plays("without_a_key")
    (piece,) = play.pieces
    assert (piece.steps, piece.ended, len(piece.images)) == ([*range(1, 41)], True, 1)
    lines = [line for line in play.logs.splitlines() if "W&B" in line]
    command = f"wandb sync --include-online {shlex.quote(str(play.folder / 'run' / 'wandb'))}"
    assert lines == [f"W&B keeps this run offline, because there is no API key; upload it later with: {command}"]
    assert piece.config["learning_rate"] == 0.1
    assert piece.config["api_key"] == "(hidden)"
    assert piece.config["note"] == "pasted (hidden) by mistake"
    assert not play.server.bodies
    assert not (play.folder / "home").exists()
    assert play.seconds["log"] < 0.001


@play
def with_a_good_server(play):
    play.environ |= {"WANDB_DEBUG": "true", "WANDB_CORE_DEBUG": "true"}  # W&B's logs would have the key
    play.start(last=25, result=None)
    play.end()
    play.key = False
    (play.folder / "home").mkdir()
    (play.folder / "home" / ".netrc").write_text(f"machine {play.server.url.removeprefix('http://')} login user password {KEY}\n")
    play.start(first=21, middle=30)  # from a checkpoint older than the last row, as after a SIGKILL
    play.end()


def test_a_requeued_run_goes_on_as_the_same_run_and_its_steps_only_rise(plays):
    play = plays("with_a_good_server")
    (run_id,) = play.server.run_ids
    assert [piece.name.split("-")[-1] for piece in play.pieces] == [run_id, run_id]
    assert run_id == (play.folder / "run" / "wandb" / "run_id").read_text().splitlines()[0]
    steps = [row["step"] for row in play.server.rows if "train/loss" in row]
    assert steps in ([*range(1, 41)], [*range(1, 26), *range(25, 41)])
    assert play.warnings == 0, play.logs
    # What the server has is not sent again by a later `wandb sync`.
    assert len([*(play.folder / "run" / "wandb").glob(f"run-*/run-{run_id}.wandb.synced")]) == 2
    assert play.logs.count(f"W&B mirrors this run: {play.server.url}/someone/mnist-dist/runs/{run_id}") == 2
    assert len([name for name in play.server.files if name.startswith("media/images/images/data_sample")]) == 2
    assert play.server.summary["result/test/accuracy"] == 0.5
    assert play.server.summary["test/accuracy"] == {"last": 0.4, "max": 0.4}
    assert play.server.summary["class_accuracy/1"] == 0.25
    assert play.seconds["finish"] < 30


@play
def offline_twice_then_uploaded(play):
    play.key = False
    play.start(last=25, result=None)
    play.end()
    play.start(first=26, middle=30)
    play.end()
    command = next(line for line in play.logs.splitlines() if "wandb sync" in line).split("with: wandb ")[1]
    environ = os.environ | {
        "HOME": str(play.folder),
        "WANDB_API_KEY": KEY,
        "WANDB_BASE_URL": play.server.url,
        "WANDB_ERROR_REPORTING": "false",
    }
    subprocess.run(f"{WANDB} {command}", shell=True, env=environ, check=True, capture_output=True, timeout=120)


@pytest.mark.slow
def test_the_command_in_the_log_uploads_all_pieces_of_a_requeued_run(plays):
    play = plays("offline_twice_then_uploaded")
    assert len(play.pieces) == 2
    assert len(play.server.run_ids) == 1
    assert [row["step"] for row in play.server.rows if "train/loss" in row] == [*range(1, 41)]
    assert len([name for name in play.server.files if name.startswith("media/images/images/data_sample")]) == 2


@play
def stopped_by_a_signal(play):
    play.key = False
    play.environ |= {"WANDB_TAGS": "theirs", "WANDB_NOTES": "my note", "WANDB_JOB_TYPE": "my type", "WANDB_RUN_GROUP": "my group"}
    play.start(last=25, result=None, stopped=True)
    play.end()
    play.start(first=26, middle=30, result=None, best={"test/perplexity": "min"})
    play.end()


def test_a_run_that_a_signal_stopped_is_preempted_and_one_that_broke_is_failed(plays):
    stopped, broken = plays("stopped_by_a_signal").pieces
    assert (len(stopped.find("preempting")), stopped.exit_codes) == (1, [1])
    assert (len(broken.find("preempting")), broken.exit_codes) == (0, [1])
    (finished,) = plays("without_a_key").pieces
    assert (len(finished.find("preempting")), finished.exit_codes) == (0, [0])


def test_config_and_description_are_what_was_given_and_wandbs_own_variables_win(plays):
    (piece,) = plays("without_a_key").pieces
    assert piece.config["precision"] == "fp32"
    assert piece.config["versions"] == {"torch": "2"}
    assert piece.config["job_token"] == "(hidden)"
    (run,) = piece.find("run")
    assert [run.get(name) for name in ("job_type", "run_group", "tags", "notes")] == ["train", None, ["one", "two"], "on host"]
    (run, *_) = plays("stopped_by_a_signal").pieces[0].find("run")
    assert [run[name] for name in ("job_type", "run_group", "tags", "notes")] == ["my type", "my group", ["theirs"], "my note"]


def test_panels_are_drawn_over_the_step_and_counters_have_none(plays):
    (piece,) = plays("without_a_key").pieces
    metrics = {metric.get("name") or metric.get("glob_name"): metric for metric in piece.find("metric")}
    assert {name for name, metric in metrics.items() if metric.get("options", {}).get("hidden")} == {"step", "epoch"}
    assert {metric["step_metric"] for name, metric in metrics.items() if name not in ("step", "epoch")} == {"step"}


def test_what_is_best_of_a_metric_is_its_task_to_say(plays):
    def read_best(piece):
        return {metric["name"]: min({*metric["summary"]} - {"last"}) for metric in piece.find("metric") if metric.get("summary")}

    usual, own = plays("stopped_by_a_signal").pieces
    lowest = dict.fromkeys(("train/loss", "test/loss", "holdout/loss"), "min")
    assert read_best(usual) == lowest | dict.fromkeys(("test/accuracy", "holdout/accuracy"), "max")
    assert read_best(own) == {"test/perplexity": "min"}


def test_mistakes_are_a_table_and_the_confusion_matrix_is_wandbs_own(plays):
    (piece,) = plays("without_a_key").pieces
    files = {}
    for artifact in piece.find("artifact"):
        files |= {entry["path"]: Path(entry["local_path"]).read_bytes() for entry in artifact["manifest"]["contents"]}
    wrong, matrix = [json.loads(files[f"predictions/{name}.table.json"]) for name in ("wrong", "confusion_matrix_table")]
    assert wrong["columns"] == ["image", "label", "predicted", "probability/zero", "probability/one"]
    assert [row[1:] for row in wrong["data"]] == [["zero", "one", 0.25, 0.75], ["one", "zero", 0.5, 0.5]]
    assert [files[row[0]["path"]] for row in wrong["data"]] == [render_pixels(WRONG[0])] * 2
    assert matrix["data"] == [["zero", "zero", 7], ["zero", "one", 1], ["one", "zero", 1], ["one", "one", 3]]
    server = plays("with_a_good_server").server
    model, *tables = sorted(server.artifacts)
    assert model == f"model-{min(server.run_ids)}"
    assert [name.split("-")[2] for name in tables] == ["predictionsconfusion_matrix_table", "predictionswrong"]


@pytest.mark.parametrize("fault", ["hang", pytest.param("refuse", marks=pytest.mark.slow), "401"])
def test_tables_of_a_run_whose_server_fails_are_in_the_run_folder(plays, fault):
    (piece,) = plays(f"{fault} in the middle").pieces
    (row,) = [row["item"] for row in piece.find("history") if "predictions/wrong.path" in row["item"]]
    for name in ("wrong", "confusion_matrix_table"):
        path = plays(f"{fault} in the middle").folder / "run" / "wandb" / piece.name / "files" / row[f"predictions/{name}.path"]
        assert len(json.loads(path.read_text())["data"]) in (2, 4)


@play
def stop_pressed_on_the_page(play):
    play.start()
    play.wait_for_upload(20)
    play.server.stopped = True
    play.rank.wait_for(lambda: "stop requested" in play.rank.text)
    play.end()


@play
def refused_with_a_wish_to_stop_then(play):
    play.environ["WANDB_STOP_ON_FATAL_ERROR"] = "true"
    play.start(busy=True)
    play.wait_for_upload(20)
    play.server.mode = "401"
    with contextlib.suppress(AssertionError):  # W&B looks every 15 s
        play.rank.wait_for(lambda: "stop requested" in play.rank.text, 17)
    play.end()


SLOW_PLAYS |= {"refused_with_a_wish_to_stop_then"}


@pytest.mark.slow
def test_stop_on_the_page_of_the_run_is_a_request_to_the_training(plays):
    play = plays("stop_pressed_on_the_page")
    assert "stop was pressed on the page of this run" in play.logs
    assert play.warnings == 0, play.logs


@pytest.mark.slow
def test_what_the_server_refuses_is_no_request_to_stop(plays):
    play = plays("refused_with_a_wish_to_stop_then")
    assert "stop requested" not in play.logs
    assert play.warnings == 1, play.logs


@play
def with_system_metrics(play):
    play.environ["WANDB__STATS_SAMPLING_INTERVAL"] = "0.2"
    play.start(system_metrics=True)
    play.rank.wait_for(lambda: any(b"system.cpu" in body for body in play.server.bodies))
    play.end()


def test_the_machine_is_measured_only_if_asked_for(plays):
    assert plays("with_system_metrics").warnings == 0
    assert {variables["host"] for variables in plays("with_system_metrics").server.upserts} == {None}
    assert "wandb-metadata.json" not in plays("with_system_metrics").server.files
    assert not any(b"system." in body for body in plays("with_a_good_server").server.bodies)


@play
def helper_killed_offline(play):
    play.key = False
    play.start()
    play.wait_for("offline")
    play.helper.kill()
    play.end()


def play_death(question, **changes):
    """The helper dies while the mirror waits for the server's answer to `question`, or just before the mirror asks it anything."""

    def act(play: Play) -> None:
        if question:
            play.server.mode = f"hang at {question}"
        play.start(last=20, **changes)
        play.wait_for_upload(20)
        helper = play.helper
        if question:
            play.go()
            play.rank.wait_for(lambda: any(question.encode() in body for body in play.server.bodies))
        helper.kill()
        play.rank.wait_for(lambda: has_ended(helper))
        play.server.mode = "good"
        play.end()

    return act


DEATHS = {
    "before a table": play_death(None),
    "in a table": play_death("CreateArtifact"),
    "before the end": play_death(None, result=None),
    "in the end": play_death('"complete":true', result=None),
}
PLAYS |= {f"helper killed {moment}": act for moment, act in DEATHS.items()}


@pytest.mark.parametrize("moment", DEATHS)
def test_a_dead_helper_is_replaced_whatever_it_is_asked_next(plays, moment):
    play = plays(f"helper killed {moment}")
    assert [row["step"] for row in play.server.rows if "train/loss" in row] in ([*range(1, 21)], [*range(1, 21), 20])
    assert bool(play.server.artifacts) is ("table" in moment)
    assert play.logs.count("W&B's helper process died and is started again") == 1
    assert play.warnings == 0, play.logs


def play_early_death(wait_for_folder):
    """The helper dies while the run is opened offline: before it can be reached, or as soon as the folder of the run is there."""

    def act(play: Play) -> None:
        play.environ["WANDB_MODE"] = "offline"  # else the first helper is that of a try online
        play.start()
        play.rank.wait_for(lambda: play.helpers)
        helper = play.helper
        while wait_for_folder and not any((play.folder / "run" / "wandb").glob("offline-run-*")):
            time.sleep(0.001)
        helper.kill()
        play.end()

    return act


EARLY_DEATHS = {"before it answers": play_early_death(False), "while it opens the run": play_early_death(True)}
PLAYS |= {f"helper killed {moment}": act for moment, act in EARLY_DEATHS.items()}
SLOW_PLAYS |= {"helper killed before it answers"}


@pytest.mark.parametrize("moment", [pytest.param("before it answers", marks=pytest.mark.slow), "while it opens the run"])
def test_a_helper_that_dies_while_the_run_is_opened_is_replaced(plays, moment):
    play = plays(f"helper killed {moment}")
    (piece,) = play.pieces
    assert (piece.steps, piece.ended, len(piece.images)) == ([*range(1, 41)], True, 1)
    assert play.warnings == 0, play.logs


@play
def everything_signalled_online(play):
    play.start()
    play.wait_for_upload(20)
    for process in (play.helper, play.mirror):
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    play.end()


def test_a_dead_helper_is_replaced_and_gets_everything_again(plays):
    play = plays("helper_killed_offline")
    (piece,) = play.pieces
    assert (piece.steps, piece.ended, len(piece.images)) == ([*range(1, 41)], True, 1)
    assert play.logs.count("W&B's helper process died and is started again") == 1
    assert play.seconds["finish"] < 30


def test_a_signal_to_all_processes_of_the_job_does_not_end_the_mirror(plays):
    play = plays("everything_signalled_online")
    steps = [row["step"] for row in play.server.rows if "train/loss" in row]
    assert steps in ([*range(1, 41)], [*range(1, 21), *range(20, 41)])
    assert play.warnings == 0, play.logs


@play
def mirror_killed(play):
    play.key = False
    play.start()
    play.wait_for("offline")
    play.wait_for_flush()
    play.mirror.kill()
    play.end()


@play
def mirror_stopped(play):
    play.key = False
    play.start(finish_s=10.0)
    play.wait_for("offline")
    play.wait_for_flush()
    play.mirror.suspend()
    play.end()


@play
def training_killed(play):
    play.start()
    play.wait_for_upload(20)
    mirror, helper = play.mirror, play.helper
    assert KEY not in "".join(mirror.cmdline() + helper.cmdline())
    play.rank.process.kill()
    psutil.wait_procs([mirror, helper], 60)
    assert has_ended(mirror)
    assert has_ended(helper)


@play
def training_killed_while_wandb_hangs(play):
    play.key = False
    play.start(finish_s=10.0)
    play.wait_for("offline")
    play.wait_for_flush()
    mirror, helper = play.mirror, play.helper
    helper.suspend()
    play.rank.process.kill()
    psutil.wait_procs([mirror], 60)
    assert has_ended(mirror)
    helper.resume()
    psutil.wait_procs([helper], 30)


@play
def everything_killed_and_started_again(play):
    play.key = False
    play.start()
    play.wait_for("offline")
    play.wait_for_flush()
    together = (play.mirror, play.helper, psutil.Process(play.rank.process.pid))
    for process in together:  # or the one that dies last would begin to clear up after the others
        process.suspend()
    for process in together:
        process.kill()
    play.rank.wait()
    end = time.monotonic() + 60
    while play.processes:  # a process that is about to end still holds what it has
        assert time.monotonic() < end
        time.sleep(0.05)
    (left,) = (play.folder / "run" / "wandb").glob("mirror-tmp-*")
    assert any(left.iterdir())
    other = play.folder / "other"
    other.mkdir()
    (other / "file").touch()
    left.with_name("mirror-tmp-link").symlink_to(other)
    play.start(first=21)
    play.end()


def test_a_dead_mirror_is_given_up(plays):
    play = plays("mirror_killed")
    assert [piece.steps for piece in play.pieces] == [[*range(1, 21)]]
    assert play.warnings == 1, play.logs
    assert play.seconds["finish"] < 15


@pytest.mark.slow
def test_a_mirror_that_stands_still_is_left_behind(plays):
    play = plays("mirror_stopped")
    assert [piece.steps for piece in play.pieces] == [[*range(1, 21)]]
    assert play.warnings == 1, play.logs
    assert 9 < play.seconds["finish"] < 20


def test_the_mirror_outlives_a_killed_training_by_as_long_as_it_needs_to_finish(plays):
    play = plays("training_killed")
    (piece,) = play.pieces
    assert (piece.steps, piece.ended) == ([*range(1, 21)], True)


@pytest.mark.slow
def test_what_even_the_mirror_could_not_remove_goes_with_the_next_start_and_nothing_else(plays):
    play = plays("everything_killed_and_started_again")
    assert [path.name for path in (play.folder / "run" / "wandb").glob("mirror-tmp-*")] == ["mirror-tmp-link"]
    assert (play.folder / "other" / "file").exists()
    (play.folder / "run" / "wandb" / "mirror-tmp-link").unlink()
    assert [piece.steps for piece in play.pieces] == [[*range(1, 21)], [*range(21, 41)]]


@play
def full_disk(play):
    play.key = False
    play.start(middle=2, last=400, file_bytes_max=20_000)
    play.end()


def test_a_full_disk_costs_rows_of_the_mirror_and_nothing_else(plays):
    play = plays("full_disk")
    (piece,) = play.pieces
    assert piece.steps == [*range(1, len(piece.steps) + 1)]
    assert 10 < len(piece.steps) < 400
    assert play.warnings == 1, play.logs


def damage_key(play):
    play.environ["WANDB_API_KEY"] = f"{KEY[:30]}\n{KEY[30:]}\n"


def damage_address(play):
    play.environ["WANDB_BASE_URL"] = play.server.url.removeprefix("http://")


def damage_settings(play):
    for folder in (play.folder / "wandb", play.folder / "home" / ".config" / "wandb"):
        folder.mkdir(parents=True)
        (folder / "settings").write_bytes(b"\xff\xfe[default")


def put_pipe_for_settings(play):
    (play.folder / "wandb").mkdir()
    os.mkfifo(play.folder / "wandb" / "settings")


def damage_every_variable(play):
    from wandb import Settings

    play.environ |= {
        f"WANDB_{name.upper()}": "\trub/bish?\n" for name in [*Settings.model_fields, "dir", "name", "notes", "tags", "job_type"]
    }
    del play.environ["WANDB_MODE"]  # which says that a try online is not wanted
    (play.folder / "wandb.py").write_text("raise SystemExit('not this one')")
    play.environ |= {
        "PYTHONPATH": ":/nowhere",
        "PYTHONWARNINGS": "error",
        "WANDB_SERVICE": "rubbish",
        "WANDB_CONFIG_DIR": "/nowhere",
        "HOME": "/nowhere",
    }


def play_damage(damage):
    def act(play: Play) -> None:
        play.folder.mkdir()
        damage(play)
        play.start()
        play.wait_for("keeps this run offline")
        play.end()

    return act


DAMAGES = (damage_key, damage_address, damage_settings, put_pipe_for_settings, damage_every_variable)
PLAYS |= {damage.__name__: play_damage(damage) for damage in DAMAGES}


@pytest.mark.parametrize("damage", [damage.__name__ for damage in DAMAGES])
def test_whatever_is_wrong_in_the_environment_the_run_is_there_offline(plays, damage):
    play = plays(damage)
    (piece,) = play.pieces
    assert piece.name.startswith("offline-run-")
    assert (piece.steps, piece.ended, len(piece.images)) == ([*range(1, 41)], True, 1)
    assert play.warnings == 1, play.logs


@play
def no_temporary_folder(play):
    """As where /tmp, /var/tmp and the current folder are full or read-only."""
    (play.folder / "hook").mkdir(parents=True)
    (play.folder / "hook" / "sitecustomize.py").write_text("import tempfile\ntempfile._candidate_tempdir_list = list\n")
    play.environ["PYTHONPATH"] = str(play.folder / "hook")
    play.key = False
    play.start()
    play.end()


def test_without_any_temporary_folder_the_run_is_there_offline(plays):
    play = plays("no_temporary_folder")
    (piece,) = play.pieces
    assert (piece.steps, piece.ended, len(piece.images)) == ([*range(1, 41)], True, 1)
    assert play.warnings == 0, play.logs


@play
def unknown_user(play):
    play.start(unknown_user=True)
    play.end()


def test_a_user_without_a_name_and_a_home_is_mirrored(plays):
    play = plays("unknown_user")
    if "no user namespaces" in play.logs:
        pytest.skip("needs user namespaces")
    assert play.warnings == 0, play.logs
    assert [row["step"] for row in play.server.rows if "train/loss" in row] == [*range(1, 41)]


@play
def under_an_agent_of_a_sweep(play):
    play.environ |= {"WANDB_SWEEP_ID": "sw33p123", "WANDB_RUN_ID": "agents0id", "WANDB_RESUME": "never"}
    play.start()
    play.end()
    play.environ["WANDB_RUN_ID"] = "another1d"
    play.start(first=41, middle=42, last=43)
    play.end()


def test_under_an_agent_a_new_folder_is_the_agents_run_and_stays_it(plays):
    play = plays("under_an_agent_of_a_sweep")
    assert play.warnings == 0, play.logs
    assert play.server.run_ids == {"agents0id"}
    sweeps = [variables["sweep"] for variables in play.server.upserts]
    assert sweeps[0] == "sw33p123"
    assert sweeps[-1] is None
    assert play.logs.count("this run folder is the run agents0id on W&B; not heeded: WANDB_RUN_ID, WANDB_RESUME, WANDB_SWEEP_ID") == 1


mark_plays = pytest.mark.parametrize(
    "names", [PLAYS.keys() - SLOW_PLAYS, pytest.param(LONG_PLAYS, marks=pytest.mark.slow)], ids=["usual", "long"]
)


@mark_plays
def test_nothing_is_left_of_any_mirror(plays, names):
    for name in sorted(names):
        play = plays(name)
        psutil.wait_procs(play.processes, 30)  # W&B's helper looks from time to time whether the mirror is there
        assert play.processes == [], name
        assert [*play.temporary.iterdir()] == [], name
        assert [path for path in (play.folder / "run" / "wandb").glob("mirror-tmp-*") if not path.is_symlink()] == [], name


@mark_plays
def test_no_key_is_written_printed_or_sent_in_a_body(plays, names):
    for name in sorted(names):
        play = plays(name)
        for path in play.folder.rglob("*"):
            if path.is_file() and path.name != ".netrc":
                content = path.read_bytes()
                assert KEY[:30].encode() not in content, path
                assert b"hush-hush" not in content, path
        assert not any(KEY[:30].encode() in body or b"hush-hush" in body for body in play.server.bodies)


PICTURES = {"augmented_sample", "confusion_matrix", "correct_classification", "curves", "data_sample", "incorrect_classification"}
METRICS = {f"train/{name}" for name in ("loss", "learning_rate", "gradient_norm", "images_per_s")} | {"epoch", "step"}
METRICS |= {f"health/{name}" for name in ("step_s", "memory_gb", "restarts", "slowest_rank", "slowest_to_median")}
METRICS |= {"test/loss", "test/accuracy", *(f"class_accuracy/{digit}" for digit in range(10))}


def test_two_ranks_make_one_run_with_every_metric_and_picture(tmp_path):
    run = tmp_path / "run"
    arguments = [*TINY, "--report", "true", "--wandb", "offline", "--wandb_model", "--log_with", "tensorboard", "--run_dir", str(run)]
    run_ranks(tmp_path / "logs", processes.Train(arguments), 2)

    (path,) = (run / "wandb").glob("*run-*")
    records = read_records(path)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    images = rows[-1]
    last_row = [row for row in rows if "train/loss" in row][-1]
    assert [row["step"] for row in rows if "train/loss" in row] == [*range(1, 11)]
    assert [row["step"] for row in rows if "predictions/wrong.path" in row] == [5, 10, 10]  # at evaluations, and more of them at the end
    assert [row["step"] for row in rows if "images/training_images.path" in row] == [0]
    assert {name for name in last_row if not name.startswith("_")} == METRICS
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last_row["test/accuracy"] == record["test/accuracy"]
    assert {name for name in PICTURES if (path / "files" / images[f"images/{name}.path"]).stat().st_size > 5_000} == PICTURES
    config = next(record["run"]["config"]["update"] for record in records if record["type"] == "run")
    assert config["learning_rate"] == 0.01
    summary = {name: value for record in records if record["type"] == "summary" for name, value in record["summary"]["update"].items()}
    assert summary["test/accuracy"]["max"] == max(row.get("test/accuracy", 0) for row in rows)
    assert "result/test/confusion_matrix" in summary
    (artifact,) = [record["artifact"] for record in records if record["type"] == "artifact" and record["artifact"]["type"] == "model"]
    assert [entry["path"] for entry in artifact["manifest"]["contents"]] == ["model.safetensors"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard/run"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == METRICS
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, 11)]
    assert {name.removeprefix("images/") for name in events.Tags()["images"]} == PICTURES | {"training_images", "training_images_augmented"}


class FewestErrors(Mnist):
    """Runs of it are compared by their errors, of which fewer are better."""

    best = "errors"
    higher_is_better = False
    in_rows = ("loss", "errors")
    name = "mnist"


@pytest.mark.slow
def test_the_best_value_is_that_of_the_tasks_own_measure(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("mnist_dist.run_folder.open_tracker", lambda *_, **named: started.append(named["best"]) or NoTracker())
    values = {"dataset": "synthetic", "train_size": 40, "test_size": 10, "batch_size": 8, "steps": 1, "device": "cpu", "report": False}
    for task in (Mnist, FewestErrors):
        train(make_config(values | {"run_dir": str(tmp_path / task.__name__)}, task=task))
    train(make_config(values | {"run_dir": str(tmp_path / "held"), "holdout": 10, "test_size": None}))
    losses = {"train/loss": "min", "test/loss": "min"}
    assert started == [
        losses | {"test/accuracy": "max"},
        losses | {"test/errors": "min"},
        {"train/loss": "min", "holdout/loss": "min", "holdout/accuracy": "max"},
    ]


def test_a_tracker_that_is_not_installed_is_refused_and_one_that_fails_is_left_out(tmp_path, monkeypatch, caplog):
    with pytest.raises(UserError, match="log_with is aim, whose package is not installed"):
        AccelerateTracker.check("aim")
    with join_group(World(), configure()):
        tracker = AccelerateTracker("tensorboard", tmp_path, configure().values(), 0)
        monkeypatch.setattr(tracker._tracker, "log", lambda *_, **__: 1 / 0)
        for step in (1, 2):
            tracker.log({"step": step})
        tracker.log_images(2, {"images/none": tmp_path / "none.png"})
        tracker.log_panels(2, [Panel("", "images/none", figure=b"none")])
        tracker.finish({})
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "tensorboard failed and is left out from here on (ZeroDivisionError: division by zero)"
    ]


def test_a_run_that_is_not_mirrored_leaves_no_trace(tmp_path, monkeypatch):
    tracker = open_tracker("disabled", tmp_path / "run", {})
    assert type(tracker) is NoTracker
    tracker.log({"step": 1})
    tracker.log_images(1, {"images/none": tmp_path / "none.png"})
    tracker.log_panels(1, [Panel("", "images/none", figure=b"none")])
    tracker.finish(None)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert type(open_tracker("auto", tmp_path / "run", {})) is NoTracker
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_DISABLED", "True")
    assert type(open_tracker("auto", tmp_path / "run", {})) is NoTracker
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_a_full_disk_cut_short_is_written_again(tmp_path):
    tracker = WandbTracker.__new__(WandbTracker)
    tracker._folder = tmp_path
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            tracker._keep_picture(bytes(9_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert tracker._keep_picture(bytes(9_000)).read_bytes() == bytes(9_000)


def test_a_mirror_that_cannot_start_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "wandb").write_text("a file in the place of a folder")
    assert type(open_tracker("offline", tmp_path, {})) is NoTracker
    monkeypatch.setattr("sys.executable", str(tmp_path / "no python"))
    assert type(open_tracker("offline", tmp_path / "run", {})) is NoTracker
    assert [record.message.split(": ")[0] for record in caplog.records] == ["this run is not mirrored to W&B"] * 2


def test_a_process_started_ahead_mirrors_the_next_run_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "choose_threads", lambda _: 2)  # on one core none is started
    monkeypatch.setattr(tracking, "_FINISH_S", 60)
    with starting_ahead("offline", World()):
        (process,) = tracking._ahead
        first, second = [open_tracker("offline", tmp_path / name, {}) for name in ("first", "second")]
        assert first._process is process
        assert second._process is not process
    for tracker, name in ((first, "first"), (second, "second")):
        tracker.log({"step": 1, "train/loss": 0.5})
        tracker.finish({"step": 1})
        (path,) = (tmp_path / name / "wandb").glob("offline-run-*")
        assert read_piece(path).steps == [1]


@pytest.mark.slow
def test_a_process_started_ahead_of_no_run_ends_and_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "choose_threads", lambda _: 2)  # on one core none is started
    monkeypatch.chdir(tmp_path)
    for imported_s in (0, 3):
        with starting_ahead("offline", World()):
            (process,) = tracking._ahead
            time.sleep(imported_s)
        assert process.returncode is not None
    # Where the training is killed, nobody ends it.
    process = tracking._start_process()
    process.stdin.close()
    assert process.wait(60) == 0
    assert process.stdout.read() == b""
    process.stdout.close()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for mode in ("disabled", "auto"):
        with starting_ahead(mode, World()):
            assert tracking._ahead == []
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def starts(monkeypatch, tmp_path):
    """What mirrors are started with, without starting them."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    starts = []
    monkeypatch.setattr("mnist_dist.tracking.WandbTracker", lambda start, environ: starts.append(start))
    return starts


def test_a_moved_run_folder_is_the_same_run_and_a_copy_another(starts, tmp_path):
    run, moved, copy = tmp_path / "run", tmp_path / "moved", tmp_path / "copy"
    open_tracker("auto", run, {})
    (run / "wandb" / "run_id").write_text("abcdef012345\n")  # as older versions wrote it
    for _ in range(2):
        open_tracker("auto", run, {})
    run.rename(moved)
    open_tracker("auto", moved, {})
    shutil.copytree(moved, copy)
    for folder in (copy, moved, copy):
        open_tracker("auto", folder, {})
    first, second, third, after_move, of_copy, of_original, again = [start["run"]["run_id"] for start in starts]
    assert first != second == third == after_move == of_original == "abcdef012345"
    assert of_copy == again != of_original


def test_temporary_files_that_a_mirror_still_uses_stay(starts, tmp_path):
    used = tmp_path / "run" / "wandb" / "mirror-tmp-used0000"
    (used / "folder").mkdir(parents=True)
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    open_tracker("auto", tmp_path / "run", {})
    assert used.exists()
    os.close(descriptor)
    open_tracker("auto", tmp_path / "run", {})
    assert not used.exists()


@pytest.mark.parametrize("damage", ["pipe", "link to a pipe", "large", "rubbish", "of a copy"])
def test_a_damaged_run_id_is_replaced(starts, tmp_path, damage):
    path = tmp_path / "run" / "wandb" / "run_id"
    path.parent.mkdir(parents=True)
    if "pipe" in damage:
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe") if "link" in damage else path.with_name("pipe").rename(path)
    else:
        path.write_bytes({"large": b"a" * 100_000_000, "rubbish": b"\xff\0\n\n", "of a copy": b"abcdef012345\n1 '/elsewhere'\n"}[damage])
    for _ in range(2):
        open_tracker("auto", tmp_path / "run", {})
    first, second = [start["run"]["run_id"] for start in starts]
    assert first == second == path.read_text().splitlines()[0] != "abcdef012345"


@pytest.mark.parametrize(("command", "expected"), [("offline", "offline"), ("disabled", None), ("enabled", "auto")])
def test_auto_heeds_what_wandb_was_told_in_this_folder(starts, tmp_path, monkeypatch, command, expected):
    subprocess.run([WANDB, command], check=True, capture_output=True)
    open_tracker("auto", tmp_path / "run", {})
    assert [start["mode"] for start in starts] == ([expected] if expected else [])
    open_tracker("online", tmp_path / "run", {})
    monkeypatch.setenv("WANDB_MODE", "online")
    open_tracker("auto", tmp_path / "run", {})
    monkeypatch.setenv("WANDB_MODE", "oflfine")
    open_tracker("auto", tmp_path / "run", {})
    assert [start["mode"] for start in starts[-3:]] == ["online", "auto", "offline"]


def test_a_project_that_wandb_would_refuse_is_refused_before_the_run(starts, tmp_path, monkeypatch):
    for name in ("mnist", "p" * 128, "Käse & more"):
        check_project(name)
    for name in ("a/b", "a\\b", "50%", "p" * 129, "two\nlines", "\udcff"):
        with pytest.raises(UserError, match=r"wandb_project is .*: expected at most 128 printable characters, none of / \\ # \? % :"):
            check_project(name)
        open_tracker("auto", tmp_path / "run", {}, project=name)
    assert {start["run"]["project"] for start in starts} == {"mnist-dist"}
    # A stray variable is no reason to refuse a training.
    monkeypatch.setenv("WANDB_PROJECT", "a:b")
    open_tracker("auto", tmp_path / "run", {})
    assert starts[-1]["run"]["project"] == "mnist-dist"


def test_no_upload_is_advised_where_there_is_nothing_to_upload(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3")
    broken.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(broken))
    tracker = open_tracker("offline", tmp_path / "run", {})
    time.sleep(0.5)
    tracker.log({"step": 1})
    tracker.finish(None)
    assert [record.message for record in caplog.records] == ["W&B's process died; metrics.jsonl has everything"]
    assert not [*(tmp_path / "run" / "wandb").glob("mirror-tmp-*")]


def test_a_run_stopped_by_a_signal_is_preempted_on_the_page_and_has_its_pictures(tmp_path):
    run = tmp_path / "run"
    arguments = [*TINY, "--steps", "5000", "--evaluate_every", "5", "--wandb", "offline", "--run_dir", str(run)]
    ranks = start_ranks(tmp_path, processes.Train(arguments), 2)
    ranks[0].wait_for(lambda: "W&B keeps this run offline" in ranks[0].text and "step 20/" in ranks[0].text)
    ranks[1].kill(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [143, 143]
    (path,) = (run / "wandb").glob("*run-*")
    records = read_records(path)
    assert len([record for record in records if record["type"] == "preempting"]) == 1
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [1]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert {"images/training_images.path", "images/training_images_augmented.path"} < {*rows[0]}
    assert len([row for row in rows if "predictions/wrong.path" in row]) >= 3  # at each evaluation
    config = {name: value for record in records if record["type"] == "run" for name, value in record["run"]["config"]["update"].items()}
    assert (config["world_size"], config["nodes"], config["device"], config["precision"]) == (2, 1, "cpu", "fp32")
    assert (config["threads"], config["launcher"], config["parameters"]) == (1, "torchrun", 593_200)
    assert config["versions"]["torch"]
    (description,) = [record["run"] for record in records if record["type"] == "run"][:1]
    assert str(run) in description["notes"]
    assert "train" in json.dumps(description)
    starts, ends = ([json.loads(line) for line in (run / name).read_text().splitlines()] for name in ("starts.jsonl", "ends.jsonl"))
    assert len(starts) == 1
    assert (ends[0]["start"], ends[0]["why"]) == (1, "stopped by a signal to end, or Stop on W&B, saved")


@pytest.mark.slow
def test_stop_on_the_page_saves_and_ends_the_training(tmp_path):
    run = tmp_path / "run"
    with BadServer() as server:
        arguments = [*TINY, "--steps", "1000000", "--evaluate_every", "1000000", "--log_every", "200", "--wandb", "online"]
        environ = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}
        ranks = start_ranks(tmp_path, processes.Train([*arguments, "--run_dir", str(run)]), 2, environ)
        ranks[0].wait_for(lambda: "W&B mirrors this run" in ranks[0].text)
        server.stopped = True  # W&B looks every 15 s
        assert [rank.wait(60) for rank in ranks] == [143, 143]
    assert "stopped by a signal after step" in ranks[0].text
    assert list((run / "checkpoints").glob("step_*.pt"))


def test_a_secret_that_is_a_part_of_a_path_does_not_lose_the_run(tmp_path):
    run = tmp_path / "runs" / "run"
    run_ranks(tmp_path, processes.Train([*TINY, "--wandb", "offline", "--run_dir", str(run)]), environ={"MY_TOKEN": str(tmp_path / "runs")})
    (path,) = (run / "wandb").glob("offline-run-*")
    assert read_piece(path).steps == [*range(1, 11)]


def test_folders_of_similar_names_are_not_the_mirrors(tmp_path):
    run = tmp_path / "run"
    theirs = ["mirror-tmp-mine", "mirror-tmp-mine-too-and-longer", "my-run-notes", "offline-run-20260101_000000-other"]
    for name in theirs:
        (run / "wandb" / name).mkdir(parents=True)
    run_ranks(tmp_path, processes.Train([*TINY, "--wandb", "offline", "--run_dir", str(run)]))
    assert all((run / "wandb" / name).is_dir() for name in theirs)
