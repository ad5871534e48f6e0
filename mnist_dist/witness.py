"""What another process finds of a task: `python -m mnist_dist.check` starts these, alone or as the ranks of a run, and compares.

Each has a folder, which has the config and takes the answers, and a job: to look at the task, or to train it for some steps.
"""

import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from mnist_dist.batches import Batch, MicroBatch, StepSampler, add_drawn
from mnist_dist.config import Config, make_config
from mnist_dist.data import SampleProbe, load_data
from mnist_dist.distributed import Group
from mnist_dist.errors import RunError, is_lost_rank
from mnist_dist.evaluation import evaluate, open_evaluation
from mnist_dist.model import build_model
from mnist_dist.optimization import build_optimizer
from mnist_dist.options import read_options_file
from mnist_dist.program import run_program
from mnist_dist.randomness import derive_seed, seed_generators
from mnist_dist.reader import Seeded, keep_split, read
from mnist_dist.record import CHECKPOINTS, CONFIG_FILE
from mnist_dist.samples import encode_tensor, is_in_memory, list_tensors, name_sample
from mnist_dist.source import explaining
from mnist_dist.state import TrainingState
from mnist_dist.task import Data, Row
from mnist_dist.tier import find_moved

STATE_FILE, FOUND_FILE = "state.pt", "found.json"
RUN = "run"
STEPS_BEFORE = 2  # that the other process has trained before it saved its state
_BLOCKS = 4096  # digests of a split in memory
_READ = 8  # samples of any other split
_WAIT_S = 60.0


def digest(value: Any, depth: int = 4) -> str:
    """A short hash of all that a value holds: tensors, arrays, generators, containers, and objects down to a `depth`."""
    return hashlib.sha256(b"".join(_spell(value, depth))).hexdigest()[:16]


def _spell(value: Any, depth: int) -> Iterator[bytes | memoryview]:
    yield type(value).__name__.encode()
    if isinstance(value, Tensor):
        for tensor in list_tensors(value.detach()):  # one, but of a sparse or nested tensor
            yield f"{tensor.dtype} {list(tensor.shape)}".encode()
            yield encode_tensor(tensor)
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode() + value.tobytes()
    elif isinstance(value, torch.Generator):
        yield value.get_state().numpy().tobytes()
    elif isinstance(value, np.random.Generator):
        yield repr(value.bit_generator.state).encode()
    elif isinstance(value, np.random.RandomState):
        yield repr(value.get_state(legacy=False)).encode()
    elif isinstance(value, random.Random):
        yield repr(value.getstate()).encode()
    elif isinstance(value, Mapping | list | tuple):
        for part in value.items() if isinstance(value, Mapping) else value:
            yield from _spell(part, depth)
    elif hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | FunctionType | BuiltinFunctionType | nn.Module):
        yield from _spell(vars(value), depth - 1) if depth else ()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):  # with slots
        parts = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        yield from _spell(parts, depth - 1) if depth else ()
    elif " at 0x" not in (text := repr(value)):
        yield text.encode(errors="replace")


