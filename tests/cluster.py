"""The development cluster for the tests: a real Slurm, and jobs on it."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "slurm/train.sh"
SLOW_TASK = shlex.quote(str(ROOT / "tests/slow_task.py"))  # each step waits; none computes longer


class Job:
    def __init__(self, environ, folder, options="", training="", script=TRAIN, **variables):
        self.environ, self.folder = {**environ, **variables}, folder
        command = ["sbatch", "--parsable", *shlex.split(options), str(script), *shlex.split(training)]
        self.id = subprocess.run(command, env=self.environ, cwd=folder, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()

    def run(self, *command):
        return subprocess.run(command, env=self.environ, text=True, capture_output=True, timeout=120)

    def update(self, **settings):
        answer = self.run("scontrol", "update", f"JobId={self.id}", *(f"{name}={value}" for name, value in settings.items()))
        assert answer.returncode == 0, answer

    def bring_limit_near(self):
        """Set a time limit one to two minutes from now: the signal 90 s before it is due at once and comes within 30 s, amid the steps.

        However long the start took, that is; a limit that has passed ends the job without the signal.
        """
        hours, minutes, _ = map(int, self.show("RunTime").split(":"))
        self.update(TimeLimit=60 * hours + minutes + 2)

    @property
    def log(self):
        path = self.folder / f"mnist-dist-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def show(self, name):
        return re.search(rf"\b{name}=(\S*)", self.run("scontrol", "show", "job", self.id).stdout)[1]

    def wait_for(self, text, times=1, timeout=240):
        end = time.monotonic() + timeout
        while len(re.findall(text, self.log)) < times:
            assert time.monotonic() < end, f"no {text!r} in:\n{self.log}"
            time.sleep(0.5)

    def wait_state(self, *states, timeout=240):
        end = time.monotonic() + timeout
        while (state := self.show("JobState")) not in states:
            assert time.monotonic() < end, f"{state}:\n{self.log}"
            time.sleep(0.5)
        return state


def launch(environ, folder, program, words, timeout=120):
    """What one of the launchers answers, called in `folder`."""
    command = [sys.executable, "-m", f"launch.{program}", *shlex.split(words)]
    environ = {**environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, cwd=folder, text=True, capture_output=True, timeout=timeout)


class Submitted(Job):
    """A job of launch.submit."""

    def __init__(self, environ, folder, options, run_dir="run"):
        self.environ, self.folder, self.path = environ, folder, folder / run_dir
        self.submit(options)

    def submit(self, options):
        answer = launch(self.environ, self.folder, "submit", f"{options} --run_dir {shlex.quote(str(self.path.relative_to(self.folder)))}")
        assert answer.returncode == 0, answer
        self.id = re.search(r"submitted job (\d+)", answer.stdout)[1]

    @property
    def log(self):
        path = self.path / f"slurm/{self.id}.log"
        return path.read_text() if path.exists() else ""
