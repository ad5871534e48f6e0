"""Which process of the run is this one: read from the variables of its launcher, without importing torch.

Ranks come from torchrun and `accelerate launch` (RANK and its companions), from mpirun, from srun (SLURM_*), from submitit's local
executor, or there is one process. A world that is smaller than any of these was asked for is refused here: it would train, and be wrong.
"""

import contextlib
import os
import platform
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.asked import count_asked, list_ancestors, read_command
from mnist_dist.errors import UserError
from mnist_dist.files import read_file

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SHARED_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL's own variable: it refuses a GPU that two ranks share unless this is 1
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
TORCH_VARIABLES = (*RANK_VARIABLES, *_MEETING)
# Of each kind of MPI: rank, size, and both on this host.
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),  # MVAPICH
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
)
MPI_VARIABLES = tuple(name for names in _MPI_VARIABLES for name in names)
_LAUNCHERS = ("SUBMITIT_", "ACCELERATE_", "TORCHELASTIC_")
_OF_A_JOB = ("SLURM_", "SRUN_CPUS_PER_TASK")
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")  # and of no job
_INTERACTIVE_STEP = "4294967290"  # the number of the step in which LaunchParameters=use_interactive_step runs salloc's shell
_HOST_FILE_BYTES_MAX = 1 << 20


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
    gpus: int = 0  # that it gave to this node, or to this process; 0: none, or it does not say
    unchosen: tuple[str, ...] = ()  # of MASTER_ADDR and MASTER_PORT, what nobody chose: it follows from the job

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise UserError(
                f"{self.launcher} says this is rank {self.rank} of {self.size} and local rank {self.local_rank} of {self.local_size}; "
                "a rank must be below its count: check how the processes are started"
            )
        if self.size > 1 or self.port:
            _check_port(self.port)

    def variables(self) -> dict[str, str]:
        """The environment variables by which torch and Accelerate find this world."""
        values = (self.rank, self.size, self.local_rank, self.local_size, self.address, self.port)
        return dict(zip(TORCH_VARIABLES, map(str, values), strict=True))


def list_inherited(environ: Mapping[str, str]) -> list[str]:
    """The variables that an outer job or launcher left, and that would mislead one which is started now.

    Outside of a job what is for Slurm is the user's own choice, such as SLURM_CPU_BIND. So are MASTER_ADDR and MASTER_PORT without
    the ranks of a launcher beside them.
    """
    misleading = _LAUNCHERS + (_OF_A_JOB if environ.get("SLURM_JOB_ID") else ())
    exact = {*RANK_VARIABLES, *MPI_VARIABLES, *(_MEETING if any(map(environ.get, RANK_VARIABLES)) else ())}
    return [name for name in environ if name in exact or (name.startswith(misleading) and name not in _OF_THE_SITE)]


