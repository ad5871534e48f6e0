"""Does this machine, or this cluster, train right? `python -m mnist_dist.verify`, or the same under torchrun, accelerate launch or srun.

Trains a few steps in float32 and compares the loss of each with a recorded curve. The loss of step k is a function of (config, k) alone, so
any world must give the same curve up to the rounding of its sums: a wrong gradient average, order, augmentation or rank shows at once.
"""

if __name__ == "__main__":
    from mnist_dist.program import end_on_interrupt

    end_on_interrupt()


import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from mnist_dist.config import Config, configure
from mnist_dist.errors import RunError, UserError
from mnist_dist.files import read_file, write_atomically
from mnist_dist.options import Parser, path_argument
from mnist_dist.preemption import StopSignals
from mnist_dist.program import print_answer
from mnist_dist.record import METRICS_FILE, is_number, read_run

# SGD at a calm learning rate: at a high one, rounding grows tenfold every few steps; and Muon lifts it up to the size of its update.
_OPTIONS = {
    "steps": 40,
    "optimizer": "sgd",
    "learning_rate": 0.003,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "constant",
    "precision": "fp32",
    "log_every": 1,
    "test_size": 100,
    "report": False,
    "wandb": "disabled",
}
_BYTES_MAX = 1 << 20
TOLERANCE = 1e-4  # worlds and thread counts differ by less than 1e-6 here; the mistakes this is for by more than 5e-4


def make_config(run_dir: Path | str) -> Config:
    """The config of the recorded curve: the default recipe, with SGD. A batch of 64 suits worlds of 1, 2, 4 ... 64."""
    return configure(**_OPTIONS, run_dir=str(run_dir))


def compare(losses: list[float], reference: list[float]) -> str:
    """One line that says how near the curve is. Raises `RunError` that names the first step that is too far off."""
    if len(losses) != len(reference):
        raise RunError(f"the run recorded {len(losses)} steps, the reference has {len(reference)}")
    differences = [abs(loss - expected) / expected for loss, expected in zip(losses, reference, strict=True)]
    for step, difference in enumerate(differences, start=1):
        if not difference <= TOLERANCE:  # NaN, too
            raise RunError(
                f"the loss of step {step} is {losses[step - 1]:.6f}, the reference {reference[step - 1]:.6f}: a relative difference of "
                f"{difference:.1e}, allowed {TOLERANCE:.0e}. This machine or this world does not train right"
            )
    return f"right: {len(losses)} steps, largest relative difference to the recorded curve {max(differences):.1e} (allowed {TOLERANCE:.0e})"


def read_reference(path: Path) -> list[float]:
    """The losses in a file that `--record` wrote. Raises `UserError`."""
    try:
        losses = json.loads(read_file(path, _BYTES_MAX))
    except OSError as error:
        raise UserError(f"the reference {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        losses = None
    if not isinstance(losses, list) or not losses or not all(is_number(loss) and loss > 0 for loss in losses):
        raise UserError(f"the reference {path} is not a list of losses; expected a file that `python -m mnist_dist.verify --record` wrote")
    return losses


def verify(reference: Path | None = None, record: Path | None = None) -> int:
    """Train; on rank zero compare with the file `reference` (none: the one that ships), or write the file `record`; the exit status."""
    if record is not None and (os.path.lexists(record) or not os.path.isdir(record.parent)):
        raise UserError(f"the file to record is {record}, which exists or whose folder does not; expected a new name in an existing folder")
    expected = read_reference(reference or Path(str(resources.files("mnist_dist.tasks.mnist") / "reference.json")))
    from mnist_dist.loop import train

    signals = StopSignals().install()
    record = record and record.absolute()
    # Each rank has a folder of its own, and all of them call it alike: by that they know that they are one run.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run_dir = Path("verify")
        result = train(make_config(run_dir), signals)
        if result.stop:
            return result.stop.exit_code
        if (run_dir / METRICS_FILE).exists():  # rank zero's
            losses = [row["train/loss"] for row in read_run(run_dir).rows]
            if record is not None:
                write_atomically(record, (json.dumps(losses, indent=1) + "\n").encode())
                print(f"recorded {len(losses)} steps in {record}")
            else:
                print(compare(losses, expected), f"in a world of {result.values['world_size']}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 the curve is met, 2 a user's mistake, 1 the rest."""

    def run() -> int:
        parser = Parser(
            "mnist_dist.verify", "Train a few steps, on any number of processes, and compare their losses with a recorded curve."
        )
        choice = parser.add_mutually_exclusive_group()
        choice.add_argument("--reference", metavar="FILE", type=path_argument, help="the curve to compare with (default: the shipped one)")
        choice.add_argument("--record", metavar="FILE", type=path_argument, help="write the curve into a new file instead")
        options = parser.parse_args(arguments)
        from mnist_dist.starter import find_size, start_ranks

        size, alone = find_size(os.environ, is_program=arguments is None)
        if alone:
            return start_ranks(size)
        return verify(*(None if name is None else Path(name) for name in (options.reference, options.record)))

    return print_answer(run)


if __name__ == "__main__":
    sys.exit(main())
