"""The options of a run: one frozen, typed `Config`; defaults < YAML < command line; every rule is checked here.

Imports no torch, so that `--help`, `--print_config` and every mistake answer at once.
"""

import functools
import os
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import model_validator

from mnist_dist.errors import UserError
from mnist_dist.options import Options, Parser, make_options, option, path_argument, read_options_file

# (training, test) images of each data set. All have 28 x 28 grey pixels.
DATASET_SIZES = {
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "kmnist": (60_000, 10_000),
    "qmnist": (60_000, 60_000),
    "synthetic": (4_096, 1_024),
}
EMBEDDED_DATASETS = ("mnist", "synthetic")
CLASSES = 10
DIGITS = tuple(str(digit) for digit in range(CLASSES))
_CLASS_NAMES = {
    "fashion_mnist": ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}

_STEPS_MAX = 10**9
# Options that matter only while another one has one of some values.
_MIRRORED = ("wandb", ("auto", "online", "offline"))
_ONLY_WITH = {
    "warmup": ("schedule", ("one_cycle",)),
    "nesterov": ("optimizer", ("sgd",)),
    "wandb_project": _MIRRORED,
    "wandb_model": _MIRRORED,
    "system_metrics": _MIRRORED,
}

_option = functools.partial(option, recipe=True)
_setting = option  # says where or how to run, not what is trained: it may differ between two starts of one run


