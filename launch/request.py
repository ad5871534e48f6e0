"""What a job asks a cluster for, as options, and the training's options as the job gets them. Imports no torch."""

import re
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from mnist_dist.config import Config
from mnist_dist.errors import UserError
from mnist_dist.options import ADVICE, Options, option
from mnist_dist.source import BUILT_IN
from mnist_dist.world import may_share_gpus

_PLACE = "The job"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}"
_LIMITS = "Time and restarts"
# What goes into a script, where it is quoted as well: what each may be, and that in words.
_WORD_ALLOWED = "1 to 100 letters, digits and _ . + -"
_NODES = (r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]{0,4000}", "names of nodes, of letters, digits and _ . , [ ] -")
_TEXTS = {
    **dict.fromkeys(("name", "account", "qos", "reservation", "gpu_type"), (_WORD, _WORD_ALLOWED)),
    "partition": (rf"{_WORD}(,{_WORD})*", f"{_WORD_ALLOWED}, or several such names with commas between them"),
    "constraint": (r"[A-Za-z0-9_(\[][A-Za-z0-9_.:&|*,()\[\]-]{0,199}", "1 to 200 letters, digits and _ . : & | * , ( ) [ ] -"),
    **dict.fromkeys(("exclude", "nodelist"), _NODES),
}
# Options of sbatch and srun that the script itself sets, or that it cannot do with; and what to use instead.
_SAME = ("nodes", "time", "partition", "account", "qos", "constraint", "exclude", "nodelist", "reservation")  # as options of this program
_OWNED = {name: f"use --{name}" for name in _SAME} | {
    name: reason
    for names, reason in (
        ("job-name", "use --name"),
        ("ntasks ntasks-per-node ntasks-per-core ntasks-per-gpu ntasks-per-socket", "use --nodes and --tasks_per_node"),
        ("cpus-per-task", "use --cpus_per_task"),
        ("gpus gpus-per-node gpus-per-socket gpus-per-task", "use --gpus_per_node"),
        ("mem", "use --memory_gb"),
        ("nodefile", "use --nodelist"),
        ("signal", "use --signal_delay_s"),
        ("requeue no-requeue", "use --max_requeues"),
        ("array", "use launch.sweep"),
        ("test-only", "use --dry_run"),
        ("output error open-mode", "the log is in RUN_DIR/slurm, where launch.jobs finds it"),
        ("export export-file", "the training needs the environment of this shell"),
        ("clusters", "set SLURM_CLUSTERS, which all of Slurm's commands heed"),
        ("wrap parsable quiet", "the script is made here, and sbatch's answer read"),
        ("kill-on-bad-exit wait", "a run that saves and asks to be requeued depends on it"),
        ("input multi-prog jobid het-group", "all processes run one program in this job"),
    )
    for name in names.split()
}