def digest_each(values: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each value by its name."""
    return {name: digest(value) for name, value in values.items()}


def list_shapes(model: nn.Module) -> dict[str, str]:
    """The shape of each tensor of a model by its name."""
    return {name: str([*tensor.shape]) for name, tensor in model.state_dict().items()}


def digest_data(config: Config, data: Data, backwards: bool = False) -> dict[str, str]:
    """Digests of samples by their names, such as `sample 7 of the training data`, and of the facts; read from the last if `backwards`."""
    found = {f"the fact {name}": digest(value) for name, value in config.task.facts.items()}
    for what, split in (("training", data.train), ("test", data.evaluated)):
        found |= {name_sample(split, what, index): text for index, text in _digest_split(split, config, what, backwards).items()}
    return found


def _digest_split(split: Dataset[Any], config: Config, what: str, backwards: bool) -> dict[int, str]:
    count = len(split)  # type: ignore[arg-type]
    if is_in_memory(split):
        size = -(-count // _BLOCKS)
        return {start: digest([tensor[start : start + size] for tensor in split.tensors]) for start in range(0, count, size)}
    kept = Seeded(split, config.task, config.seed, what)
    places = sorted({number * (count - 1) // (_READ - 1) for number in range(_READ)})
    order = reversed(places) if backwards else places
    return {place: digest(read(kept, Batch.of([place], [place]))[0].samples) for place in order}


def read_batch(config: Config, data: Data, step: int, rank: int = 0, size: int = 1) -> list[MicroBatch]:
    """What one rank of `size` trains on in a step without shards, on the CPU."""
    own = config.model_copy(update={"shards": None, "steps": step + 1})  # a run on little data may have fewer
    batch = next(iter(StepSampler(data.train, own, rank, size, step)))
    return read(keep_split(data.train, config, "training", torch.device("cpu")), add_drawn(batch, config, torch.device("cpu")))


def take_step(config: Config, data: Data, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    """Train on one step as the only process does; its loss."""
    micro_batches = read_batch(config, data, step)
    seed_generators(derive_seed(config.seed, "model on rank 0", step))
    optimizer.zero_grad()
    with explaining(config.task.name, f"in step {step + 1}", RunError):
        losses = []
        for micro_batch in micro_batches:
            loss = config.task.losses(model, micro_batch.samples, micro_batch.drawn).sum() / config.batch_size
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
    optimizer.step()
    return torch.stack(losses).sum()


def build(config: Config) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model of a config with its initial weights, ready to be trained on the CPU, and its optimizer."""
    model = build_model(config.task, config.seed).train()
    return model, build_optimizer(model.parameters(), config, "fp32", torch.device("cpu"))


def _look(config: Config, folder: Path, job: Row) -> None:
    """Build the model, read the data, continue from a saved state; and leave the digests of what comes of it."""
    found: dict[str, Any] = {}
    try:  # as weights are read later: with their facts, and without data
        found["shapes"] = list_shapes(build_model(config.task.with_facts(job["facts"]), config.seed))
    except Exception as error:
        found["shapes"] = str(error)
    config, data = load_data(config)
    found["model"] = digest_each(build_model(config.task, config.seed).state_dict())
    found["data"] = digest_data(config, data)
    if (folder / STATE_FILE).exists():
        try:
            model, optimizer = build(config)
            saved = torch.load(folder / STATE_FILE, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            loss = take_step(config, data, model, optimizer, STEPS_BEFORE)
            found["state"] = digest_each({"the loss": loss, **model.state_dict()})
        except Exception as error:
            found["state"] = " ".join(str(error).split())[:500]
    (folder / FOUND_FILE).write_text(json.dumps(found))


def _train(config: Config, folder: Path, job: Row) -> None:
    """Train until `leave` steps are done and the checkpoint of step `saved` is written; then evaluate the initial weights, or be killed."""
    from mnist_dist.loop import train

    def take_turns(batches: Iterable[Batch], state: TrainingState) -> Iterator[Batch]:
        for batch in batches:
            if batch.step == job["leave"]:
                _leave(config, folder, state.group, job)
            yield batch

    train(config, turns=take_turns)


def _leave(config: Config, folder: Path, group: Group, job: Row) -> None:
    checkpoints = Path(config.run_dir) / CHECKPOINTS
    _wait_for(lambda: not job["saved"] or any(checkpoints.glob(f"step_{job['saved']:08d}-*.pt")), f"the checkpoint of step {job['saved']}")
    if job["evaluate"]:
        _evaluate(config, folder, group)
    # One that leaves first would close connections from which another still reads.
    mark = f"left-{job['leave']}"
    (folder / f"{mark}-{group.rank}").touch()
    _wait_for(lambda: len(list(folder.glob(f"{mark}-*"))) == group.size, "the other rank")
    if job["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)


def _evaluate(config: Config, folder: Path, group: Group) -> None:
    config, data = load_data(config)
    if group.size == 1:  # in other batches than two processes, so that sums which depend on them differ
        config = config.model_copy(update={"batch_size": 2 * config.batch_size})
    answer: Row
    try:
        with open_evaluation(data.evaluated, config, group) as reader:
            model = build_model(config.task, config.seed)
            evaluation = evaluate(config, model, reader, group, find_moved(config.task, model, lambda: SampleProbe(data.train, config)))
        answer = {"sums": evaluation.sums, "measures": evaluation.measures, "samples": evaluation.samples}
    except Exception as error:
        answer = {} if is_lost_rank(error) else {"error": str(error)}
    (folder / f"evaluation-{group.rank}.json").write_text(json.dumps(answer))
    if "sums" not in answer:
        os._exit(0)  # the other rank may wait for this one


def _wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > end:
            raise RunError(f"{what} has not come within {_WAIT_S:g} s")
        time.sleep(0.01)


def testify(folder: str, job: Row, environ: dict[str, str], log: str) -> None:
    """Do the job in a process of its own, whose output goes into the file `log`, and end it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Python's own streams may still point elsewhere.
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    # Its own lock is one of the system, and a process that is killed, or leaves at once, would not give it back.
    tqdm.set_lock(threading.RLock())

    def work() -> int:
        config = make_config(read_options_file(Path(folder) / CONFIG_FILE))
        {"look": _look, "train": _train}[job["work"]](config, Path(folder), job)
        return 0

    sys.exit(run_program(work))
