"""The file that `python -m mnist_dist.verify --record` writes where one trusts the machine: what any right machine computes, too.

It holds no code and names none to run: the command line names the task, and the file says of which task and options its numbers are.
Imports no torch.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mnist_dist.config import Config
from mnist_dist.errors import UserError
from mnist_dist.files import describe_error, read_file, write_atomically
from mnist_dist.record import check_same, check_same_recipe
from mnist_dist.source import BUILT_IN, find_changed, is_built_in

BATCHES = 9  # whose gradients every rank computes
SKETCH = 61  # numbers that stand for a vector; a prime, so that no row of a tensor always falls on the same one
SAMPLES_MAX = 1_000_000  # losses of single samples in a file
BATCH_OF_MANY = 1024  # for which a second file comes with mnist: for worlds in which a batch of 64 would leave processes without a sample
_BYTES_MAX = 64 << 20
_MEAN_TOLERANCE = 1e-5

Sketch = list[float]
_Text = Annotated[str, Field(max_length=4096)]
_Integer = Annotated[int, Field(gt=-(2**63), lt=2**64)]


class Reference(BaseModel):
    """What was recorded: of which task, options and data, where, and the numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    version: Literal[1] = 1
    task: _Text
    source: str = Field(max_length=1 << 16)  # the task's files and the beginning of the hash of each; of a built-in task nothing
    options: dict[_Text, _Text | bool | _Integer | float | None]
    data: str = Field(max_length=64)
    made_on: dict[_Text, _Text | _Integer]  # how the recorded run was started, and on what
    any_world: bool  # whether a step is the same on any number of processes; noted for whoever reads the file
    rounding: float = Field(ge=0)  # how far a gradient moves, in parts of its norm, where each weight moves by 1e-6 of itself
    gradients: list[Sketch]  # of some small batches
    first_gradient: Sketch  # that the ranks exchanged in step 1
    weights: dict[str, Sketch]  # by the number of steps done
    losses: list[float]  # of each step
    samples: list[list[float]]  # of each step the loss of each sample, in the order of the global batch

    @model_validator(mode="after")
    def _check_lengths(self) -> "Reference":
        sketches = [*self.gradients, self.first_gradient, *self.weights.values()]
        sizes = {len(row) for row in self.samples}
        if len(self.gradients) != BATCHES or any(len(sketch) != SKETCH for sketch in sketches):
            raise ValueError(f"gradients and weights must be sketches of {SKETCH} numbers, gradients those of {BATCHES} batches")
        if not self.losses or len(self.losses) != len(self.samples) or len(sizes) != 1 or not min(sizes):
            raise ValueError("losses and samples must have a row for each step")
        for step, (loss, row) in enumerate(zip(self.losses, self.samples, strict=True), start=1):
            if abs(sum(row) / len(row) - loss) > _MEAN_TOLERANCE * sum(map(abs, row)) / len(row):
                raise ValueError(f"the loss of step {step} is not the mean of its samples")
        return self

    def check_config(self, config: Config, where: str) -> None:
        """Raise `UserError` unless these numbers are of the task and the options of `config`; `where` names the file."""
        task, recipe = config.task, config.recipe()
        check_same({"task": self.task}, {"task": task.short_name}, f"the reference {where} was recorded with another task:")
        check_same_recipe(
            self.options, recipe, f"the reference {where} was recorded with other options; give the same ones, or record again:"
        )
        if changed := find_changed(self.source, name_source(config)):
            raise UserError(
                f"the reference {where} was recorded with other code of task {task.name} ({', '.join(changed)[:300]} differs): use the "
                "same files, or record again"
            )

    def to_json(self) -> bytes:
        """The text of the file: a line for each list of numbers."""
        parts = []
        for name, value in self.model_dump().items():
            if isinstance(value, list) and isinstance(value[0], list):
                rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
                parts.append(f' "{name}": [\n  {rows}\n ]')
            elif name == "weights":
                rows = ",\n  ".join(f"{json.dumps(step)}: {json.dumps(row, allow_nan=False)}" for step, row in value.items())
                parts.append(f' "{name}": {{\n  {rows}\n }}')
            else:
                parts.append(f' "{name}": {json.dumps(value, allow_nan=False)}')
        return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def name_source(config: Config) -> str:
    """The files of the config's task with their hashes. A built-in task comes with this package, whose version says as much."""
    return "" if is_built_in(config.task.name) else config.task.source


def find_shipped(config: Config) -> Path:
    """The file that comes with the task of `config`. Raises `UserError` where none does."""
    if config.task.name != BUILT_IN:
        raise UserError(
            f"no curve of task {config.task.short_name} comes with this package: write one with --record FILE on a machine that you "
            "trust, and give it here with --reference FILE"
        )
    name = f"reference_{BATCH_OF_MANY}.json" if config.batch_size == BATCH_OF_MANY else "reference.json"
    return Path(str(resources.files("mnist_dist.tasks.mnist") / name))


def read_reference(path: Path) -> Reference:
    """The numbers in a file that `--record` wrote. Raises `UserError` for any other file."""
    try:
        return Reference.model_validate_json(read_file(path, _BYTES_MAX))
    except OSError as error:
        raise UserError(f"the reference {path} cannot be read: {describe_error(error)}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(
            f"the reference {path} is not valid ({reason[:200]}); expected a file that `python -m mnist_dist.verify --record` wrote"
        ) from None


def write_reference(path: Path, values: Mapping[str, Any]) -> None:
    """Write a new file, whole or not at all. Raises OSError, and `ValidationError` for numbers that are not finite."""
    write_atomically(path, Reference(**values).to_json())
