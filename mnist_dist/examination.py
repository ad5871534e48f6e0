"""A task under examination by `python -m mnist_dist.check`: its data, its model, and the processes that look at it or train it."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Collection
from functools import cached_property
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mnist_dist import checkpoint
from mnist_dist.batches import MicroBatch
from mnist_dist.config import Config
from mnist_dist.data import SampleProbe, load_data
from mnist_dist.model import build_model
from mnist_dist.preemption import deferring_signals
from mnist_dist.randomness import seed_generators
from mnist_dist.record import CHECKPOINTS, CONFIG_FILE, METRICS_FILE
from mnist_dist.source import describe_exception
from mnist_dist.starter import find_free_port
from mnist_dist.task import Row
from mnist_dist.tier import Tier, Trace, find_tier, keeping, trace
from mnist_dist.witness import FOUND_FILE, RUN, STATE_FILE, STEPS_BEFORE, build, digest, digest_each, read_batch, take_step, testify
from mnist_dist.world import World, list_inherited

STEPS = 5  # of a short run
_ROWS = 16  # samples of a step that is only looked at
_EVALUATED = 101  # samples: two processes do not have equally many
_CLEANUP_S = 5.0
_PATH_MAX = 60  # of TMPDIR, below which a socket is made in it
# A server that has imported torch, and nothing of the task: each process is forked from it in milliseconds.
_context = multiprocessing.get_context("forkserver")


class Broken(Exception):  # noqa: N818  not an error of this program
    """A promise that is not kept, and what to do."""


def _start_server() -> None:
    """Start the process from which the others are forked. It listens at a path of at most a hundred letters: a TMPDIR may have more."""
    before = tempfile.tempdir
    if len(tempfile.gettempdir()) > _PATH_MAX:
        tempfile.tempdir = "/tmp"  # noqa: S108  a folder of its own is made in it
    try:
        ensure_running()
    finally:
        tempfile.tempdir = before


class Subject:
    """The task under examination, with its data and its model, and the processes that look at it, too."""

    def __init__(self, config: Config, folder: Path, deadline_s: float, stack: contextlib.ExitStack, names: Collection[str]) -> None:
        _context.set_forkserver_preload(["mnist_dist.loop", "mnist_dist.witness", "mnist_dist.frozen"])
        _start_server()
        self.given, self.folder, self.deadline_s, self.stack = config, folder, deadline_s, stack
        self.config, self.data = load_data(config)
        self.task = self.config.task
        self.model = build_model(self.task, config.seed)
        self._kept = stack.enter_context(keeping(self.model))
        self.probe = SampleProbe(self.data.train, self.config)
        # For steps that are only looked at.
        few = {"batch_size": min(config.batch_size, _ROWS), "micro_batch": None}
        self.small = self.config.model_copy(update=few)
        self.state: dict[str, str] | str = {}  # after some steps, in digests; or why there is none
        self.changed: list[str] = []
        self._runs: dict[str, Ranks] = {}
        if {*names} & {"model", "data", "state"}:
            (folder / "witness").mkdir()
            if "state" in names:
                self._prepare_state(folder / "witness" / STATE_FILE)
            self.run("witness", 1, config.model_copy(update=few), work="look", facts=self.task.facts)

    def _prepare_state(self, file: Path) -> None:
        """Train some steps, save the state, and train one more, which another process must repeat."""
        try:
            model, optimizer = build(self.small)
            for step in range(STEPS_BEFORE):
                take_step(self.small, self.data, model, optimizer, step)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            before = _list_attributes(model)
            loss = take_step(self.small, self.data, model, optimizer, STEPS_BEFORE)
            after = _list_attributes(model)
            self.state = digest_each({"the loss": loss, **model.state_dict()})
            self.changed = sorted(name for name in after if after[name] != before.get(name))
        except Exception as error:
            self.state = str(error) or describe_exception(error)

    @cached_property
    def tier(self) -> Tier:
        """On how many processes a step is the same. Raises `UserError` where every run would refuse the task."""
        return find_tier(self.task, self.model, self.probe)

    @cached_property
    def found(self) -> Row:
        """What the other process found."""
        witness = self._runs["witness"]
        witness.wait()
        return json.loads((witness.folder / FOUND_FILE).read_text())

    def trace(self, micro_batch: MicroBatch) -> Trace:
        """One pass of the losses under a fixed seed, from the initial parameters and buffers."""
        self.put_back()
        seed_generators(0)
        return trace(self.task, self.model, micro_batch)

    def put_back(self) -> None:
        """Give the model its initial parameters and buffers."""
        self._kept.put_back()

    def run(self, name: str, size: int, config: Config, **job: Any) -> "Ranks":
        """The processes `name`, started at the first call; they end with this examination."""
        if name not in self._runs:
            ranks = self._runs[name] = Ranks(self.folder / name.split()[0], config, size, self.deadline_s, job)
            self.stack.callback(ranks.end)
            ranks.start()
        return self._runs[name]

    def train(self, name: str, size: int, saved: int = STEPS, leave: int = STEPS, kill: bool = False) -> "Ranks":
        """A short run on `size` processes, which ends after `leave` steps."""
        config = self.given.replace(**self.recipe, run_dir=str(self.folder / name.split()[0] / RUN), checkpoint_every=saved or STEPS)
        return self.run(name, size, config, work="train", saved=saved, leave=leave, kill=kill, evaluate=name in ("one", "two"))

    def train_on_one(self) -> "Ranks":
        """The run of one process. Where nobody compares its steps with those of two, it makes none."""
        steps = STEPS if self.tier.is_any_world or self.config.shards else 0
        return self.train("one", 1, steps, steps)

    def train_on_two(self) -> "Ranks":
        """The run of two processes. Raises `UserError` as `tier` does."""
        _ = self.tier
        return self.train("two", 2)

    @cached_property
    def recipe(self) -> Row:
        """The options of a short run: plain SGD, whose steps move the weights by a few thousandths of their length in all."""
        [micro_batch] = read_batch(self.small, self.data, 0)
        with keeping(self.model):
            loss = self.trace(micro_batch).losses.mean()
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            gradients = [one for one in torch.autograd.grad(loss, parameters, allow_unused=True) if one is not None]
        length, slope = (float(torch.nn.utils.get_total_norm([one.detach() for one in many])) for many in (parameters, gradients))
        rate = min(max(0.0002 * length / slope, 1e-9), 1.0) if length and slope else 0.003
        count = min(self.config.test_size or _EVALUATED, len(self.data.test), _EVALUATED)  # type: ignore[arg-type]
        return {
            "optimizer": "sgd",
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 0.0,
            "learning_rate": float(f"{rate:.3g}"),
            "schedule": "constant",
            "steps": STEPS + 1,
            "log_every": 1,
            "evaluate_every": 10**9,
            "checkpoint_every_s": 0.0,
            "report": False,
            "wandb": "disabled",
            "log_with": None,
            "device": "cpu",
            "precision": "fp32",
            "threads": 1,
            **({} if self.config.holdout else {"test_size": count}),
        }


def _list_attributes(model: nn.Module) -> dict[str, str]:
    """The digest of each attribute and buffer of a model that its state_dict does not hold."""
    # Lists of parameters, such as an LSTM keeps, are the parameters over again.
    usual = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        found |= {f"the attribute {key} of {where}": digest(value) for key, value in vars(module).items() if key not in usual}
        found |= {f"the buffer {key} of {where}": digest(module._buffers[key]) for key in module._non_persistent_buffers_set}
    return found


class Ranks:
    """Processes started by this one: the ranks of a run, or one that looks at a task."""

    def __init__(self, folder: Path, config: Config, size: int, deadline_s: float, job: Row) -> None:
        self.folder, self.size, self.deadline_s, self.job = folder, size, deadline_s, job
        folder.mkdir(exist_ok=True)
        (folder / CONFIG_FILE).write_text(config.to_yaml())
        self.end_s = math.inf
        self.logs = [folder / f"{job['work']}{job.get('leave', '')}-{rank}.log" for rank in range(size)]
        self.processes: list[BaseProcess] = []

    def start(self) -> None:
        """Start them."""
        inherited = list_inherited(os.environ)
        environ = {name: value for name, value in os.environ.items() if name not in inherited}
        port = find_free_port()
        self.end_s = time.monotonic() + self.deadline_s
        for rank, log in enumerate(self.logs):
            variables = World(rank, self.size, rank, self.size, port=port).variables() if self.size > 1 else {}
            arguments = (str(self.folder), self.job, environ | variables, str(log))
            process = _context.Process(target=testify, args=arguments)
            with deferring_signals():
                process.start()
                self.processes.append(process)

    def wait(self) -> None:
        """Wait until they have done their work. Raises `Broken` where they do not."""
        expected = -signal.SIGKILL if self.job.get("kill") else 0
        while any(process.exitcode is None for process in self.processes):
            if any(process.exitcode not in (None, expected) for process in self.processes):
                self.end_s = min(self.end_s, time.monotonic() + _CLEANUP_S)
            if time.monotonic() > self.end_s:
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in self.processes]
        self.end()
        who = "another process" if self.size == 1 else f"a run of {self.size} processes"
        if any(code not in (None, expected) for code in codes):
            raise Broken(f"{who} failed: {self._find_reason()}")
        if None in codes:
            raise Broken(
                f"{who} gave no answer within {self.deadline_s:g} s (--deadline_s): does it wait for something? {self._find_reason()}"
            )

    def _find_reason(self) -> str:
        texts = [log.read_text(errors="replace").strip().splitlines() for log in self.logs]
        errors = [line.partition("error: ")[2] for lines in texts for line in lines if "error: " in line]
        last = [lines[-1] for lines in texts if lines]
        return (errors or [f"its last words: {last[0]}" if last else "it said nothing"])[0][:1000]

    def end(self) -> None:
        """End those that are still running."""
        for process in self.processes:
            process.kill()
            process.join()

    @cached_property
    def state(self) -> Row:
        """The checkpoint with which the run ended."""
        self.wait()
        (path,) = (self.folder / RUN / CHECKPOINTS).glob(f"step_{STEPS:08d}-*.pt")
        return checkpoint.decode(path.read_bytes())

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        self.wait()
        return [json.loads(line)["train/loss"] for line in (self.folder / RUN / METRICS_FILE).read_text().splitlines()]

    @cached_property
    def evaluation(self) -> Row:
        """What the ranks counted on the initial weights."""
        self.wait()
        answers = [json.loads(path.read_text()) for path in sorted(self.folder.glob("evaluation-*.json"))]
        return next((answer for answer in answers if "error" in answer), answers[0])
