"""The options of a run: one frozen, typed `Config`; defaults < YAML < command line; every rule is checked here.

Imports no torch, so that `--help`, `--print_config` and every mistake answer at once.
"""

import functools
import math
import os
import reprlib
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import PrivateAttr, field_validator, model_validator
from pydantic.fields import FieldInfo

from mnist_dist.errors import UserError
from mnist_dist.options import Options, Parser, make_options, option, path_argument, read_options_file, trait, write_options
from mnist_dist.source import BUILT_IN, Unknown, explaining, find_task, resolve_name
from mnist_dist.task import Task

SIZE_NAMES = ("training_samples", "test_samples")
_STEPS_MAX = 10**9
_ROWS_MAX = 900_000  # of a record: more could not be read again
# Options that matter only while another one has one of some values.
_MIRRORED = ("wandb", ("auto", "online", "offline"))
_ONLY_WITH = {
    "warmup": ("schedule", ("one_cycle", "linear")),
    "nesterov": ("optimizer", ("sgd",)),
    "wandb_project": _MIRRORED,
    "wandb_model": _MIRRORED,
    "system_metrics": _MIRRORED,
}

_option = functools.partial(option, recipe=True)
_setting = option  # says where or how to run, not what is trained: it may differ between two starts of one run


class Config(Options):
    """All options of a training run: its own, and those of its task. Immutable; `make_config` makes one of values by their names."""

    task: Task
    run_dir: str = _setting(
        "The run folder", "runs/mnist", "folder of this run; the same command in the same folder continues it", folder=True, min_length=1
    )
    log_every: int = _setting("The run folder", 50, "steps between two rows of metrics.jsonl", ge=1)
    evaluate_every: int = _setting("The run folder", 0, "steps between two evaluations; 0: at the end of every epoch", ge=0)
    checkpoint_every: int = _setting("The run folder", 500, "steps between two checkpoints; 0: none but the last", ge=0)
    checkpoint_every_s: float = _setting("The run folder", 0.0, "time between two checkpoints (seconds); 0: by steps alone", ge=0)
    keep_checkpoints: int = _setting("The run folder", 3, "number of newest checkpoints to keep", ge=1)
    report: bool = _setting("The run folder", True, "at the end, draw plots/ and write report.html")
    wandb: Literal["auto", "online", "offline", "disabled"] = _setting(
        "The run folder", "auto", "mirror on Weights & Biases; auto: online with a key and a server that answers, else offline"
    )
    wandb_project: str | None = _setting("The run folder", None, "project on Weights & Biases; none: WANDB_PROJECT, else mnist-dist")
    wandb_model: bool = _setting("The run folder", False, "at the end, send model.safetensors to Weights & Biases as an artifact")
    system_metrics: bool = _setting("The run folder", False, "send W&B's own measurements of rank zero's machine, too")
    log_with: Literal["tensorboard"] | None = _setting(
        "The run folder", None, "another of Accelerate's trackers, beside W&B; its package must be installed"
    )

    train_size: int | None = _option("The data", None, "use only the first N training samples; none: all", ge=1)
    test_size: int | None = _option("The data", None, "use only the first N test samples; none: all", ge=1)
    holdout: int = _option(
        "The data", 0, "training samples set apart, on which the run is evaluated instead of the test samples: to choose a recipe", ge=0
    )
    workers: int = _setting(
        "The data", 0, "processes that read the samples of a data set that is not kept in memory, beside each process", ge=0, le=1024
    )

    epochs: float = _option("The training", 1.5, "passes over the training samples, to the nearest step", gt=0, le=_STEPS_MAX)
    steps: int | None = _option("The training", None, "optimizer steps, instead of epochs", ge=1, le=_STEPS_MAX)
    batch_size: int = _option("The training", 64, "samples of one step, over all processes together", ge=1)
    shards: int | None = _option(
        "The training",
        None,
        "fixed parts of a batch whose gradients are added up in a fixed order: the same bits on 1 to N processes; none: summed by DDP",
        ge=1,
        le=65_536,
    )
    optimizer: Literal["muon", "sgd", "adamw"] = _option(
        "The training", "muon", "optimizer; muon: orthogonal updates, AdamW for the biases"
    )
    learning_rate: float = _option("The training", 0.003, "highest learning rate of the schedule", gt=0, le=100)
    schedule: Literal["one_cycle", "linear", "step", "constant"] = _option(
        "The training",
        "one_cycle",
        "learning rate over the steps; one_cycle: up for --warmup, then down to zero along a cosine; linear: down along a line instead; "
        "step: a tenth in the last quarter",
    )
    warmup: float = _option("The training", 0.2, "part of the steps in which one_cycle and linear rise (fraction)", ge=0, le=1)
    momentum: float = _option("The training", 0.9, "momentum of muon and sgd; first beta of adamw", ge=0, lt=1)
    nesterov: bool = _option("The training", True, "sgd: Nesterov's momentum, else the classical one")
    weight_decay: float = _option("The training", 0.01, "weight decay of the optimizer", ge=0, le=10)
    clip_norm: float | None = _option(
        "The training", None, "largest 2-norm of the gradient, to which a larger one is scaled down; none: any", gt=0
    )
    seed: int = _option("The training", 0, "seed of weights, order and random numbers", ge=0, lt=2**63)

    device: Literal["auto", "cpu", "cuda"] = _setting("The machine", "auto", "auto: CUDA where there is a GPU, else the CPU")
    precision: Literal["auto", "fp32", "bf16"] = _setting(
        "The machine", "auto", "auto: bfloat16 where the machine computes it natively, else float32"
    )
    micro_batch: int | None = _setting(
        "The machine",
        None,
        "samples that a process computes at once, where its part of a batch is too much for its memory; none: all",
        ge=1,
    )
    cuda_graph: bool = _setting("The machine", False, "one process on a GPU: record a step as a CUDA graph and replay it")
    threads: int = _setting(
        "The machine",
        0,
        "CPU threads of each process; 0: its CPUs by Slurm's --cpus-per-task, else usable cores / processes on the node",
        ge=0,
        le=4096,
    )
    world_size: int | None = _setting(
        "The machine", None, "number of processes that must take part; another number is refused; none: as launched", ge=1
    )
    timeout_s: float = _setting("The machine", 300.0, "how long a process waits for a silent one (seconds)", ge=1, le=86_400)

    _sizes: tuple[int, int] | None = PrivateAttr(None)

    @field_validator("epochs")
    @classmethod
    def _keep_whole(cls, epochs: float) -> float:
        return int(epochs) if epochs.is_integer() else epochs  # it names the folders of a sweep

    @model_validator(mode="after")
    def _check_combinations(self) -> "Config":
        with explaining(self.task.name, "in sizes"):
            self._sizes = self.task.sizes
        if self.holdout and self.test_size is not None:
            raise ValueError("test_size has no use with holdout, which evaluates on training samples: leave one of them out")
        if self.shards is not None and self.shards > self.batch_size:
            raise ValueError(f"shards is {self.shards}, more than the {self.batch_size} samples of a batch; at most that many are allowed")
        if self.shards is not None and self.cuda_graph:
            raise ValueError("cuda_graph cannot record the shards of a batch: leave one of them out")
        if self.cuda_graph and self.device == "cpu":
            raise ValueError("cuda_graph replays the steps of a GPU, and device is cpu: leave one of them out")
        if self._sizes is not None:
            self._check_sizes()
        return self

    def _check_sizes(self) -> None:
        assert self._sizes is not None
        samples = self.task.samples
        for name, most in zip(("train_size", "test_size"), self._sizes, strict=True):
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; there are {most} {samples}: at most {most} is allowed")
        count = self.training_samples
        if count < 1:
            raise ValueError(f"holdout is {self.holdout}; allowed: less than the {count + self.holdout} training {samples}")
        if self.batch_size > count:
            raise ValueError(f"batch_size is {self.batch_size}, more than the {count} training {samples}; at most that many are allowed")
        intervals = {"log_every": self.log_every, "evaluate_every": self.evaluate_every or self.steps_per_epoch}
        # A step that is due for both makes one row.
        rows = sum(self.total_steps // every for every in intervals.values()) - self.total_steps // math.lcm(*intervals.values())
        if rows > _ROWS_MAX:
            name = min(intervals, key=lambda name: intervals[name])
            meant = "" if getattr(self, name) else f", an evaluation at the end of every epoch of {self.steps_per_epoch} steps"
            raise ValueError(
                f"{name} is {getattr(self, name)}{meant}: {self.total_steps:,} steps make some {rows:,} rows, and a record has at most "
                f"{_ROWS_MAX:,}; use a higher {name}"
            )

    def with_sizes(self, sizes: tuple[int, int]) -> "Config":
        """The same config, where the data are known to hold so many samples to train on and to test on. Raises `UserError`."""
        if self.task.sizes not in (None, sizes):
            raise UserError(f"task {self.task.name} says that its sizes are {self.task.sizes}, but it has loaded {sizes} samples")
        config = self.model_copy()
        config._sizes = sizes
        try:
            config._check_sizes()
        except ValueError as error:
            raise UserError(str(error)) from None
        return config

    def with_facts(self, facts: Mapping[str, Any]) -> "Config":
        """The same config, its task with the facts of its data."""
        return self.model_copy(update={"task": self.task.with_facts(facts)})

    def replace_run_dir(self, run_dir: Path | str) -> "Config":
        """The same config in another folder."""
        return self.model_copy(update={"run_dir": str(run_dir)})

    def name_sizes(self) -> dict[str, int]:
        """How many samples the data hold to train on and to test on, as starts.jsonl notes them."""
        return dict(zip(SIZE_NAMES, self._sizes or (), strict=False))

    @property
    def has_sizes(self) -> bool:
        """Whether the number of samples is known; until then the steps of the run are not, but for a run of --steps."""
        return self._sizes is not None

    @property
    def training_samples(self) -> int:
        """Number of samples that are trained on."""
        assert self._sizes is not None, "the data are loaded first"
        return (self.train_size or self._sizes[0]) - self.holdout

    @property
    def evaluated_on(self) -> str:
        """What the samples that the run is evaluated on are called: `test` or `held-out`."""
        return "held-out" if self.holdout else "test"

    @property
    def evaluated_split(self) -> str:
        """The name of these samples in the record and in result.json: `test`, or `holdout`."""
        return "holdout" if self.holdout else "test"

    @property
    def best(self) -> str:
        """The name, in the record and in result.json, of the measure by which runs of this task are compared."""
        return f"{self.evaluated_split}/{self.task.best}"

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; the incomplete last batch of a pass is left out, the same in every world."""
        return self.training_samples // self.batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or max(1, round(self.epochs * self.steps_per_epoch))

    def is_evaluation_due(self, step: int) -> bool:
        """Whether the model is evaluated when `step` steps are done."""
        return step == self.total_steps or step % (self.evaluate_every or self.steps_per_epoch) == 0

    def check_world(self, world_size: int) -> None:
        """Raise `UserError` unless `world_size` processes can run this config."""
        if self.world_size is not None and world_size != self.world_size:
            raise UserError(
                f"world_size is {world_size}, but {self.world_size} was asked for: this program was started "
                f"{world_size} time{'s' * (world_size != 1)} as one group (torchrun --nproc-per-node {self.world_size} starts "
                f"{self.world_size} on one machine)"
            )
        if self.cuda_graph and world_size > 1:
            raise UserError(
                f"cuda_graph replays the steps of one process on a GPU, and this run is on {world_size} processes: leave it out"
            )
        if world_size > self.batch_size:
            raise UserError(
                f"batch_size is {self.batch_size}, less than the {world_size} processes: start at most {self.batch_size}, or give a larger "
                "batch"
            )
        if self.shards is not None and world_size > self.shards:
            raise UserError(
                f"shards is {self.shards}, less than the {world_size} processes: start at most {self.shards}, or give more shards"
            )

    def recipe(self) -> dict[str, Any]:
        """The options that decide what is trained: two starts of one run must agree on them. One without effect has its default."""
        idle, values, fields = self.find_idle(), self.values(), self.fields()
        own = {name: fields[name].default if name in idle else values[name] for name, field in fields.items() if trait(field, "recipe")}
        extra = self.task.values if isinstance(self.task, Unknown) else {}
        return {"task": self.task.short_name} | own | extra

    def fields(self) -> dict[str, FieldInfo]:
        """The options by their names, those of the task among them, but for the task itself."""
        return {name: field for name, field in (type(self).model_fields | type(self.task).model_fields).items() if name != "task"}

    def values(self) -> dict[str, Any]:
        """The value of each option by its name, the name of the task among them; `make_config` makes an equal config of them."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name != "task"}
        return {"task": self.task.name} | own | self.task.model_dump()

    def without_download(self) -> "Config":
        """The same config, but that nothing is fetched: one from a run folder may be somebody else's, and nobody here asked for it."""
        return self.replace(download=False) if "download" in self.fields() else self

    def replace(self, **values: Any) -> "Config":
        """The config with some options changed. Raises `UserError`."""
        config = make_config(self.values() | values, task=type(self.task)).with_facts(self.task.facts)
        return config.with_sizes(self._sizes) if self._sizes is not None and not config.has_sizes else config

    def find_idle(self) -> dict[str, str]:
        """The options that have no effect here, and for each the one that makes it so."""
        return {name: decider for name, (decider, values) in _ONLY_WITH.items() if getattr(self, decider) not in values}

    def to_yaml(self) -> str:
        """The config as YAML text that `read_options_file` reads back to an equal config."""
        return write_options(self.values())


# Those of a run that is kept and looked at: of no use to a program whose runs are its own.
RUN_FOLDER_OPTIONS = tuple(name for name, field in Config.model_fields.items() if trait(field, "group") == "The run folder")


def make_config(values: dict[str, Any], source: str = "", task: type[Task] | None = None) -> Config:
    """The config in which options have these values; of `task`, or else of the task that they name, whose code is run.

    Raises `UserError` that names every wrong option, its value and what is allowed.
    """
    task = task or find_task(values.get("task", BUILT_IN))
    own = {name: value for name, value in values.items() if name in Config.model_fields and name != "task"}
    rest = {name: value for name, value in values.items() if name not in Config.model_fields}
    if task.name != BUILT_IN:
        own = {"run_dir": f"runs/{Path(task.name).stem}"} | own
    mistakes: list[str] = []
    try:
        chosen = make_options(task, rest, source, Config.model_fields)
    except UserError as error:
        mistakes, chosen = str(error).splitlines(), task()
    try:
        config = make_options(Config, {"task": chosen, **own}, source, task.model_fields)
    except UserError as error:
        mistakes += str(error).splitlines()
    if mistakes:
        raise UserError("\n".join(mistakes))
    return config


def configure(**values: Any) -> Config:
    """`make_config` of options by their names, as a notebook has them."""
    return make_config(values)


def find_config_file(name: str) -> Path:
    """The file that `--config NAME` means: a path, or the bare name of a recipe that comes with the package."""
    path, recipes = Path(name), _recipe_folder()
    if os.path.isfile(path):  # unlike Path.is_file, False for a name that the system refuses
        return path
    # A recipe of the package also answers to configs/NAME.yaml from any folder, as the README writes it.
    recipe = recipes / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent in (Path(), Path("configs")) and os.path.isfile(recipe):
        return recipe
    names = ", ".join(sorted(file.stem for file in recipes.glob("*.yaml") if "sweep" not in read_options_file(file)))
    raise UserError(f"config is {reprlib.repr(name)}, which is not a file; recipes that come with the package: {names}")


def _recipe_folder() -> Path:
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"  # the latter in a checkout


def read_recipe(file: str | None, named: Any = None) -> dict[str, Any]:
    """The options in the file of `--config`, none without one; `named` is a task that counts more than the file's. Raises `UserError`."""
    if file is None:
        return {}
    path = find_config_file(file)
    values = read_options_file(path)
    task = find_task(values.get("task", BUILT_IN) if named is None else named)
    # The file alone need not be complete (data_dir may come from the command line), but its own keys must be right.
    if unknown := {name: value for name, value in values.items() if name not in Config.model_fields and name not in task.model_fields}:
        if {"sweep", "fixed"} & set(unknown):
            raise UserError(f"config file {path} is a sweep: python -m launch.sweep {shlex.quote(str(path))}")
        own = values.get("task", BUILT_IN)
        is_other = isinstance(own, str) and resolve_name(own) != task.name
        # The code of a task that is not the one to train is not run, so that its options are not known here.
        if is_other and (own != BUILT_IN or all(name in find_task(own).model_fields for name in unknown)):
            some = ", ".join(unknown)
            raise UserError(f"config file {path} is for the task {own}, whose options it sets ({some}); the task here is {task.name}")
        make_config(unknown, str(path), task)
    return values


def resolve_config(given: dict[str, Any], recipe: dict[str, Any] | None = None) -> Config:
    """The config that the options `given` make of those in a `recipe`. Raises `UserError`."""
    config = make_config((recipe or {}) | given)
    fields = config.fields()
    is_of_run = len(recipe or {}) > len(fields) // 2  # its config.yaml, which holds every option
    stands_beside = not is_of_run and {"epochs", "steps"} <= {*(recipe or {})} and "steps" not in given
    if config.steps is not None and ("epochs" in given or stands_beside):
        raise UserError(f"epochs has no effect with steps {config.steps}: leave it out, or use steps none")
    idle = config.find_idle()
    defaults = {name: fields[name].default for name in idle}
    for name, default in defaults.items():
        # What a recipe says may have lost its effect by the command line; what stands beside its decider cannot have been meant.
        was_meant = not is_of_run and idle[name] not in given and getattr(config, name) != default
        if name in given or was_meant:
            decider, wanted = _ONLY_WITH[name]
            raise UserError(
                f"{name} has no effect with {decider} {getattr(config, decider)}: leave it out, or use {decider} {' or '.join(wanted)}"
            )
    return config.replace(**defaults) if defaults else config


def find_given_task(arguments: Sequence[str] | None, program: str = "mnist_dist.train") -> tuple[type[Task], dict[str, Any]]:
    """The task that a command line names, itself or in the file of --config, and the options in that file. Raises `UserError`.

    Looked for first, since the task's own options are part of the command line.
    """
    parser = Parser(program, "", add_help=False)
    _add_sources(parser)
    known, _ = parser.parse_known_args(arguments)
    recipe = read_recipe(known.config, known.task)
    return find_task(recipe.get("task", BUILT_IN) if known.task is None else known.task), recipe


def add_config_options(parser: Parser, task: type[Task], own: Mapping[str, Any] | None = None, hidden: Collection[str] = ()) -> None:
    """Add --config, --task and every option of a `Config` of `task`; `own` and `hidden` as for `Parser.add_options`."""
    _add_sources(parser)
    parser.add_options(Config, own, hidden)
    parser.add_options(task, own, hidden)


def _add_sources(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE", type=path_argument, help="YAML file of options, or the name of a recipe, such as smoke")
    parser.add_argument(
        "--task", metavar="NAME", help="what is trained: mnist, a module, or a file such as path/my_task.py (default: mnist)"
    )


def parse_command_line(arguments: Sequence[str] | None = None) -> Config:
    """The config that the command line asks for. Exits 0 after --help or --print_config; raises `UserError` on a mistake."""
    task, recipe = find_given_task(arguments)
    parser = Parser(
        "mnist_dist.train",
        "Train the CNN, or a task of your own. Defaults < the file of --config < options given here.",
        usage="[--config FILE] [--task NAME] [--option value ...]",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved options as YAML and exit")
    add_config_options(parser, task)
    given = parser.parse(arguments)
    print_config = given.pop("print_config")
    config = resolve_config(take_options(given), recipe)
    if print_config:
        try:
            sys.stdout.buffer.write(config.to_yaml().encode(errors="backslashreplace"))
            sys.stdout.flush()
        except OSError as error:
            raise UserError(f"the options cannot be printed: {error.strerror}") from error
        raise SystemExit(os.EX_OK)
    return config


def take_options(given: dict[str, Any], unused: Collection[str] = (), program: str = "") -> dict[str, Any]:
    """The options of a config among those that a parser found. Raises `UserError` for those that a program has no use for."""
    for name in given:
        if name in unused:
            raise UserError(f"{name} has no use here: {program} sets it itself; leave it out")
    return {name: value for name, value in given.items() if name != "config" and (name != "task" or value is not None)}
