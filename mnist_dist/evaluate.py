"""The program: `python -m mnist_dist.evaluate runs/NAME` counts what a run's weights get right, on any number of processes.

The evaluation itself is `mnist_dist.evaluation.evaluate`, imported only once the options are right: torch takes seconds to import.
"""

if __name__ == "__main__":
    from mnist_dist.preemption import end_on_interrupt

    end_on_interrupt()


import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from mnist_dist.config import Config, make_config
from mnist_dist.errors import RunError, UserError
from mnist_dist.options import Parser, path_argument
from mnist_dist.program import answering, importing, make_table, print_answer
from mnist_dist.record import CONFIG_FILE, read_config
from mnist_dist.source import explaining
from mnist_dist.starter import find_size, start_ranks
from mnist_dist.task import Evaluation
from mnist_dist.world import find_world, ignore_job

_GIVEN = ("data_dir", "device", "precision", "threads", "workers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status: 0 counted, 2 a user's mistake, 1 the rest."""

    def run() -> int:
        options = _parse(arguments)
        with answering(options.json) as stream:
            return _evaluate(options, stream, is_program=arguments is None)

    return print_answer(run)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("mnist_dist.evaluate", "Count what the weights of a run get right. Any number of processes gives the same counts.")
    parser.add_argument("run", metavar="RUN", type=path_argument, help="a run folder, or a .safetensors file that a run wrote")
    parser.add_argument("--split", choices=("test", "train", "holdout"), default="test", help="the samples to count (default: test)")
    parser.add_argument(
        "--data_dir", metavar="DIR", type=path_argument, help="folder of a data set that is not embedded (default: the run's)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="auto: CUDA where there is a GPU, else the CPU (default: auto)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="(default: as in the run's config, else auto)")
    parser.add_argument("--threads", metavar="N", help="CPU threads of each process; 0: usable cores / processes on the node (default: 0)")
    parser.add_argument("--workers", metavar="N", help="processes that read samples, beside each process (default: 0)")
    parser.add_argument("--task", metavar="NAME", help="the code of the run's task (default: its own, where you have trained it before)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the names that result.json has")
    return parser.parse_args(arguments)


def _evaluate(options: argparse.Namespace, stream: TextIO, is_program: bool) -> int:
    environ = ignore_job(os.environ)  # the counts of one process are as good as those of all
    size, alone = find_size(environ, is_program)
    if alone:
        return start_ranks(size)
    world = find_world(environ)
    with importing():
        from mnist_dist.data import SampleProbe, check_same_data, fingerprint, load_data
        from mnist_dist.distributed import join_group
        from mnist_dist.evaluation import evaluate, open_evaluation
        from mnist_dist.tier import find_moved
        from mnist_dist.weights import load_model

    trained = load_model(options.run, options.task)
    if os.path.isdir(options.run):
        read_config(Path(options.run))  # without it, nobody knows on which samples the run was trained
    config, data = load_data(_make_config(options, trained.config))
    config = config.with_facts(trained.task.facts)
    with join_group(world, config) as group:
        moved = find_moved(config.task, trained.model, lambda: SampleProbe(data.train, config))
        # evaluation_mode: without DDP, which has no part in this.
        model = group.accelerator.prepare_model(trained.model, device_placement=True, evaluation_mode=True)
        split = {"test": data.test, "train": data.train, "holdout": data.holdout}[options.split]
        if split is None:
            raise UserError(f"split is holdout, but {options.run} has set no {config.task.samples} apart; allowed: test, train")
        # In the batches of the run, it gives the same bits.
        shards = trained.config.shards if (trained.config.shards or 0) >= group.size else None
        batches = {name: getattr(trained.config, name) for name in ("batch_size", "micro_batch")}
        config = config.model_copy(update={"shards": shards} | batches)
        what = "training" if split is data.train else "test"
        if group.size > 1:
            check_same_data({f"{options.split} data": fingerprint(split, config.task, what)}, group)
        with open_evaluation(split, config, group, what) as reader:
            evaluation = evaluate(config, model, reader, group, moved)
        facts = {"task": config.task.name, "precision": group.precision, "device": group.device.type, "world_size": group.size}
        if "dataset" in config.task.facts:
            facts = {"dataset": config.task.facts["dataset"]} | facts
        if group.is_main:
            values = evaluation.name_values(options.split) | facts
            print(json.dumps(values) if options.json else _to_text(options, evaluation, config, facts), file=stream)
    return 0


def _make_config(options: argparse.Namespace, config: Config) -> Config:
    """The config under which the weights are evaluated: the run's, with the machine and the folder that are given here.

    A bare file of weights brings no more than its task. Raises `UserError`.
    """
    values = config.without_download().values()
    if not os.path.isdir(options.run) and "dataset" in config.task.facts:
        values["dataset"] = config.task.facts["dataset"]
    given = {name: value for name in _GIVEN if (value := getattr(options, name)) is not None}
    # The batch of a training may be larger than the split that is left: an evaluation has none.
    taken = {name: values[name] for name in ("train_size", "test_size", "holdout", "precision", "seed", *config.task.model_dump())}
    source = str(Path(options.run) / CONFIG_FILE) if os.path.isdir(options.run) and not given else ""
    return make_config(taken | {"task": config.task.name, "batch_size": 1} | given, source, type(config.task))


def _to_text(options: argparse.Namespace, evaluation: Evaluation, config: Config, facts: dict[str, Any]) -> str:
    from mnist_dist.evaluation import describe

    task = config.task
    lines = [
        f"{options.run}: {evaluation.samples:,} {options.split} {task.samples} of {facts.get('dataset', task.short_name)}, "
        f"{facts['precision']} on {facts['world_size']} x {facts['device']}",
        describe(task, evaluation.measures) + (f", loss {evaluation.measures['loss']:.4f}" if task.best != "loss" else ""),
    ]
    with explaining(task.name, "in tabulate", RunError):
        table = task.tabulate(evaluation.measures)
        return "\n".join([*lines, "", make_table(*table)] if table is not None else lines)


if __name__ == "__main__":
    sys.exit(main())