class Config(Options):
    """All options of a training run. Immutable; raises `pydantic.ValidationError` on a value that is not allowed."""

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
    wandb_project: str | None = _setting("The run folder", None, "project there; none: WANDB_PROJECT, else mnist-dist")
    wandb_model: bool = _setting("The run folder", False, "at the end, send model.safetensors there as an artifact")
    system_metrics: bool = _setting("The run folder", False, "send W&B's own measurements of rank zero's machine, too")
    log_with: Literal["tensorboard"] | None = _setting(
        "The run folder", None, "another of Accelerate's trackers, beside W&B; its package must be installed"
    )

    dataset: Literal["mnist", "fashion_mnist", "kmnist", "qmnist", "synthetic"] = _option(
        "The data", "mnist", "mnist and synthetic come with the package, the others from --data_dir"
    )
    data_dir: str | None = _setting("The data", None, "folder with the files of a data set that is not embedded", folder=True)
    download: bool = _setting("The data", False, "fetch missing files into --data_dir")
    train_size: int | None = _option("The data", None, "use only the first N training images; none: all", ge=1)
    test_size: int | None = _option("The data", None, "use only the first N test images; none: all", ge=1)
    holdout: int = _option(
        "The data", 0, "training images set apart, on which the run is evaluated instead of the test images: to choose a recipe", ge=0
    )

    epochs: int = _option("The training", 3, "passes over the training images", ge=1, le=_STEPS_MAX)
    steps: int | None = _option("The training", None, "optimizer steps; overrides epochs", ge=1, le=_STEPS_MAX)
    batch_size: int = _option("The training", 64, "images of one step, over all processes together", ge=1)
    optimizer: Literal["muon", "sgd", "adamw"] = _option(
        "The training", "muon", "optimizer; muon: orthogonal updates, AdamW for the biases"
    )
    learning_rate: float = _option("The training", 0.003, "highest learning rate of the schedule", gt=0, le=100)
    schedule: Literal["one_cycle", "step", "constant"] = _option(
        "The training",
        "one_cycle",
        "learning rate over the steps; one_cycle: up for --warmup, then down to zero along a cosine; step: a tenth in the last quarter",
    )
    warmup: float = _option("The training", 0.2, "part of the steps in which one_cycle rises (fraction)", ge=0, le=1)
    momentum: float = _option("The training", 0.95, "momentum of muon and sgd; first beta of adamw", ge=0, lt=1)
    nesterov: bool = _option("The training", True, "sgd: Nesterov's momentum, else the classical one")
    weight_decay: float = _option("The training", 0.01, "weight decay of the optimizer", ge=0, le=10)
    label_smoothing: float = _option("The training", 0.1, "label smoothing of the training loss (fraction)", ge=0, lt=1)
    seed: int = _option("The training", 0, "seed of weights, order and augmentation", ge=0, lt=2**63)

    rotation: float = _option("The augmentation", 8.0, "largest random rotation (degrees)", ge=0, le=180)
    shear: float = _option("The augmentation", 8.0, "largest random shear (degrees)", ge=0, le=60)
    scale: float = _option("The augmentation", 0.08, "largest random change of size (fraction)", ge=0, le=0.9)
    shift: float = _option("The augmentation", 2.0, "largest random shift along each axis (pixels)", ge=0, le=28)

    device: Literal["auto", "cpu", "cuda"] = _setting("The machine", "auto", "auto: CUDA where there is a GPU, else the CPU")
    precision: Literal["auto", "fp32", "bf16"] = _setting(
        "The machine", "auto", "auto: bfloat16 where the machine computes it natively, else float32"
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

    @model_validator(mode="after")
    def _check_combinations(self) -> "Config":
        embedded = self.dataset in EMBEDDED_DATASETS
        if embedded and (self.data_dir is not None or self.download):
            raise ValueError(f"data_dir and download have no use with dataset {self.dataset}, which comes with the package: leave them out")
        if not embedded and self.data_dir is None:
            raise ValueError(f"dataset {self.dataset} needs data_dir: the folder with its files (add --download to fetch them)")
        for name, most in zip(("train_size", "test_size"), DATASET_SIZES[self.dataset], strict=True):
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; dataset {self.dataset} has {most} images: at most {most} is allowed")
        if self.holdout and self.test_size is not None:
            raise ValueError("test_size has no use with holdout, which evaluates on training images: leave one of them out")
        if self.training_images < 1:
            raise ValueError(f"holdout is {self.holdout}; allowed: less than the {self.training_images + self.holdout} training images")
        if self.batch_size > self.training_images:
            raise ValueError(
                f"batch_size is {self.batch_size}, more than the {self.training_images} training images; at most that many are allowed"
            )
        return self

    @property
    def training_images(self) -> int:
        """Number of images that are trained on."""
        return (self.train_size or DATASET_SIZES[self.dataset][0]) - self.holdout

    @property
    def evaluated_on(self) -> str:
        """What the images that the run is evaluated on are called: `test` or `held-out`."""
        return "held-out" if self.holdout else "test"

    @property
    def evaluated_split(self) -> str:
        """The name of these images in the record and in result.json: `test`, or `holdout`."""
        return "holdout" if self.holdout else "test"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the ten classes of the data set."""
        return _CLASS_NAMES.get(self.dataset, DIGITS)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; the incomplete last batch of a pass is left out, the same in every world."""
        return self.training_images // self.batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or self.epochs * self.steps_per_epoch

    def is_evaluation_due(self, step: int) -> bool:
        """Whether the model is evaluated when `step` steps are done."""
        return step == self.total_steps or step % (self.evaluate_every or self.steps_per_epoch) == 0

    def check_world(self, world_size: int) -> None:
        """Raise `UserError` unless `world_size` processes can run this config."""
        if self.world_size is not None and world_size != self.world_size:
            raise UserError(
                f"world_size is {world_size}, but {self.world_size} was asked for: this program was started "
                f"{world_size} time(s) as one group (torchrun --nproc-per-node {self.world_size} starts {self.world_size} on one machine)"
            )
        if self.batch_size % world_size:
            below = self.batch_size - self.batch_size % world_size
            near = " or ".join(str(size) for size in (below, below + world_size) if size)
            raise UserError(
                f"batch_size is {self.batch_size}, which {world_size} processes cannot share equally; "
                f"allowed: multiples of {world_size}, such as {near}"
            )

    def recipe(self) -> dict[str, Any]:
        """The options that decide what is trained: two starts of one run must agree on them. One without effect has its default."""
        idle = self.find_idle()
        return {
            name: field.default if name in idle else getattr(self, name)
            for name, field in type(self).model_fields.items()
            if field.json_schema_extra["recipe"]  # type: ignore[index]
        }

    @classmethod
    def allowed(cls, name: str) -> tuple[Any, ...]:
        """What an option that takes some words, or none, may be."""
        words = [value for part in get_args(cls.model_fields[name].annotation) for value in get_args(part)]
        return (None, *words)

    def find_idle(self) -> dict[str, str]:
        """The options that have no effect here, and for each the one that makes it so."""
        return {name: decider for name, (decider, values) in _ONLY_WITH.items() if getattr(self, decider) not in values}

    def to_yaml(self) -> str:
        """The config as YAML text that `read_options_file` reads back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def make_config(values: dict[str, Any], source: str = "") -> Config:
    """Validate `values`. Raises `UserError` that names every wrong option, its value and what is allowed."""
    return make_options(Config, values, source)


def find_config_file(name: str) -> Path:
    """The file that `--config NAME` means: a path, or the bare name of a recipe that comes with the package."""
    path, recipes = Path(name), _recipe_folder()
    if os.path.isfile(path):  # unlike Path.is_file, False for a name that the system refuses
        return path
    # A recipe of the package also answers to configs/NAME.yaml from any folder, as the README writes it.
    recipe = recipes / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent in (Path(), Path("configs")) and os.path.isfile(recipe):
        return recipe
    names = ", ".join(sorted(file.stem for file in recipes.glob("*.yaml") if file.stem != "sweep"))  # that one is for launch.sweep
    raise UserError(f"config is {reprlib.repr(name)}, which is not a file; recipes that come with the package: {names}")


def _recipe_folder() -> Path:
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"  # the latter in a checkout


def read_recipe(file: str | None) -> dict[str, Any]:
    """The options in the file of `--config`; none without one. Raises `UserError`."""
    if file is None:
        return {}
    path = find_config_file(file)
    values = read_options_file(path)
    # The file alone need not be complete (data_dir may come from the command line), but its own keys and values must be right.
    unknown_keys = [key for key in values if key not in Config.model_fields]
    if unknown_keys:
        make_config({key: values[key] for key in unknown_keys}, str(path))
    return values


def resolve_config(given: dict[str, Any], recipe: dict[str, Any] | None = None) -> Config:
    """The config that the options `given` make of those in a `recipe`. Raises `UserError`."""
    config = make_config((recipe or {}) | given)
    if len(recipe or {}) > len(Config.model_fields) // 2:  # the config.yaml of a run, which holds every option
        given = dict(given) | {decider: None for decider, _ in _ONLY_WITH.values()}
    idle = config.find_idle()
    defaults = {name: type(config).model_fields[name].default for name in idle}
    for name, default in defaults.items():
        # What a recipe says may have lost its effect by the command line; what stands beside its decider cannot have been meant.
        if name in given or (idle[name] not in given and getattr(config, name) != default):
            decider, wanted = _ONLY_WITH[name]
            raise UserError(
                f"{name} has no effect with {decider} {getattr(config, decider)}: leave it out, or use {decider} {' or '.join(wanted)}"
            )
    return config.model_copy(update=defaults)


def add_config_options(parser: Parser) -> None:
    """Add --config and every option of a `Config`."""
    parser.add_argument("--config", metavar="FILE", type=path_argument, help="YAML file of options, or the name of a recipe, such as smoke")
    parser.add_options(Config)


def parse_command_line(arguments: Sequence[str] | None = None) -> Config:
    """The config that the command line asks for. Exits 0 after --help or --print_config; raises `UserError` on a mistake."""
    parser = Parser(
        "mnist_dist.train",
        "Train the CNN. Defaults < the file of --config < options given here.",
        usage="[--config FILE] [--option value ...]",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved options as YAML and exit")
    add_config_options(parser)
    given = parser.parse(arguments)
    file, print_config = given.pop("config"), given.pop("print_config")
    config = resolve_config(given, read_recipe(file))
    if print_config:
        try:
            sys.stdout.buffer.write(config.to_yaml().encode(errors="backslashreplace"))
            sys.stdout.flush()
        except OSError as error:
            raise UserError(f"the options cannot be printed: {error.strerror}") from error
        raise SystemExit(os.EX_OK)
    return config
