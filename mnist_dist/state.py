"""The state of a training: all that a checkpoint must hold; of the number of processes only what a task needs."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mnist_dist import checkpoint
from mnist_dist.batches import MicroBatch
from mnist_dist.config import Config
from mnist_dist.data import SampleProbe, are_facts, find_other_facts, fingerprint
from mnist_dist.distributed import Group
from mnist_dist.errors import RunError, UserError
from mnist_dist.exchange import Flat, TreeSum
from mnist_dist.machine import describe_arithmetic
from mnist_dist.model import build_model, describe_dtype, describe_order, find_overlaps, find_synchronized, is_finite, sum_bits
from mnist_dist.optimization import build_optimizer, describe_state
from mnist_dist.options import trait
from mnist_dist.randomness import derive_seed, seed_generators
from mnist_dist.record import check_same, check_same_recipe, find_step, is_step_row
from mnist_dist.rendezvous import name_ranks
from mnist_dist.samples import find_immovable
from mnist_dist.source import BUILT_IN, explaining
from mnist_dist.task import Data, Row
from mnist_dist.tier import check_shape, copy_micro_batch, describe_unused, find_tier, keeping, list_hooked, list_state

_log = logging.getLogger(__name__)

_SMALL_NUMBERS = 1 << 18  # in a tensor that is exchanged together with others


class TrainingState:
    """The model and the optimizer, as Accelerate prepared them; the steps done, and the time they took."""

    def __init__(self, config: Config, data: Data, group: Group) -> None:
        self.config = config
        self.data = data
        self.group = group
        self.fingerprint = fingerprint(data.train, config.task)
        self.evaluated_fingerprint = fingerprint(data.evaluated, config.task, "test")
        self.bare_model = build_model(config.task, config.seed)
        self.probe = SampleProbe(data.train, config)
        if group.device.type != "cpu" and (kind := find_immovable(self.probe.whole.samples)):
            raise UserError(f"task {config.task.name}: a batch holds a {kind}, which cannot go to a GPU: give it a method to(device)")
        if group.size > 1 and (name := find_synchronized(self.bare_model)):
            raise UserError(
                f"task {config.task.name}: {name} of its model is SyncBatchNorm, which waits for other processes by itself: use BatchNorm, "
                "with --shards for the same bits on any number of them"
            )
        self.tier = find_tier(config.task, self.bare_model, self.probe)
        parameters = dict(self.bare_model.named_parameters())
        self._trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self.trained = [*self._trained.values()]
        self._frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
        self._moved = [name for name in self.tier.moved if name in parameters]
        self._fixed = {name: frozen for name, frozen in self._frozen.items() if name not in self._moved}
        self._fixed_sums: Tensor | None = None
        self._kinds: list[str] = []  # of the ranks' arithmetic
        self._check_moved()
        self._check_overlaps()
        self._check_ranks()
        if self.tier.unused:
            if group.size > 1 and not config.shards:
                raise UserError(describe_unused(config.task, self.tier.unused))
            _log.warning("%s gets no gradient from the first samples", self.tier.unused[0])
        # What must keep its shape and its type: a checkpoint is of these, and so is what other processes or shards have.
        saved = {*self.bare_model.state_dict()}
        self._forms = {
            name: (value.shape, value.dtype)
            for name, value in self.bare_model.named_buffers()
            if name in saved or group.size > 1 or config.shards
        }
        optimizer = build_optimizer(self.bare_model.parameters(), config, group.precision, group.device)
        self.tree: TreeSum | None = None
        if config.shards:
            self._prepare_shards(config.shards, optimizer)
        else:
            self._prepare_ddp(optimizer)
        self._hand_out(self.bare_model.buffers(), 0)
        if config.cuda_graph:
            if not self.tier.is_any_world:
                raise UserError(
                    f"cuda_graph would replay the same random numbers, or count statistics twice ({self.tier.reason}): leave it out"
                )
            # Accelerate's wrapper asks at each step whether it may step, which a graph cannot record.
            self.optimizer = optimizer
            _log.info("the optimizer is stepped without Accelerate's wrapper, which a CUDA graph cannot record")
        self.step = 0
        self.is_settled = True  # nothing is amid its change: the row of this step, if it has one, is in the record, or unfinished
        self._versions: dict[str, tuple[int, int]] | None = None  # of what a pass may change, before the one that is not finished
        self.unfinished: Row | None = None  # the row of this step, while what it tells of an evaluation is not known
        self._gradient_norm: Tensor | None = None  # of the last step, before it was clipped
        self._start_s = time.perf_counter()

    def _prepare_shards(self, shards: int, optimizer: torch.optim.Optimizer) -> None:
        """Let gradients be added up along the tree, not by DDP."""
        accelerator = self.group.accelerator
        self.tree = TreeSum(shards, self.group)
        # Told what is to be placed, Accelerate does not import torch's distributed tensors to find out, which takes half a second.
        self.model = accelerator.prepare_model(self.bare_model, device_placement=True, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        moving = {name: _as_real(value) for name, value in self._list_moving().items()}
        averaged = {name: value for name, value in moving.items() if value.is_floating_point()}
        self.averaged = list(averaged)
        self.flat = Flat(self.trained, extra=1)
        self.flat_averaged = Flat([*averaged.values()], dtype=torch.float64)
        self._hand_out(self.bare_model.parameters(), 0)  # as DDP does

    def _prepare_ddp(self, optimizer: torch.optim.Optimizer) -> None:
        """Let DDP average the gradients."""
        # It would hand out the buffers of rank zero at each call of the model, and one rank may call it more often than another. Nor does
        # it know all types.
        names = [name for name, _ in self.bare_model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.bare_model, names)  # type: ignore[no-untyped-call]
        self.model, self.optimizer = self.group.accelerator.prepare(self.bare_model, optimizer, device_placement=[True, False])
        self._reached: set[str] = set()  # by a backward pass
        if self.group.size > 1:
            for name, parameter in self._trained.items():
                parameter.register_post_accumulate_grad_hook(partial(_note, self._reached, name))  # type: ignore[no-untyped-call]

    def prepare_first_step(self) -> None:
        """Let DDP lay out its buckets for good, by a backward pass whose gradients are dropped; and note what is to stay the same.

        DDP lays them out anew after the first backward pass of every start, in the order in which the gradients came. Where a number lies
        decides in which order three ranks or more add it up, so without this the first step of each start would round differently.

        What stays the same is the frozen weights, and on which kinds of processors the ranks compute: for `check_weights`.
        """
        if self._fixed and (self.tree is not None or self.group.size > 1):
            self._fixed_sums = sum_bits(self._fixed.values())
        # The optimizer is stepped on each rank, and different processors may round it differently.
        self._kinds = self.group.gather(describe_arithmetic(self.group.device))
        if self.model is not self.bare_model:
            micro_batch = send_to_device(copy_micro_batch(self.probe.whole), self.group.device)
            name = self.config.task.name
            with keeping(self.bare_model, self._moved), explaining(name, "in a first pass of several processes", RunError):
                self._compute_losses(self.model, micro_batch).sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.zero_grad()

    def train_on(self, parts: Sequence[Sequence[MicroBatch]], note_forward: Callable[[], None]) -> Tensor:
        """All that the device does in a step, on this rank's parts of the global batch; a loss whose mean over the ranks is the batch's.

        The losses of all samples are added up and divided by the size of the global batch, however many samples a rank has, and however
        many of them it computes at once.
        """
        self._versions = versions = self._read_versions()
        loss = self._add_gradients(parts[0], note_forward) if self.tree is None else self._add_up(self.tree, parts, note_forward)
        if self.tree is not None or self.group.size > 1:
            self._check_still(versions)
        if self.config.clip_norm is not None:
            self._gradient_norm = self.group.accelerator.clip_grad_norm_(self.bare_model.parameters(), self.config.clip_norm)
        self.unsettle()
        self.optimizer.step()
        return loss

    def unsettle(self) -> None:
        """Note that what comes changes the state: until the row of the step is in the record, it is not to be saved."""
        self.is_settled, self._versions = False, None

    @property
    def is_whole(self) -> bool:
        """Whether a checkpoint may hold the state as it is, even where a step has failed: before it changed anything."""
        return self.is_settled and self._versions in (None, self._read_versions())

    def _read_versions(self) -> dict[str, tuple[int, int]]:
        """Which tensor each buffer and each parameter is, and how often it was changed."""
        changing = self._list_moving() | self._frozen | self._trained
        return {name: (id(tensor), tensor._version) for name, tensor in changing.items()}

    def _add_gradients(self, micro_batches: Sequence[MicroBatch], note_forward: Callable[[], None]) -> Tensor:
        """Leave the gradients of the global batch, by DDP's mean over the ranks."""
        accelerator, losses = self.group.accelerator, []
        self.optimizer.zero_grad()
        self._hand_out(self._list_moving().values(), 0)
        self._seed(f"model on rank {self.group.rank}")
        for number, micro_batch in enumerate(micro_batches, start=1):
            # Gradients are exchanged with the last micro-batch, once.
            with contextlib.nullcontext() if number == len(micro_batches) else accelerator.no_sync(self.model):
                loss = self._compute_losses(self.model, micro_batch).sum() * (self.group.size / self.config.batch_size)
                if number == len(micro_batches):
                    note_forward()
                self._reached.clear()
                if loss.requires_grad:  # else its samples reach no parameter
                    accelerator.backward(loss)
            losses.append(loss.detach())
        if self.group.size > 1:
            self._check_gradients()
        else:
            for parameter in self.trained:
                if parameter.grad is None:  # as in a shard: the optimizer then has a state of each
                    parameter.grad = torch.zeros_like(parameter)
        self._check_forms()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _check_gradients(self) -> None:
        """Raise `UserError` where a parameter got no gradient from the last micro-batch: DDP on the other ranks waits for it."""
        for name, parameter in self.bare_model.named_parameters():
            if parameter.requires_grad and name not in self._reached:
                samples = f"the {'last ' if self.config.micro_batch else ''}samples of rank {self.group.rank}"
                raise UserError(
                    f"task {self.config.task.name}: {name} gets no gradient from {samples} in step {self.step + 1}, and the other "
                    "processes wait for it: use it in each step, or train with --shards, where a missing gradient is zero"
                )

    def _compute_losses(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        losses = self.config.task.losses(model, micro_batch.samples, micro_batch.drawn)
        check_shape(self.config.task, losses, micro_batch.size)
        self._check_trained()
        return losses if losses.dtype == torch.float64 else losses.float()  # a sum of bfloat16 depends on how many are added

    def compute_gradients(self, micro_batches: Iterable[MicroBatch], size: int) -> tuple[list[Tensor], Tensor]:
        """The gradients of all losses, added up and divided by `size`, for all that is trained; and that loss. No rank waits."""
        gradients: list[Tensor] = []
        losses = []
        for micro_batch in micro_batches:
            loss = self._compute_losses(self.bare_model, micro_batch).sum() / size
            # Of samples that reach no parameter there is nothing to go back through.
            found: Sequence[Tensor] = [torch.zeros_like(parameter) for parameter in self.trained]
            if loss.requires_grad:
                found = torch.autograd.grad(loss, self.trained, materialize_grads=True)
            # Not in place: the gradients of two parameters that are added up are one tensor.
            gradients = [one + other for one, other in zip(gradients, found, strict=True)] if gradients else list(found)
            losses.append(loss.detach())
        return gradients, torch.stack(losses).sum()

    def _add_up(self, tree: TreeSum, parts: Sequence[Sequence[MicroBatch]], note_forward: Callable[[], None]) -> Tensor:
        """Leave the gradients of the global batch, and the mean statistics of its shards, added up along the tree."""
        starts = {name: value.clone() for name, value in self._list_moving().items()}

        def compute(shard: int) -> list[Tensor]:
            with torch.no_grad():  # each shard begins with the same statistics
                for name, value in self._list_moving().items():
                    value.copy_(starts[name])
            self._seed(f"model on shard {shard}")
            gradients, loss = self.compute_gradients(parts[shard - tree.mine[0]], self.config.batch_size)
            self._check_forms()
            if shard == tree.mine[1] - 1:
                note_forward()  # what comes now waits for the other ranks
            now = self._list_moving()
            # Each a part of the mean: the sum of large numbers would overflow.
            shares = [_as_real(now[name]).double() / tree.shards for name in self.averaged]
            statistics = [self.flat_averaged.pack(shares)] if shares else []
            return [self.flat.pack(gradients, [loss]), *statistics]

        with self._undoing(starts):
            total, *statistics = tree(compute)
            for parameter, gradient in zip(self.trained, self.flat.views(total), strict=True):
                parameter.grad = gradient
            now = self._list_moving()
            for vector in statistics:
                for name, mean in zip(self.averaged, self.flat_averaged.views(vector), strict=True):
                    self._set_mean(tree, _as_real(now[name]), _as_real(starts[name]), mean)
            # What counts is not averaged: the last shard's counts are everybody's.
            self._hand_out([value for name, value in now.items() if name not in self.averaged], self.group.size - 1)
        return total[-1].clone()  # a view of it would keep all gradients of this step until the row that the loss goes into

    @contextlib.contextmanager
    def _undoing(self, starts: dict[str, Tensor]) -> Iterator[None]:
        """Where a pass or the exchange fails, put back what the passes have moved: the state is as before the step, and can be saved."""
        try:
            yield
        except Exception:
            now = self._list_moving()
            if all(name in starts and value.shape == starts[name].shape for name, value in now.items()):
                with torch.no_grad():
                    for name, value in now.items():
                        value.copy_(starts[name])
                self._versions = self._read_versions()
            raise

    @torch.no_grad()
    def _set_mean(self, tree: TreeSum, value: Tensor, start: Tensor, mean: Tensor) -> None:
        """Set a buffer to the mean of its shards' values; one that none of them has moved keeps its value, to the last bit."""
        # Of shorter numbers a mean in float64 is exact enough to come back as they were.
        value.copy_(torch.where(mean == tree.repeat(start / tree.shards), start, mean) if start.dtype == torch.float64 else mean)

    def _list_moving(self) -> dict[str, Tensor]:
        """What a forward pass may change: the buffers, and parameters that it moves."""
        return dict(self.bare_model.named_buffers()) | {name: self.bare_model.get_parameter(name) for name in self._moved}

    def _check_trained(self) -> None:
        """Raise `UserError` where a pass has frozen what was trained, or the other way round: the optimizer would not notice."""
        stopped = [name for name, parameter in self._trained.items() if not parameter.requires_grad]
        begun = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        if stopped or begun:
            name, verbs = (stopped[0], "is no longer") if stopped else (begun[0], "begins to be")
            raise UserError(
                f"task {self.config.task.name}: in step {self.step + 1} {name} {verbs} trained; what is trained must be the same in all "
                "steps, or no checkpoint would fit: call requires_grad_ in build_model alone, and detach() what must not be trained yet"
            )

    def _check_still(self, versions: dict[str, tuple[int, int]]) -> None:
        """Raise `UserError` where a parameter has moved that did not in the first passes, by what was counted before this step."""
        for name, parameter in [*self._fixed.items(), *self._trained.items()]:
            if parameter._version != versions[name][1] and name not in self.tier.written:
                self._refuse_late(f"the forward pass of step {self.step + 1} changes", name)

    def _refuse_late(self, change: str, name: str) -> NoReturn:
        kind, advice = "nobody trains", "let it change from the first pass on, keep it in a buffer (register_buffer)"
        if name in self._trained:
            kind, advice = "is trained, too", "let the optimizer alone change it"
        raise UserError(
            f"task {self.config.task.name}: {change} {name}, which {kind}, and the first passes did not: each process or shard would "
            f"change its own; {advice}, or train on one process, without shards"
        )

    def check_weights(self) -> None:
        """Raise `UserError` where a pass has changed what is frozen, and `RunError` where ranks of one kind have different weights.

        All ranks call it alike. What was noticed here was done since the last call, and is not to be saved.
        """
        if self._fixed_sums is not None:
            same = (sum_bits(self._fixed.values()) == self._fixed_sums).tolist()
            if not all(same):
                self.unsettle()
                self._refuse_late(f"by step {self.step} a forward pass has changed", [*self._fixed][same.index(False)])
        if self.group.size == 1:
            return
        sums = self.group.gather_rows(sum_bits(self.trained))  # [world_size, parameters]
        for kind in dict.fromkeys(self._kinds):
            alike = [rank for rank, own in enumerate(self._kinds) if own == kind]
            odd = sums[alike] != sums[alike].mode(dim=0).values
            if not odd.any():
                continue
            self.unsettle()
            ranks = [alike[place] for place in odd.any(dim=1).nonzero().flatten().tolist()] if len(alike) > 2 else alike
            name = [*self._trained][int(odd.any(dim=0).nonzero()[0])]
            who = f"{name_ranks(ranks)} {'have' if len(ranks) > 1 else 'has'}"
            raise RunError(
                f"by step {self.step} {who} different weights ({name} first), though all had the same gradients: code changes weights by "
                "itself, or a processor or a memory errs; `python -m mnist_dist.check` looks for the one, `python -m mnist_dist.verify` "
                "for the other"
            )

    def _check_forms(self) -> None:
        """Raise `UserError` where a pass has given a buffer another shape or type."""
        for name, value in self.bare_model.named_buffers() if self._forms else ():
            shape, kind = self._forms.get(name, (value.shape, value.dtype))
            if value.dtype != kind:
                raise UserError(
                    f"task {self.config.task.name}: in step {self.step + 1} the buffer {name} becomes {describe_dtype(value.dtype)}, and "
                    f"was {describe_dtype(kind)}: change it in place (copy_, mul_, add_), which keeps it"
                )
            if value.shape != shape:
                raise UserError(
                    f"task {self.config.task.name}: in step {self.step + 1} the buffer {name} becomes {list(value.shape)}, and was "
                    f"{list(shape)}: make it as large from the start as it may become, or keep what only grows out of the state "
                    "(persistent=False) and train on one process, without shards"
                )

    def _check_moved(self) -> None:
        """Raise `UserError` where a pass changes what is trained, or its gradient, and several processes or shards would differ."""
        if lost := [name for name in self.tier.moved if name not in self.bare_model.state_dict()]:
            _log.warning(
                "each forward pass changes %s, which is in no checkpoint: a resumed run begins with it afresh, and each process has one",
                lost[0],
            )
        if not (self.group.size > 1 or self.config.shards):
            return
        if hooked := list_hooked(self.bare_model):
            raise UserError(
                f"task {self.config.task.name}: {hooked[0]} has a hook for its gradient once it is added up, which would be called before "
                "that of all processes or shards is, or not at all: clip with --clip_norm, use register_hook, which is called for each "
                "part, or train on one process, without shards"
            )
        if trained := [name for name in self._moved if name in self._trained]:
            raise UserError(
                f"task {self.config.task.name}: a forward pass changes {trained[0]} itself, which is trained, too: each process or shard "
                "would change its own by its own samples; train on one process, without shards"
            )

    def _check_overlaps(self) -> None:
        """Raise `UserError` where a forward pass changes buffers that share memory: on a GPU, or on several processes, they do not."""
        for pair in find_overlaps(self.bare_model):
            if {*pair} & {*self.tier.moved}:
                raise UserError(
                    f"task {self.config.task.name}: {' and '.join(pair)} of its model share memory, and each forward pass changes them: on "
                    "a GPU, or on several processes, each would get its own; keep one of them"
                )

    def _check_ranks(self) -> None:
        """Raise `UserError` on all ranks where some have a model of other shapes: DDP could not be set up."""
        frozen = {f"{name}, which nobody trains,": list(self._frozen[name].shape) for name in self._frozen}
        shapes = _shapes({**list_state(self.bare_model), **self.bare_model.state_dict()}) | frozen
        main = self.group.broadcast(shapes)
        same = [*main.items()] == [*shapes.items()]
        if odd := [rank for rank, same in enumerate(self.group.gather(same)) if not same]:
            what, words = self.config.task.name, f"rank zero has another model than {name_ranks(odd)}"
            if main == shapes:
                raise UserError(f"task {what}: {words}: {describe_order(main, shapes)}")
            name = next((name for name in {**main, **shapes} if main.get(name) != shapes.get(name)), "")
            raise UserError(
                f"task {what}: {words}"
                + (f" ({name} is {main.get(name, 'not there')} there, and {shapes.get(name, 'not there')} here)" if name else "")
                + ": give all hosts the same code and data"
            )

    def _seed(self, purpose: str) -> None:
        """Seed what the model draws in the pass that comes: a function of (seed, step) and the rank or the shard."""
        if not self.config.cuda_graph:  # which is for models that draw nothing
            seed_generators(derive_seed(self.config.seed, purpose, self.step), self.group.device)

    @property
    def is_any_world(self) -> bool:
        """Whether the number of processes may change between two starts."""
        return self.tier.is_any_world or self.tree is not None

    def share_buffers(self) -> None:
        """Give every rank the buffers of rank zero, such as the statistics of BatchNorm, which each rank counts on its own samples."""
        if self.tree is None:
            self._hand_out(self._list_moving().values(), 0)

    def _hand_out(self, tensors: Iterable[Tensor], rank: int) -> None:
        """Give every rank the tensors of one, as bytes: no backend knows all types. Small ones of a type go at once."""
        together: dict[Any, list[Tensor]] = {}
        for tensor in tensors if self.group.size > 1 else ():
            key = tensor.dtype if tensor.numel() <= _SMALL_NUMBERS else id(tensor)
            together.setdefault(key, []).append(tensor.detach())  # autograd need not know of this
        for some in together.values():
            flat = Flat(some, dtype=some[0].dtype)
            vector = flat.pack(some)
            torch.distributed.broadcast(vector.view(torch.uint8), src=rank)
            for tensor, value in zip(some, flat.views(vector), strict=True) if self.group.rank != rank else ():
                tensor.copy_(value)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, those of earlier starts included."""
        return time.perf_counter() - self._start_s

    def gradient_norm(self) -> float:
        """The 2-norm of the last step's gradient of the global batch, the same on every rank."""
        if self._gradient_norm is not None:
            return self._gradient_norm.item()
        gradients = [parameter.grad for parameter in self.bare_model.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def count_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained)

    def count_bytes(self) -> int:
        """The size of the model in memory, and a KB for each of its tensors: what a file says of one."""
        return sum(tensor.nbytes + 1024 for tensor in self.bare_model.state_dict().values())

    def copy(self, rows: Sequence[int]) -> dict[str, Any]:
        """The state as a checkpoint holds it, on the CPU, which also promises that metrics.jsonl has a row for each step of `rows`.

        All that the training waits for: what follows (its bytes, their hash, the disk) is done with the copy.
        """
        return {
            "step": self.step,
            "recipe": self.config.recipe(),
            "data": self.fingerprint,
            "evaluated": self.evaluated_fingerprint,
            "trained": [*self._trained],
            "facts": self.config.task.facts,
            "elapsed_s": self.elapsed_s,
            "rows": torch.tensor(rows, dtype=torch.int64),
            "unfinished": self.unfinished,
            "world": None if self.tier.is_any_world else self._describe_world(),
            "model": _copy(self.bare_model.state_dict()),
            "optimizer": _copy(self.optimizer.state_dict()),
        }

    def _describe_world(self) -> str:
        micro_batch = self.config.micro_batch
        size = self.group.size
        processes = "any number of processes" if self.tree is not None else f"{size} process{'es' * (size > 1)}"
        return processes + (f", micro_batch {micro_batch}" if micro_batch else "")

    def restore(self, saved: checkpoint.Saved) -> list[int]:
        """Take over the state of a checkpoint; the steps of the rows that metrics.jsonl must have.

        Raises `UserError` for a checkpoint of another recipe, model or data set, `RunError` for one that this program cannot have written.
        """
        try:
            return self._restore(checkpoint.decode(saved.content), find_step(saved.path))
        except (UserError, RunError) as error:
            raise type(error)(f"checkpoint {saved.path}: {error}") from error

    def _restore(self, state: dict[str, Any], named_step: int) -> list[int]:
        self._check_run(state)
        self._check_world(state.get("world"))
        self._check_numbers(state)
        step, elapsed_s = _read_field(state, "step", int), _read_field(state, "elapsed_s", float)
        if step != named_step or not 1 <= step <= self.config.total_steps:
            raise RunError(f"it is damaged: its step is {step}, its name says {named_step}, and the run has {self.config.total_steps}")
        if not 0 <= elapsed_s < math.inf:
            raise RunError(f"it is damaged: its elapsed_s is {elapsed_s}")
        rows = _read_rows(state, step)
        unfinished = state.get("unfinished")  # older versions finished each evaluation
        if unfinished is not None and (not is_step_row(unfinished) or unfinished["step"] != step or step in rows):
            raise RunError(f"it is damaged: its unfinished row is not the one of step {step}")
        evaluated = _read_field({"evaluated": self.evaluated_fingerprint} | state, "evaluated", str)  # older versions noted none
        if evaluated != self.evaluated_fingerprint:
            _log.warning(
                "the %s data are others than those of the checkpoint: measures before and after step %d cannot be compared",
                self.config.evaluated_on,
                step,
            )
        self.bare_model.load_state_dict(state["model"])
        # Its settings follow from the config and the machine; those in the checkpoint may be of another machine.
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
        self.step, self.unfinished = step, unfinished
        self._start_s = time.perf_counter() - elapsed_s
        return rows

    def _check_run(self, state: dict[str, Any]) -> None:
        """Raise `UserError` for a checkpoint of another recipe, model or data set."""
        # Options that came later had no say in an older run: their defaults do what it did.
        stored = _read_field(state, "recipe", dict)
        if not all(isinstance(name, str) and isinstance(value, str | int | float | None) for name, value in stored.items()):
            raise RunError("it is damaged: its recipe is not a list of options")
        defaults = {name: field.default for name, field in self.config.fields().items() if trait(field, "recipe")}
        recipe = {"task": BUILT_IN} | defaults | stored
        check_same_recipe(recipe, self.config.recipe(), "it is of another run; use another run_dir, or the same options:")
        model = _shapes(_read_field(state, "model", dict))
        here = _shapes(self.bare_model.state_dict())
        check_same(model, here, "it is of another model; use another run_dir:")
        if [*model] != [*here]:
            raise UserError(f"it is of another model; {describe_order(model, here)}")
        trained = state.get("trained", [*self._trained])  # older versions noted none of these
        if not isinstance(trained, list) or not all(isinstance(name, str) for name in trained):
            raise RunError("it is damaged: its list of what is trained is none of names")
        there, now = ({name[:80]: "trained" for name in names} for names in (trained, self._trained))
        check_same(there, now, "it is of a run that trains other parameters; use another run_dir, or the same code:")
        check_same(
            {"data": _read_field(state, "data", str)},
            {"data": self.fingerprint},
            "it was trained on other data; use another run_dir, or the same data:",
        )
        facts = state.get("facts", self.config.task.facts)  # older versions kept none
        if not are_facts(facts):
            raise RunError("it is damaged: its facts are not plain values")
        if differing := find_other_facts(facts, self.config.task.facts):
            raise UserError(
                f"it was trained on other data: its facts were others ({', '.join(differing)}); use another run_dir, or the same data (a "
                "set of words has another order in each process: sort it)"
            )

    def _check_world(self, world: Any) -> None:
        """Raise `UserError` for a checkpoint of another number of processes, where a step depends on that."""
        if world is not None and not isinstance(world, str):
            raise RunError("it is damaged: its world is not a text")
        if self.tier.is_any_world or world in (None, self._describe_world()):
            return
        made, now, advice = str(world)[:80], self._describe_world(), "start as many"
        if self.tree is not None:  # on any number of processes
            made, now = (one.partition(", ")[2] or "no micro_batch" for one in (made, now))
            advice = "use the same micro_batch" if "," in str(world) else "leave micro_batch out"
        elif "micro_batch" in made + now:
            made, now = (one if "micro_batch" in one else f"{one}, without micro_batch" for one in (made, now))
            advice = "start as many with the same micro_batch"
        raise UserError(
            f"it was made with {made}, and this start has {now}; a step of this task is the same only there, because {self.tier.reason}: "
            f"{advice}, or use another run_dir"
        )

    def _check_numbers(self, state: dict[str, Any]) -> None:
        """Raise `RunError` unless model and optimizer are complete, in finite numbers of their kinds."""
        slots = {
            f"{index!r}/{name}": value
            for index, tensors in _read_field(_read_field(state, "optimizer", dict), "state", dict).items()
            for name, value in (tensors if isinstance(tensors, dict) else {"": None}).items()
        }
        expected = describe_state(self.bare_model.parameters(), self.config)
        check_same(_shapes(slots), expected, "it is damaged, its optimizer's state is not complete:")
        kinds = {name: tensor.dtype for name, tensor in self.bare_model.state_dict().items()}
        for name, tensor in [*state["model"].items(), *slots.items()]:
            kind = kinds.get(name, torch.float32)
            if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype != kind or not is_finite(tensor):
                raise RunError(f"it is damaged: {name} holds values that are not finite {describe_dtype(kind)} numbers")


def _read_rows(state: dict[str, Any], step: int) -> list[int]:
    """The steps whose rows metrics.jsonl must have. Raises `RunError` where they are none."""
    rows = state.get("rows", torch.tensor([], dtype=torch.int64))
    if not isinstance(rows, Tensor) or rows.is_meta or rows.layout != torch.strided or rows.dtype != torch.int64 or rows.ndim != 1:
        raise RunError("it is damaged: its rows are not a list of steps")
    if len(rows) > step or (len(rows) and (rows[0] < 1 or rows[-1] > step or bool((rows.diff() <= 0).any()))):
        raise RunError(f"it is damaged: its rows are not rising steps from 1 to {step}")
    return [int(row) for row in rows.tolist()]


def _note(reached: set[str], name: str, _: Tensor) -> None:
    reached.add(name)


def _as_real(tensor: Tensor) -> Tensor:
    """The tensor, or the parts of its complex numbers, as a view."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copy(part) for name, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, list) else value


def _read_field(state: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
        raise RunError(f"it is damaged: its {name} is missing or not of the kind {kind.__name__}")
    return state[name]


def _shapes(tensors: dict[str, Any]) -> dict[str, Any]:
    return {str(name)[:80]: list(tensor.shape) if isinstance(tensor, Tensor) else "no tensor" for name, tensor in tensors.items()}