def ignore_job(environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment of a program that one process may run alone, whatever the size of the Slurm job in whose shell it is started."""
    return environ if _is_in_step(environ) else {name: value for name, value in environ.items() if name != "SLURM_JOB_ID"}


def find_world(environ: Mapping[str, str]) -> World:
    """Read this process's place from its launcher's variables.

    Raises `UserError` for a half-set or contradictory environment, and for a world smaller than what any launcher was asked for.
    """
    world = read_world(environ)
    asked = count_asked(environ)
    if asked.machines > 1 and world.size < asked.processes:
        raise UserError(
            f"accelerate launch was asked for {asked.processes} processes on {asked.machines} machines but started one here, as it does "
            "without GPUs: use torchrun or srun"
        )
    if asked.processes > world.size:
        raise UserError(
            f"accelerate launch was asked for {asked.processes} processes but started {'one' if world.size == 1 else world.size}: "
            f"use torchrun --nproc-per-node {asked.processes}"
        )
    if not asked.processes and world.size == 1:
        raise UserError(
            "accelerate launch was asked for several processes but started one, and how many cannot be read from its command line or its "
            "config file: use torchrun --nproc-per-node N"
        )
    return world


def read_world(environ: Mapping[str, str]) -> World:
    """The world as `find_world` reads it, whatever `accelerate launch` was asked for. Raises `UserError` as that does."""
    has_rank = environ.get("RANK") or environ.get("WORLD_SIZE")
    world = _read_torch_world(environ) if has_rank else _read_mpi_world(environ)
    if world is None and environ.get("SUBMITIT_LOCAL_GLOBALID"):
        rank, size, local_rank = (_read_int(environ, f"SUBMITIT_LOCAL_{name}") for name in ("GLOBALID", "NTASKS", "LOCALID"))
        port = _choose_port(environ.get("SUBMITIT_LOCAL_JOB_ID", ""))
        return World(rank, size, local_rank, size, "submitit", port=port, unchosen=_MEETING)
    in_step = _is_in_step(environ)
    if world is None and in_step:
        world = _read_srun_world(environ)
        _check_whole(world, _count_job(environ), "this Slurm job", "start it with srun, without --preserve-env and --interactive")
    elif world is None:
        if environ.get("LOCAL_RANK", "") not in ("", "-1"):
            return _read_torch_world(environ)  # which says what is missing
        world = World()
        _check_whole(world, _count_job(environ), "this Slurm job", "start it with srun (slurm/train.sh does)")
    elif in_step:
        tasks = _read_int(environ, "SLURM_STEP_NUM_TASKS")
        _check_whole(
            world, tasks, "this Slurm job step", f"unset what {world.launcher} left in the environment, or start the program alone"
        )
    for _, name, *_ in _MPI_VARIABLES:
        if environ.get(name) and world.launcher != "mpirun":
            _check_whole(world, _read_int(environ, name), f"mpirun ({name})", "unset what others left in the environment, and start")
    return world


def _check_whole(world: World, asked: int, by: str, remedy: str) -> None:
    """Raise `UserError` where `asked` processes were asked for, and there are fewer."""
    if world.size < asked:
        who = "this process is not one of them" if world.launcher == "python" else f"{world.launcher} says that there are {world.size}"
        raise UserError(f"{by} has {asked} tasks, but {who}: {remedy}, one process for each task")


def _read_torch_world(environ: Mapping[str, str]) -> World:
    missing = [name for name in TORCH_VARIABLES if not environ.get(name)]
    if missing:
        given = [name for name in TORCH_VARIABLES if environ.get(name)]
        raise UserError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}: "
            "start with torchrun, accelerate launch, mpirun or srun, or unset these variables"
        )
    rank, size, local_rank, local_size, port = (_read_int(environ, name) for name in (*RANK_VARIABLES, "MASTER_PORT"))
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in environ else "torchrun"
    return World(rank, size, local_rank, local_size, launcher, environ["MASTER_ADDR"], port)


def _read_mpi_world(environ: Mapping[str, str]) -> World | None:
    for names in _MPI_VARIABLES:
        if not environ.get(names[1]):
            continue
        if names[0] == "PMI_RANK" and _is_in_step(environ) and not environ.get("MPI_LOCALRANKID"):
            return None  # srun speaks PMI itself (--mpi=pmi2)
        rank, size, local_rank, local_size = (_read_int(environ, name) for name in names)
        if size == 1:
            return World(launcher="mpirun")
        address, port, unchosen = _read_meeting(environ)
        job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", "")
        if local_size != size:
            missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port or job)) if not value]
            if missing:
                raise UserError(
                    f"mpirun starts {size} processes on several hosts, and {' and '.join(missing)} must say where they meet: "
                    "give all of them the name of rank zero's host (Open MPI: mpirun -x MASTER_ADDR; MPICH: mpirun -genv MASTER_ADDR HOST)"
                )
        if not port:
            port = _choose_port(str(zlib.crc32(job.encode())) if job else str(_find_mpi_proxy()))
        return World(rank, size, local_rank, local_size, "mpirun", address or "127.0.0.1", port, unchosen=unchosen)
    return None


def _find_mpi_proxy() -> int:
    """The process of MPI that all ranks of this host descend from: the parent, but for what a script puts between."""
    for pid in list_ancestors():
        if re.search("hydra|pmi|mpi|orted|prte", Path((read_command(pid) or [""])[0]).name):
            return pid
    return os.getppid()


def _read_meeting(environ: Mapping[str, str]) -> tuple[str, int, tuple[str, ...]]:
    """MASTER_ADDR and MASTER_PORT, and the names of those that nobody chose, which are empty and 0.

    `accelerate launch` sets both where nobody does, to values that suit one run at a time.
    """
    address, port = environ.get("MASTER_ADDR", ""), _read_int(environ, "MASTER_PORT", 0)
    if environ.get("MASTER_PORT"):
        _check_port(port)
    if "ACCELERATE_MIXED_PRECISION" in environ and (address, port) == ("127.0.0.1", 29_500):
        address, port = "", 0
    return address, port, tuple(name for name, value in zip(_MEETING, (address, port), strict=True) if not value)


def _check_port(port: int) -> None:
    if not 1 <= port < 65_536:
        raise UserError(f"the port at which the processes meet is {port}; allowed: 1 to 65535 (see MASTER_PORT)")


def _is_in_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID")
    return bool(environ.get("SLURM_STEP_NUM_TASKS") and environ.get("SLURM_STEP_NODELIST")) and step != _INTERACTIVE_STEP


def _count_job(environ: Mapping[str, str]) -> int:
    # At least one task for each node. In a step both are the step's own, but for what srun --preserve-env, or a batch script that was
    # submitted from within a job, has inherited.
    if not environ.get("SLURM_JOB_ID"):
        return 1
    return max(_read_int(environ, name, 1) for name in ("SLURM_NTASKS", "SLURM_NNODES"))


def _read_srun_world(environ: Mapping[str, str]) -> World:
    rank, size, local_rank = (_read_int(environ, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    if _read_int(environ, "SLURM_HET_SIZE", 1) > 1:
        # Its variables do not say where rank zero is, nor how many tasks a node has; and srun alone runs the first component only.
        raise UserError(
            f"this Slurm job is heterogeneous (SLURM_HET_SIZE is {environ['SLURM_HET_SIZE']}): submit one of a single component"
        )
    if size > 1 and _is_typed_in_task(environ):
        raise UserError(
            f"this is a shell of task {rank} of {size} (srun --pty), and the other tasks do not train: start the program with srun"
        )
    node = _read_int(environ, "SLURM_NODEID", 0)
    local_size = _read_tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), node, size)
    address, port, unchosen = _read_meeting(environ)
    if not address:
        address = "127.0.0.1" if local_size == size else _find_host_of_rank_zero(environ, rank, node)
    if not port:
        port = _choose_port(f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}")
    cpus, gpus = (_read_int(environ, f"SLURM_{name}", 0) for name in ("CPUS_PER_TASK", "GPUS_ON_NODE"))
    return World(rank, size, local_rank, local_size, "srun", address, port, cpus, gpus, unchosen)


def _is_typed_in_task(environ: Mapping[str, str]) -> bool:
    """Whether the task of this step is a shell that somebody types into."""
    task = environ.get("SLURM_TASK_PID", "")
    if not environ.get("SLURM_PTY_PORT") or not task.isdigit() or int(task) == os.getpid():
        return False
    name, *options = read_command(int(task)) or [""]
    return name.endswith("sh") and all(re.fullmatch("-[il]+|--login|--norc", option) for option in options)


def count_usable_cores() -> int:
    """CPU cores that this process may use: its affinity, cut by the control group's quota."""
    cores = len(list_cores())
    return min(cores, read_quota() or cores)


def list_cores() -> list[int]:
    """The numbers of the CPU cores that this process may use by its affinity; of all where the system knows none, as macOS."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def read_quota() -> int | None:
    """CPU cores that the control group's quota allows to all of its processes together; None where there is no quota."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))  # "max" is no number: no quota
    return None


def choose_threads(world: World) -> int:
    """How many threads a process has."""
    cores = count_usable_cores()
    # Slurm may bind each task to CPUs of its own or let those of a node share theirs: what it says of a task holds in both cases.
    return max(1, min(cores, world.cpus) if world.cpus else cores // world.local_size)


def may_share_gpus() -> bool:
    """Whether NCCL was told that several ranks may have the same GPU."""
    return os.environ.get(SHARED_GPUS) == "1"


def find_host() -> str:
    """The name of this host: Slurm's own where there is one, since --exclude and --nodelist take that."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _find_host_of_rank_zero(environ: Mapping[str, str], rank: int, node: int) -> str:
    host = first_host(environ["SLURM_STEP_NODELIST"])
    if environ.get("SLURM_DISTRIBUTION") == "arbitrary":
        # Slurm's list of nodes is sorted; the order of the tasks is that of the user's file.
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = read_file(environ.get("SLURM_HOSTFILE", ""), _HOST_FILE_BYTES_MAX).decode().splitlines()
            host = next((first_host(line.strip()).partition("*")[0] for line in lines if re.match(r"\s*[^\s#]", line)), "")
            if host and (rank or host == environ.get("SLURMD_NODENAME", host)):
                return host
    elif rank or not node:
        return host
    place = environ.get("SLURMD_NODENAME", "here")
    raise UserError(
        f"srun was told where each task runs, and rank zero's place is not known to all (rank {rank} is on {place}): set MASTER_ADDR"
    )


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
