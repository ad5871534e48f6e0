"""Does this machine, or this cluster, train right? `python -m mnist_dist.verify`, or the same under torchrun, accelerate launch or srun.

Every rank computes the gradients of the same batches; then all train a few steps in float32. Both are compared with a recorded run. What
step k computes is a function of (config, k) alone, so any world must give the same up to the rounding of its sums: a wrong gradient,
average, order, augmentation or rank shows at once, and the rank is named where it can be known.
"""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_dist.config import RUN_FOLDER_OPTIONS, Config, add_config_options, find_given_task, resolve_config, take_options
from mnist_dist.errors import RunError, UserError
from mnist_dist.files import check_free_name, describe_error
from mnist_dist.finding import Finding, write_findings
from mnist_dist.options import Parser, path_argument
from mnist_dist.preemption import StopSignals
from mnist_dist.program import importing, print_answer
from mnist_dist.record import STACKS
from mnist_dist.reference import BATCH_OF_MANY, SAMPLES_MAX, Reference, find_shipped, read_reference, write_reference
from mnist_dist.source import note_named
from mnist_dist.starter import find_size, start_ranks
from mnist_dist.world import find_world

# SGD at a calm learning rate: at a high one, rounding grows tenfold every few steps; and Muon lifts it up to the size of its update.
_RECIPE = {
    "steps": 40,
    "optimizer": "sgd",
    "learning_rate": 0.003,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "constant",
}
_MANY = 64  # processes that are no more than the default batch has samples
_TEST_SIZE = 100
# What a comparison needs, or what has no use in one.
_FIXED: dict[str, Any] = {
    "run_dir": "verify",
    "log_every": 1,
    "evaluate_every": 10**9,
    "checkpoint_every": 0,
    "checkpoint_every_s": 0.0,
    "keep_checkpoints": 1,
    "report": False,
    "wandb": "disabled",
    "log_with": None,
    "precision": "fp32",
    "cuda_graph": False,
}
_UNUSED = (*RUN_FOLDER_OPTIONS, *_FIXED, "epochs")


def make_config(given: dict[str, Any] | None = None, recipe: dict[str, Any] | None = None, processes: int = 1) -> Config:
    """The config of a comparison: the options `given`, over those that suit a comparison, over those of a `recipe`. Raises `UserError`."""
    suitable = _RECIPE | ({"batch_size": BATCH_OF_MANY} if processes > _MANY and "batch_size" not in (recipe or {}) else {})
    config = resolve_config(suitable | (given or {}) | _FIXED, recipe).replace(epochs=1)  # which mean nothing beside steps
    if config.test_size is None and not config.holdout and config.task.sizes is not None:
        config = config.replace(test_size=min(_TEST_SIZE, config.task.sizes[1]))
    return config


def verify(config: Config, reference: Reference | None = None, record: Path | None = None, answer: Path | None = None) -> int:
    """Train and compare with `reference`, or write the file `record`; the findings go into the file `answer`. The exit status."""
    with importing():
        from mnist_dist.inspection import Inspection
        from mnist_dist.loop import train

    signals = StopSignals().install()
    is_main = find_world(os.environ).rank == 0
    inspection = Inspection(config, reference, _show if is_main else lambda _: None)
    folder = Path(tempfile.mkdtemp())
    run_dir = folder / inspection.config.run_dir
    try:
        result = train(inspection.config, signals, inspection.take_turns, run_dir, compare_ranks=False)
    except RunError as error:
        if is_main:
            failed = Finding("curve", "WRONG", " ".join(str(error).split()), "the reason names the rank, or what it waited for")
            _write(answer, [*inspection.findings, failed])
        raise
    finally:
        if not (run_dir / STACKS).exists():  # to which the reason points
            shutil.rmtree(folder, ignore_errors=True)
    if result.stop:
        return result.stop.exit_code
    is_wrong = any(finding.word == "WRONG" for finding in inspection.findings)
    if is_main:
        if record is not None and not is_wrong:
            try:
                write_reference(record, inspection.values)
            except OSError as error:
                raise RunError(f"the reference {record} cannot be written: {describe_error(error)}") from error
            print(f"recorded {config.total_steps} steps in {record}")
        _write(answer, inspection.findings)
    return RunError.exit_code if is_wrong else os.EX_OK


def _show(finding: Finding) -> None:
    print(f"{finding.word:5} {finding.check}: {finding.measured}", flush=True)
    if finding.next_step:
        print(f"      next: {finding.next_step}", flush=True)


def _write(path: Path | None, findings: Sequence[Finding]) -> None:
    if path is not None:
        try:
            write_findings(path, findings)
        except OSError as error:
            raise RunError(f"the answer {path} cannot be written: {describe_error(error)}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 nothing is wrong, 2 a user's mistake, 1 the rest."""

    def run() -> int:
        task, recipe = find_given_task(arguments, "mnist_dist.verify")
        parser = Parser(
            "mnist_dist.verify",
            "Compute some gradients and train a few steps, on any number of processes, and compare them with a recorded run.",
            usage="[--reference FILE | --record FILE] [--answer FILE] [--config FILE] [--task NAME] [--option value ...]",
        )
        choice = parser.add_mutually_exclusive_group()
        choice.add_argument("--reference", metavar="FILE", type=path_argument, help="what to compare with (default: what comes with mnist)")
        choice.add_argument("--record", metavar="FILE", type=path_argument, help="write it into a new file instead")
        parser.add_argument("--answer", metavar="FILE", type=path_argument, help="write what was found into a new file, as JSON, too")
        add_config_options(parser, task, _RECIPE, _UNUSED)
        given = parser.parse(arguments)
        files = {name: Path(path) for name in ("reference", "record", "answer") if (path := given.pop(name)) is not None}
        for name in ("record", "answer"):
            if name in files:
                check_free_name(name, files[name])
        size, alone = find_size(os.environ, is_program=arguments is None)
        config = make_config(take_options(given, _UNUSED, "verify"), recipe, size)
        reference = None
        if "record" not in files:
            path = files.get("reference") or find_shipped(config)
            reference = read_reference(path)
            reference.check_config(config, str(path))
        elif config.steps is not None and config.steps * config.batch_size > SAMPLES_MAX:
            raise UserError(
                f"{config.steps} steps of {config.batch_size} samples are more than the {SAMPLES_MAX:,} that a reference holds: give fewer "
                "--steps, or a smaller --batch_size"
            )
        note_named(config.task.name)
        if alone:
            return start_ranks(size)
        return verify(config, reference, files.get("record"), files.get("answer"))

    return print_answer(run)


if __name__ == "__main__":
    sys.exit(main())
