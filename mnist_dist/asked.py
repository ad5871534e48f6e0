"""How many processes were asked for, where no variable tells it. Imports no torch.

`accelerate launch` starts one process where it finds no GPUs, whatever it was asked for. And srun in a batch script that was submitted from
within another job starts as many as that one had.
"""

import contextlib
import itertools
import os
import re
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mnist_dist.errors import UserError

_ANCESTORS_MAX = 4  # accelerate launch, mpirun, its proxy of this host, a script
_COUNT_MAX = 1 << 20
_CONTROLLER_TIMEOUT_S = 20
_LAUNCH = re.compile(r"(^|[/\0])accelerate([-.]|/commands/|\0)(commands\.)?(accelerate_cli(\.py)?\0)?launch(\.py)?\0")
# Where Accelerate's options end and those of the program begin.
_PROGRAM = re.compile(r"mnist_dist\.\w+|.*\.py")


@dataclass(frozen=True)
class Asked:
    """How many processes on how many machines; 0 processes: several, but nobody knows how many."""

    processes: int = 1
    machines: int = 1


def count_asked(environ: Mapping[str, str]) -> Asked:
    """What the `accelerate launch` that started this process was asked for; one process where no such command did."""
    for ancestor in list_ancestors():
        words = read_command(ancestor)
        launch = _LAUNCH.search("\0".join(words[:8]) + "\0")
        if launch:
            asked = _read_options(words[launch.string[: launch.end() - 1].count("\0") + 1 :], environ)
            if asked is not None:
                return asked
            break
    # It tells its one process where to meet the others only where it was asked for others.
    several = environ.get("ACCELERATE_MIXED_PRECISION") and environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")
    return Asked(0) if several and not environ.get("RANK") else Asked()


def list_ancestors() -> list[int]:
    """The nearest ancestors of this process, parent first, as far as they can be seen."""
    found = [os.getppid()]
    with contextlib.suppress(OSError, psutil.Error):  # of another user's, the system may tell nothing
        while len(found) < _ANCESTORS_MAX and (parent := psutil.Process(found[-1]).ppid()):
            found.append(parent)
    return found


def read_command(pid: int) -> list[str]:
    """The command line of a process; empty where it cannot be read."""
    with contextlib.suppress(OSError, OverflowError, psutil.Error):
        return psutil.Process(pid).cmdline()
    return []


def _read_options(words: list[str], environ: Mapping[str, str]) -> Asked | None:
    """What the command line says, and where it does not, the config file; None where neither can be read."""
    options = list(itertools.takewhile(lambda word: not _PROGRAM.fullmatch(word), words))
    processes, machines = (_to_count(_find_option(options, *names)) for names in (("num-processes", "num-p"), ("num-machines", "num-m")))
    file = _find_option(options, "config-file", "config")
    if file is None and "--cpu" not in options:  # as Accelerate: with --cpu it does not look at its default file
        cache = environ.get("HF_HOME") or os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        default = os.path.join(os.path.expanduser(cache), "accelerate", "default_config.yaml")
        file = default if os.path.isfile(default) else None
    if file is not None and processes is None:
        values = _read_config(file)
        if values is None:
            return None
        processes = _to_count(values.get("num_processes"))
        machines = machines or _to_count(values.get("num_machines"))
    return Asked(processes or 1, machines or 1)


def _find_option(words: list[str], name: str, shortest: str) -> str | None:
    """The last value of an option, which may be abbreviated, and written with hyphens or underscores."""
    found = None
    for word, following in itertools.pairwise([*words, ""]):
        option, sign, value = word.partition("=")
        option = option.replace("_", "-")
        if option.startswith(f"--{shortest}") and f"--{name}".startswith(option):
            found = value if sign else following
    return found


def _read_config(path: str) -> dict[str, Any] | None:
    from mnist_dist.options import read_options_file

    try:
        return read_options_file(Path(path))  # JSON is YAML, too
    except UserError:  # Accelerate reads more than we do, and has read it
        return None


def _to_count(value: object) -> int | None:
    text = str(value).strip()
    return int(text) if re.fullmatch(r"\d{1,7}", text) and 0 < int(text) <= _COUNT_MAX else None


def warn_of_smaller_step(size: int, environ: Mapping[str, str], warn: Callable[[str], None]) -> threading.Thread:
    """Call `warn` if a step of `size` tasks is less than its batch job has. The controller is asked in a thread: nobody waits for it."""
    thread = threading.Thread(target=_compare_with_job, args=(size, environ.get("SLURM_JOB_ID", ""), warn), daemon=True)
    thread.start()
    return thread


def _compare_with_job(size: int, job: str, warn: Callable[[str], None]) -> None:
    try:
        command = ["scontrol", "--oneliner", "show", "job", job]
        answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_CONTROLLER_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return
    lines = [line for line in answer.stdout.decode(errors="replace").splitlines() if line.startswith(f"JobId={job} ")]
    tasks = re.search(r" NumTasks=(\d{1,7}) ", lines[0]) if lines and " BatchFlag=1 " in lines[0] else None
    if tasks and int(tasks[1]) > size:
        warn(
            f"this Slurm job has {tasks[1]} tasks, and srun started {size} of them. A batch script that was submitted from within another "
            f"job must `unset SLURM_NTASKS SLURM_NPROCS` before srun; --world_size {tasks[1]} refuses such a start"
        )
