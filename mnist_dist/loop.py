"""The story of a run: `train(config)`, from top to bottom."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_dist.augment import draw_transforms, make_inputs
from mnist_dist.config import Config
from mnist_dist.console import Progress, format_duration, set_up_logging
from mnist_dist.data import Dataset, load_dataset, make_loader
from mnist_dist.distributed import Agreement, join_group
from mnist_dist.errors import UserError
from mnist_dist.evaluation import Evaluation, evaluate
from mnist_dist.graph import GraphedStep
from mnist_dist.meter import Meter
from mnist_dist.optimization import learning_rate_at, set_learning_rate
from mnist_dist.preemption import Stop, StopSignals
from mnist_dist.record import Row
from mnist_dist.run_folder import RunFolder, describe_versions
from mnist_dist.state import TrainingState
from mnist_dist.weights import make_header
from mnist_dist.world import find_world

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a call of `train` ended: finished, with the values of result.json; or stopped by a signal after `step`, and saved."""

    stop: Stop
    step: int
    values: Row


def train(config: Config, signals: StopSignals | None = None) -> Result:
    """Train as `config` says, continuing what its run folder holds. All processes of a run call this alike and get the same result.

    Raises `UserError` for what the caller can correct and `RunError` for what went wrong on the way.
    """
    signals = signals or StopSignals()
    world = find_world(os.environ)
    set_up_logging(world.rank, world.size)
    config.check_world(world.size)
    with join_group(world, config) as group, RunFolder(config, group) as run:
        signals.defer(announced=group.is_main)
        # What is trained, and when the ranks meet for more than a step.
        shared = config.recipe() | {"log_every": config.log_every, "evaluate_every": config.evaluate_every}
        if group.broadcast(shared) != shared:
            raise UserError("this rank was given other options than rank zero: start all processes with the same command")
        # Whatever can be refused is refused before the run folder is made.
        if (result := run.check()) is not None:
            _log.info("%s is finished: %s; nothing to do", run.path, _summarize(config, result))
            return Result(Stop.NONE, result["step"], result)
        data = load_dataset(config)
        state = TrainingState(config, data.fingerprint(), group)
        data = data.to(group.device)

        saved = run.open()
        recorded = state.restore(saved) if saved is not None else []
        facts = {"launcher": world.launcher, "world_size": group.size, "nodes": group.count_nodes(world), "device": group.device.type}
        facts |= {"precision": group.precision, "threads": torch.get_num_threads()}
        run.start(state.step, facts | {"parameters": state.count_parameters()}, recorded)
        _log.info("%s from step %d of %d: %s", run.path, state.step, config.total_steps, ", ".join(f"{k} {v}" for k, v in facts.items()))

        def compute(images: Tensor, labels: Tensor, transforms: Tensor) -> Tensor:
            """All that the device does in a step; this rank's mean loss."""
            inputs = make_inputs(images, data.mean, data.std, transforms)
            loss = F.cross_entropy(state.model(inputs), labels, label_smoothing=config.label_smoothing)
            meter.note_forward()
            state.optimizer.zero_grad()
            group.accelerator.backward(loss)
            state.optimizer.step()
            return loss.detach()

        run.show_samples(data.train, draw_transforms(config, state.step))
        state.settle(make_inputs(data.train.images[:1], data.mean, data.std))
        train_step = GraphedStep(compute) if config.cuda_graph else compute
        evaluation: Evaluation | None = None
        agreement = Agreement(group)
        meter = Meter(config, group, state.step)
        state.model.train()
        with Progress(state.step, config.total_steps, group.is_main, config) as progress:
            for batch in make_loader(data.train, config, group.accelerator, state.step):
                if batch.step != state.step:
                    raise AssertionError(f"the loader gave step {batch.step} for step {state.step}: is it sharded twice?")
                learning_rate = learning_rate_at(config, state.step)
                set_learning_rate(state.optimizer, learning_rate)
                transforms = draw_transforms(config, state.step)[group.rank :: group.size].to(group.device, non_blocking=True)
                meter.begin_step()
                loss = train_step(batch.images, batch.labels, transforms)
                state.step += 1
                meter.add(loss)
                progress.advance()

                evaluate_now = config.is_evaluation_due(state.step)
                if evaluate_now or state.step % config.log_every == 0:
                    row = meter.read(state, learning_rate)
                    if evaluate_now:
                        evaluation = evaluate(state.model, data.evaluated, data.mean, data.std, group)
                        row |= evaluation.name_values(config.evaluated_split, "loss", "accuracy", "class_accuracy")
                        run.show_predictions(state.step, data.evaluated, evaluation)
                        meter.reset_clock()
                    run.append(row)
                    progress.report(row)

                stop = agreement.exchange(max(signals.received, run.stop_requested))
                if state.step == config.total_steps:
                    break  # too late to stop: finishing is as quick
                if stop:
                    agreement.finish()
                    meter.check()
                    path = run.save_last(state, Stop(stop))
                    _log.info("stopped by a signal after step %d of %d; saved %s", state.step, config.total_steps, path)
                    return Result(Stop(stop), state.step, {})
                run.save_if_due(state)

        agreement.finish()
        run.save_last(state)
        if evaluation is None:  # an earlier start was killed between its last checkpoint and its result
            evaluation = evaluate(state.model, data.evaluated, data.mean, data.std, group)
        values = _describe_result(state, evaluation, data) | facts
        run.finish(values, _encode_weights(state, config, data))
        _log.info("finished: %s", _summarize(config, values))
        run.publish(values, data.evaluated, evaluation)
        return Result(Stop.NONE, state.step, values)


def _describe_result(state: TrainingState, evaluation: Evaluation, data: Dataset) -> dict[str, Any]:
    elapsed_s = state.elapsed_s
    return {
        "step": state.step,
        "epoch": state.step / state.config.steps_per_epoch,
        **evaluation.name_values(state.config.evaluated_split, "accuracy", "errors", "images", "loss", "confusion_matrix"),
        "elapsed_s": round(elapsed_s, 3),
        "images_per_s": round(state.step * state.config.batch_size / elapsed_s, 1),
        "dataset": state.config.dataset,
        "mean": data.mean,
        "std": data.std,
        "versions": describe_versions(),
    }


def _encode_weights(state: TrainingState, config: Config, data: Dataset) -> bytes:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.bare_model.state_dict().items()}
    return safetensors.torch.save(tensors, make_header(config.dataset, data.mean, data.std))


def _summarize(config: Config, values: Row) -> str:
    accuracy, errors, images = (values[f"{config.evaluated_split}/{name}"] for name in ("accuracy", "errors", "images"))
    return (
        f"{config.evaluated_on} accuracy {accuracy:.2%} ({errors} of {images} wrong) "
        f"after {values['step']} steps, {format_duration(values['elapsed_s'])}, {values['images_per_s']:,.0f} images/s"
    )