class Request(Options):
    """The options of a job. Immutable; raises `pydantic.ValidationError` on a value that is not allowed."""

    cluster: Literal["slurm", "local"] = option(_PLACE, "slurm", "local: the same job on this machine, without Slurm")
    nodes: int = option(_PLACE, 1, "nodes; local: their tasks all run here", ge=1, le=100_000)
    tasks_per_node: int | None = option(_PLACE, None, "processes on a node; none: one for each GPU, else one", ge=1, le=4096)
    gpus_per_node: int = option(_PLACE, 0, "GPUs of a node", ge=0, le=1024)
    gpu_type: str | None = option(_PLACE, None, "type of these GPUs, as sinfo --format=%G shows it, such as a100; none: any")
    cpus_per_task: int | None = option(_PLACE, None, "CPUs of a process; none: Slurm's default", ge=1, le=4096)
    # Slurm is given whole megabytes, and reads 0 as all of a node's memory.
    memory_gb: float | None = option(_PLACE, None, "memory of a node (GB); none: Slurm's default", ge=0.001, le=1_000_000)
    partition: str | None = option(_PLACE, None, "partition, or several with commas; none: Slurm's default")
    account: str | None = option(_PLACE, None, "account that pays")
    qos: str | None = option(_PLACE, None, "quality of service")
    constraint: str | None = option(_PLACE, None, "features that the nodes must have, in Slurm's notation")
    exclude: str | None = option(_PLACE, None, "nodes to leave out, in Slurm's notation, such as node[3-5],node9")
    nodelist: str | None = option(_PLACE, None, "nodes that must take part, in the same notation")
    reservation: str | None = option(_PLACE, None, "reservation of nodes")
    sbatch: str | None = option(
        _PLACE, None, "more options of sbatch, as its command line has them: '--mail-type=END --comment=\"a b\"'", command=True
    )
    srun: str | None = option(_PLACE, None, "more options of srun, such as '--cpu-bind=cores'", command=True)
    name: str = option(_PLACE, "mnist-dist", "name of the job")
    dry_run: bool = option(_PLACE, False, "print the batch script and queue nothing")

    time: int = option(_LIMITS, 60, "time limit of one start (minutes)", ge=1, le=1_000_000)
    signal_delay_s: int = option(
        _LIMITS, 120, "time before the limit at which the run saves and is requeued (seconds); Slurm may be 60 s early", ge=1
    )
    max_requeues: int = option(
        _LIMITS, 20, "restarts, of any kind, after which the run is not requeued again, so that no mistake runs for ever", ge=0, le=10_000
    )

    @field_validator(*_TEXTS)
    @classmethod
    def _check_text(cls, value: str | None, info: ValidationInfo) -> str | None:
        pattern, allowed = _TEXTS[str(info.field_name)]
        if value is not None and not re.fullmatch(pattern, value):
            raise ValueError(f"allowed: {allowed}")
        return value

    @field_validator("sbatch", "srun")
    @classmethod
    def _check_more(cls, value: str | None) -> str | None:
        split_options(value)
        return value

    @model_validator(mode="after")
    def _check_delay(self) -> "Request":
        if self.signal_delay_s >= self.time * 60:
            raise ValueError(
                f"signal_delay_s is {self.signal_delay_s}, and the time limit is {self.time} min: less than {self.time * 60} s is allowed"
            )
        return self

    @model_validator(mode="after")
    def _check_gpus(self) -> "Request":
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError("gpu_type has no effect without GPUs: add gpus_per_node, or leave it out")
        if self.tasks > self.gpus_per_node > 0 and not may_share_gpus():
            raise ValueError(
                f"tasks_per_node is {self.tasks}, and gpus_per_node {self.gpus_per_node}: at most one process for each GPU is allowed"
            )
        return self

    @model_validator(mode="after")
    def _check_effects(self) -> "Request":
        slurm_only = ["gpu_type", "cpus_per_task", "memory_gb", "partition", "account", "qos", "constraint"]
        slurm_only += ["exclude", "nodelist", "reservation", "sbatch", "srun", "dry_run"]
        given = [name for name in slurm_only if getattr(self, name)]
        if self.cluster == "local" and given:
            raise ValueError(f"{given[0]} has no effect with cluster local, which has no Slurm: leave it out")
        return self

    @property
    def tasks(self) -> int:
        """Processes on one node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def gpus(self) -> str:
        """The GPUs of one node, as Slurm has them: a number, or a type and a number; empty for none."""
        return ":".join(filter(None, (self.gpu_type, str(self.gpus_per_node or ""))))

    @property
    def memory(self) -> str | None:
        """The memory of one node, as Slurm has it; None where it is not asked for."""
        return None if self.memory_gb is None else f"{round(self.memory_gb * 1024)}M"

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.tasks

    @property
    def all_gpus(self) -> int:
        """GPUs of the whole job."""
        return self.nodes * self.gpus_per_node

    def describe_size(self) -> str:
        """Its processes and nodes, in words."""
        processes = f"{self.world_size} process{'es' * (self.world_size > 1)}"
        return processes if self.cluster == "local" else f"{processes} on {self.nodes} node{'s' * (self.nodes > 1)}"


# A name of sbatch on a command line, or an option of the job where those of the training stand, or the other way round.
ADVICE |= {name: reason if reason.startswith("use --") else f"the script of the job sets it: {reason}" for name, reason in _OWNED.items()}
ADVICE |= {name: f"it is one of the training, --{name} or in the file of --config" for name in Config.model_fields}
ADVICE |= {name: f"it is one of the job, --{name} or in the file of --job" for name in Request.model_fields}


def list_words(request: Request) -> list[str]:
    """The command line that makes a request."""
    return [f"--{name}={_write(value)}" for name, value in note_request(request).items()]


def note_request(request: Request) -> dict[str, Any]:
    """What a request asks for beside the defaults, for the note of its job."""
    return request.model_dump(exclude_defaults=True, exclude={"dry_run"})


def split_options(text: str | None) -> dict[str, str | None]:
    """The options of sbatch or srun in `text`, each with its value, None without one. Raises ValueError for one that is not allowed."""
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise ValueError(f"its quotes do not match ({error})") from error
    options: dict[str, str | None] = {}
    name = None
    for word in words:
        if not word.startswith("-"):
            if name is None or options[name] is not None:
                raise ValueError(f"{word[:80]!r} is no option; expected words such as --mail-type=END")
            options[name] = word
            continue
        name, sign, value = word[2:].partition("=")
        if not re.fullmatch(r"--[a-z][a-z0-9-]{1,60}", f"{word[:2]}{name}"):
            raise ValueError(f"{word[:80]!r} is not a long option, such as --mail-type=END")
        owned = name if name in _OWNED else next((own for own in _OWNED if own.startswith(name)), None)  # Slurm takes abbreviations
        if owned is not None:
            raise ValueError(f"--{owned} is set by the script: {_OWNED[owned]}")
        if name in options:
            raise ValueError(f"--{name} stands there twice")
        options[name] = value if sign else None
    for name, given in options.items():
        if given is not None and not re.fullmatch(r"[^\\]{1,1000}", given):  # sbatch drops a backslash
            raise ValueError(f"the value of --{name} must have 1 to 1000 characters and no backslash")
        if ("gres".startswith(name) or name.startswith("tres-per-")) and re.search(r"\bgpu\b", given or ""):
            raise ValueError(f"--{name}={given} asks for GPUs: use --gpus_per_node")
    return options


def place_config(config: Config, request: Request) -> Config:
    """`config` as the job runs it: in absolute folders, and refusing another number of processes. Raises `UserError`."""
    if config.world_size not in (None, request.world_size):
        raise UserError(
            f"world_size is {config.world_size}, and --nodes {request.nodes} --tasks_per_node {request.tasks} start {request.world_size} "
            "processes: leave it out, or change these"
        )
    config.check_world(request.world_size)
    data_dir = config.task.data_dir and str(Path(config.task.data_dir).absolute())
    placed = {"data_dir": data_dir, "world_size": request.world_size, "run_dir": str(place_folder(Path(config.run_dir)))}
    return config.replace(**placed)


def place_folder(folder: Path) -> Path:
    """The absolute path of a run's folder. Raises `UserError` for one that Slurm would read otherwise: it has no quoting for these."""
    path = folder.absolute()
    if not re.fullmatch(r"[\w ./=,+@:~-]+", str(path)):
        raise UserError(f"run_dir is {str(path)!r}; in a submitted job letters, digits, spaces and . / = , + @ : ~ _ - are allowed")
    return path


def list_arguments(config: Config) -> tuple[str, ...]:
    """The command line that makes `config`, whatever the file of --config says when the job starts."""
    values, fields, idle = config.values(), config.fields(), config.find_idle()
    task = () if config.task.name == BUILT_IN else (f"--task={config.task.name}",)
    return task + tuple(f"--{name}={_write(values[name])}" for name in fields if values[name] != fields[name].default and name not in idle)


def _write(value: object) -> str:
    return "none" if value is None else str(value)
