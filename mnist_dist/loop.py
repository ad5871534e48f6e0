"""The story of a run: `train(config)`, from top to bottom."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_dist.asked import warn_of_smaller_step
from mnist_dist.batches import Batch, MicroBatch, StepSampler, add_drawn, draw
from mnist_dist.config import Config
from mnist_dist.console import Progress, format_duration, set_up_logging
from mnist_dist.data import check_same_data, find_other_facts, list_differing, load_data
from mnist_dist.distributed import Agreement, Group, join_group
from mnist_dist.errors import RunError, UserError
from mnist_dist.evaluation import describe, evaluate, open_evaluation, rehearse
from mnist_dist.graph import GraphedStep
from mnist_dist.machine import find_kind
from mnist_dist.meter import Meter
from mnist_dist.optimization import learning_rate_at, set_learning_rate
from mnist_dist.preemption import Stop, Stopped, StopSignals
from mnist_dist.reader import Reader
from mnist_dist.record import pick_measures
from mnist_dist.run_folder import RunFolder, describe_versions
from mnist_dist.source import explaining
from mnist_dist.state import TrainingState
from mnist_dist.task import Evaluation, Row
from mnist_dist.tier import ANY_WORLD, THIS_WORLD
from mnist_dist.weights import encode_weights
from mnist_dist.world import find_world

_log = logging.getLogger(__name__)


Turns = Callable[[Iterable[Batch], TrainingState], Iterable[Batch]]


def _take_no_turns(batches: Iterable[Batch], _: TrainingState) -> Iterable[Batch]:
    return batches


@dataclass(frozen=True)
class Result:
    """How a call of `train` ended: finished, with the values of result.json; or stopped by a signal after `step`, and saved."""

    stop: Stop
    step: int
    values: Row


def train(
    config: Config,
    signals: StopSignals | None = None,
    turns: Turns = _take_no_turns,
    folder: Path | None = None,
    *,
    compare_ranks: bool = True,
) -> Result:
    """Train as `config` says, continuing what its run folder holds. All processes of a run call this alike and get the same result.

    `turns` is given the batches and hands them on, one for each step: others do or look at something in between, and after the last.
    `folder` is the run folder where that is not `config.run_dir`, by whose name the ranks know that they are of one run. `verify` compares
    the data and the weights of the ranks by itself.

    Raises `UserError` for what the caller can correct and `RunError` for what went wrong on the way.
    """
    signals = signals or StopSignals()
    world = find_world(os.environ)
    set_up_logging(world.rank, world.size)
    if world.launcher == "srun" and world.rank == 0:
        warn_of_smaller_step(world.size, os.environ, _log.warning)
    config.check_world(world.size)
    with join_group(world, config) as group, RunFolder(config, group, folder) as run:
        signals.defer(announced=group.is_main)
        # All ranks agree on what is trained, by which code, and after which steps they do more than train.
        shared = config.recipe() | {name: getattr(config, name) for name in ("log_every", "evaluate_every", "micro_batch")}
        shared |= {"the source of the task": config.task.source}
        if (main := group.broadcast(shared)) != shared:
            raise UserError(
                f"this rank has other options than rank zero ({list_differing(main, shared)}): start all processes with the same command "
                "and files"
            )
        # Whatever can be refused is refused before the run folder is made.
        if (result := run.check()) is not None:
            _log.info("%s is finished: %s; nothing to do", run.path, _summarize(config, result))
            return Result(Stop.NONE, result["step"], result)
        config, data = load_data(config)
        state = TrainingState(config, data, group)
        task, run.config = config.task, config
        if compare_ranks:
            _check_data(state, group)

        rehearse(config, state.bare_model, data.evaluated, group, state.tier.moved)
        saved = run.open(state.count_bytes(), lambda: bool(signals.received))
        recorded = state.restore(saved) if saved is not None else []
        facts = {"launcher": world.launcher, "world_size": group.size, "nodes": group.count_nodes(world), "device": group.device.type}
        facts |= {"precision": group.precision, "threads": torch.get_num_threads()}
        noted = {
            "parameters": state.count_parameters(),
            "tier": ANY_WORLD if state.is_any_world else THIS_WORLD,
            "best": task.best,
            "micro_batch": config.micro_batch,
            "processor": "; ".join(sorted(set(group.gather(find_kind(group.device))))),  # of all ranks
            "torch": torch.__version__,
            **config.name_sizes(),
        }
        # The row of an evaluation that is not finished may be there from a start that was killed after it.
        run.start(state.step, facts | noted, recorded, state.step - (state.unfinished is not None))
        _log.info("%s from step %d of %d: %s", run.path, state.step, config.total_steps, ", ".join(f"{k} {v}" for k, v in facts.items()))
        _log.info("%s", state.tier.describe(config.shards))
        run.show_samples(state.step, data, draw(config, min(state.step, config.total_steps - 1), config.batch_size))

        def compute(parts: Sequence[Sequence[MicroBatch]]) -> Tensor:
            with explaining(task.name, f"in step {state.step + 1}", RunError):
                return state.train_on(parts, meter.note_forward)

        state.prepare_first_step()
        train_step = GraphedStep(compute, state.unsettle) if config.cuda_graph else compute
        evaluation: Evaluation | None = None
        agreement = Agreement(group)
        meter = Meter(config, group, state.step, compare_ranks)
        sampler = StepSampler(data.train, config, group.rank, group.size, state.step)
        state.model.train()
        with (
            Reader(data.train, config, group, "training", sampler) as batches,
            open_evaluation(data.evaluated, config, group) as evaluated,
            Progress(state.step, group.is_main, config) as progress,
        ):

            def heed_stops() -> None:
                if stop := agreement.exchange(max(signals.received, run.stop_requested)):
                    raise Stopped(Stop(stop))

            def evaluate_model() -> Evaluation:
                state.share_buffers()
                return evaluate(config, state.bare_model, evaluated, group, state.tier.moved, heed_stops)

            def record(row: Row, *, evaluate_now: bool) -> Evaluation | None:
                found: Evaluation | None = None
                if evaluate_now:
                    state.unfinished, state.is_settled = row, True  # what the start after a stop goes on with
                    found = evaluate_model()
                    state.unfinished, state.is_settled = None, False
                    row = row | found.name_values(config.evaluated_split, *(task.in_rows or found.measures))
                    run.show_evaluation(state.step, data, found)
                    meter.reset_clock()
                run.append(row)
                progress.report(row)
                return found

            try:
                with run.saving_what_is_done(state):
                    if state.unfinished is not None:
                        evaluation = record(state.unfinished, evaluate_now=True)
                    for batch in turns(batches, state):
                        if batch.step != state.step:
                            raise AssertionError(f"the loader gave step {batch.step} for step {state.step}: is it sharded twice?")
                        learning_rate = learning_rate_at(config, state.step)
                        set_learning_rate(state.optimizer, learning_rate)
                        batch = add_drawn(batch, config, group.device)
                        meter.begin_step()
                        loss = train_step(batch.parts)
                        state.step += 1
                        meter.add(loss)
                        progress.advance()

                        evaluate_now = config.is_evaluation_due(state.step)
                        if evaluate_now or state.step % config.log_every == 0:
                            evaluation = record(meter.read(state, learning_rate), evaluate_now=evaluate_now)
                        state.is_settled = True
                        if state.step < config.total_steps:  # after it there is no other batch, and finishing is as quick as stopping
                            heed_stops()
                            run.save_if_due(state)
                    # An earlier start may have been killed between its last checkpoint and its result.
                    evaluation = evaluation or evaluate_model()
                    agreement.finish()
            except Stopped as stopped:
                with run.saving_what_is_done(state):
                    agreement.finish()
                    meter.check(state)
                path = run.save_last(state, stopped.stop)
                then = ", amid an evaluation, which the next start repeats" * (state.unfinished is not None)
                _log.info("stopped by a signal after step %d of %d%s; saved %s", state.step, config.total_steps, then, path)
                return Result(stopped.stop, state.step, {})
            run.save_last(state)
        values = _describe_result(state, evaluation) | facts
        run.finish(values, encode_weights(state.bare_model, config))
        signals.is_finished = True
        _log.info("finished: %s", _summarize(config, values))
        run.publish(values, data, evaluation)
        return Result(Stop.NONE, state.step, values)


def _check_data(state: TrainingState, group: Group) -> None:
    """Raise `UserError` on all ranks where some have other data, or other numbers of samples."""
    config, facts = state.config, state.config.task.facts
    other: Row = {f"the fact {name}": "another" for name in find_other_facts(group.broadcast(facts), facts)}
    prints = {"training data": state.fingerprint, f"{config.evaluated_on} data": state.evaluated_fingerprint}
    check_same_data(other | prints | config.name_sizes(), group)


def _describe_result(state: TrainingState, evaluation: Evaluation) -> dict[str, Any]:
    elapsed_s, config = state.elapsed_s, state.config
    return {
        **config.task.facts,  # first: a fact may be called as one of the others
        "step": state.step,
        "epoch": state.step / config.steps_per_epoch,
        **evaluation.name_values(config.evaluated_split),
        "elapsed_s": round(elapsed_s, 3),
        "images_per_s": round(state.step * config.batch_size / elapsed_s, 1),
        "versions": describe_versions(),
    }


def _summarize(config: Config, values: Row) -> str:
    steps = f"{values['step']} step{'s' * (values['step'] != 1)}"
    return (
        f"{config.evaluated_on} {describe(config.task, pick_measures(values, config.evaluated_split))} "
        f"after {steps}, {format_duration(values['elapsed_s'])}, {values['images_per_s']:,.0f} {config.task.samples}/s"
    )
