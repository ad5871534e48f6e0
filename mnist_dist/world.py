"""Which process of the run is this one: read from the variables of its launcher, without importing torch.

Ranks come from torchrun and `accelerate launch` (RANK and its companions), from srun (SLURM_*), from submitit's local executor, or there is
one process. What could make two processes train alone, each believing that it is the whole world, is refused here.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.errors import UserError

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """This process's place among those of the run, as its launcher gave it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "python"
    address: str = "127.0.0.1"
    port: int = 0
    cpus: int = 0  # that the launcher gave to this process alone; 0: it does not say

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise UserError(
                f"{self.launcher} says this is rank {self.rank} of {self.size} and local rank {self.local_rank} of {self.local_size}; "
                "a rank must be below its count: check how the processes are started"
            )
        if self.size > 1 and not 1 <= self.port < 65_536:
            raise UserError(f"the port at which the processes meet is {self.port}; allowed: 1 to 65535 (see MASTER_PORT)")

    def variables(self) -> dict[str, str]:
        """The environment variables by which torch and Accelerate find this world."""
        values = (self.rank, self.size, self.local_rank, self.local_size, self.address, self.port)
        return dict(zip(TORCH_VARIABLES, map(str, values), strict=True))


def find_world(environ: Mapping[str, str]) -> World:
    """Read this process's place from its launcher's variables. Raises `UserError` for a half-set or contradictory environment."""
    if environ.get("RANK") or environ.get("WORLD_SIZE"):
        missing = [name for name in TORCH_VARIABLES if not environ.get(name)]
        if missing:
            given = [name for name in TORCH_VARIABLES if environ.get(name)]
            raise UserError(
                f"the environment has {', '.join(given)} but not {', '.join(missing)}: "
                "start with torchrun, accelerate launch or srun, or unset these variables"
            )
        rank, size, local_rank, local_size, port = (
            _read_int(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        )
        return World(rank, size, local_rank, local_size, "torchrun", environ["MASTER_ADDR"], port)
    if environ.get("SLURM_STEP_NUM_TASKS") and environ.get("SLURM_STEP_NODELIST"):
        return _find_srun_world(environ)
    if environ.get("SUBMITIT_LOCAL_GLOBALID"):
        rank, size, local_rank = (_read_int(environ, f"SUBMITIT_LOCAL_{name}") for name in ("GLOBALID", "NTASKS", "LOCALID"))
        return World(rank, size, local_rank, size, "submitit", port=_choose_port(environ.get("SUBMITIT_LOCAL_JOB_ID", "")))
    for name in _MPI_SIZES:
        if environ.get(name, "1") != "1":
            raise UserError(f"{name} is {environ[name]}: starting with mpirun is not supported; use torchrun, accelerate launch or srun")
    if environ.get("SLURM_JOB_ID") and _read_int(environ, "SLURM_NTASKS", 1) > 1:
        raise UserError(
            f"this Slurm job has {environ['SLURM_NTASKS']} tasks, but this process is not one of them: "
            "start it with srun (slurm/train.sh does), which starts one process for each task"
        )
    asked = _find_asked_processes()
    if asked > 1:
        raise UserError(
            f"accelerate launch was asked for {asked} processes but started one, as it does without GPUs: "
            f"use torchrun --nproc-per-node {asked} -m mnist_dist.train"
        )
    return World()


def _find_srun_world(environ: Mapping[str, str]) -> World:
    rank, size, local_rank = (_read_int(environ, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    node = _read_int(environ, "SLURM_NODEID", 0)
    local_size = _read_tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), node, size)
    one_node = local_size == size
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if one_node else first_host(environ["SLURM_STEP_NODELIST"]))
    if environ.get("MASTER_PORT"):
        port = _read_int(environ, "MASTER_PORT")
    else:
        port = _choose_port(f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}")
    return World(rank, size, local_rank, local_size, "srun", address, port, _read_int(environ, "SLURM_CPUS_PER_TASK", 0))


def _read_int(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"\d{1,9}", text):
        raise UserError(f"the environment variable {name} is {text!r}; expected a whole number")
    return int(text)


def _read_tasks_per_node(text: str, node: int, size: int) -> int:
    """The entry for `node` in Slurm's list such as `2(x3),1`."""
    counts: list[int] = []
    for entry in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", entry)
        if match is None:
            raise UserError(f"the environment variable SLURM_STEP_TASKS_PER_NODE is {text!r}; expected a list such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else size


def first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list: `gpu[03-05,9],cpu1` begins with gpu03."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _choose_port(job: str) -> int:
    # From the job, so that all ranks agree and two jobs on a node differ; below 32768, where the ports of outgoing connections begin.
    numbers = [int(part) for part in re.findall(r"\d+", job)]
    return 15_000 + (numbers[0] if numbers else 0) * 7 % 15_000 + (numbers[1] if len(numbers) > 1 else 0) % 7


def _find_asked_processes() -> int:
    """The `--num_processes` of a parent `accelerate launch`; 1 where there is none. It leaves no other trace (Linux only)."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().replace("=", "\0").split("\0")
        launches = re.search(r"(^|[/\0])accelerate([-.]|/commands/|\0)(commands\.)?launch(\.py)?\0", "\0".join(words[:4]) + "\0")
        for option, value in itertools.pairwise(words):
            if launches and option in ("--num_processes", "--num-processes") and value.isdigit():
                return int(value)
    return 1
