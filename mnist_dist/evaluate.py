"""The program: `python -m mnist_dist.evaluate runs/NAME` counts what a run's weights get right, on any number of processes.

The evaluation itself is `mnist_dist.evaluation.evaluate`, imported only once the options are right: torch takes seconds to import.
"""

if __name__ == "__main__":
    from mnist_dist.program import end_on_interrupt

    end_on_interrupt()


import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_dist.config import Config, make_config
from mnist_dist.errors import UserError
from mnist_dist.options import Parser, path_argument, read_options_file
from mnist_dist.program import print_answer
from mnist_dist.record import CONFIG_FILE
from mnist_dist.world import find_world

if TYPE_CHECKING:
    from mnist_dist.evaluation import Evaluation

# What an evaluation takes over from the run: which images there are, where they lie, and how precisely the run computed.
_TAKEN_OVER = ("train_size", "test_size", "holdout", "data_dir", "precision")
_GIVEN = ("data_dir", "device", "precision", "threads")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 counted, 2 a user's mistake, 1 the rest."""
    return print_answer(lambda: _evaluate(_parse(arguments)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("mnist_dist.evaluate", "Count what the weights of a run get right. Any number of processes gives the same counts.")
    parser.add_argument("run", metavar="RUN", type=path_argument, help="a run folder, or a .safetensors file that a run wrote")
    parser.add_argument("--split", choices=("test", "train", "holdout"), default="test", help="the images to count (default: test)")
    parser.add_argument(
        "--data_dir",
        metavar="DIR",
        type=path_argument,
        help="folder of a data set that is not embedded (default: the run's)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="auto: CUDA where there is a GPU, else the CPU (default: auto)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="(default: as in the run's config, else auto)")
    parser.add_argument("--threads", metavar="N", help="CPU threads of each process; 0: usable cores / processes on the node (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the names that result.json has")
    return parser.parse_args(arguments)


def _evaluate(options: argparse.Namespace) -> int:
    world = find_world(os.environ)
    import torch

    from mnist_dist.data import load_dataset
    from mnist_dist.distributed import join_group
    from mnist_dist.evaluation import evaluate
    from mnist_dist.weights import load_model

    trained = load_model(options.run)
    config = _make_config(options, trained.dataset)
    dataset = load_dataset(config)
    with join_group(world, config) as group:
        # In the memory format of the training, so that the sums are rounded alike; evaluation_mode: without DDP, which has no part in this.
        model = group.accelerator.prepare_model(trained.model.to(memory_format=torch.channels_last), evaluation_mode=True)
        split = {"test": dataset.test, "train": dataset.train, "holdout": dataset.holdout}[options.split]
        if split is None:
            raise UserError(f"split is holdout, but {options.run} has set no images apart; allowed: test, train")
        evaluation = evaluate(model, split.to(group.device), trained.mean, trained.std, group)
        facts = {"dataset": config.dataset, "precision": group.precision, "device": group.device.type, "world_size": group.size}
        if group.is_main:
            print(_to_json(options.split, evaluation, facts) if options.json else _to_text(options, evaluation, facts))
    return 0


def _make_config(options: argparse.Namespace, dataset: str) -> Config:
    """The config under which the weights are evaluated; a bare file of weights brings no more than its data set's name."""
    values: dict[str, Any] = {}
    source = ""
    if os.path.isdir(options.run):
        source = str(Path(options.run) / CONFIG_FILE)
        run = read_options_file(Path(source))
        values = {name: run[name] for name in _TAKEN_OVER if name in run}
    given = {name: value for name in _GIVEN if (value := getattr(options, name)) is not None}
    # The batch of a training may be larger than the split that is left: an evaluation has none.
    return make_config(values | given | {"dataset": dataset, "batch_size": 1}, "" if given else source)


def _to_json(split: str, evaluation: "Evaluation", facts: dict[str, Any]) -> str:
    names = ("accuracy", "errors", "images", "loss", "class_accuracy", "confusion_matrix")
    return json.dumps(evaluation.name_values(split, *names) | facts)


def _to_text(options: argparse.Namespace, evaluation: "Evaluation", facts: dict[str, Any]) -> str:
    confusion = evaluation.confusion_matrix
    labels = range(len(confusion))
    lines = [
        f"{options.run}: {evaluation.images:,} {options.split} images of {facts['dataset']}, "
        f"{facts['precision']} on {facts['world_size']} x {facts['device']}",
        f"accuracy {evaluation.accuracy:.2%}, {evaluation.errors:,} wrong, loss {evaluation.loss:.4f}",
        "",
        "class   " + "".join(f"{f'as {label}':>7}" for label in labels) + f"{'images':>10}{'wrong':>8}{'accuracy':>11}",
    ]
    for label, (row, accuracy) in enumerate(zip(confusion, evaluation.class_accuracy, strict=True)):
        cells = "".join(f"{count or '.':>7}" for count in row)
        shown = "-" if accuracy is None else f"{accuracy:.2%}"
        lines.append(f"{label:<8}{cells}{sum(row):>10,}{sum(row) - row[label]:>8,}{shown:>11}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
