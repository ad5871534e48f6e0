"""The Accelerator that joins this process to the others of its world, and what the processes say to each other."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, DynamoBackend, InitProcessGroupKwargs, patch_environment
from torch import distributed as dist

from mnist_dist.config import Config
from mnist_dist.errors import RunError, UserError, is_loss
from mnist_dist.machine import check_graph, choose_device, choose_precision, choose_threads, keep_memory
from mnist_dist.world import World

T = TypeVar("T")

_CAUSE = "cause"
_READING_S = 2.0


class Group:
    """The processes of one run, once they have found each other."""

    def __init__(self, accelerator: Accelerator, precision: str, world: World, timeout: timedelta) -> None:
        self.accelerator = accelerator
        self.precision = precision
        self.rank = accelerator.process_index
        self.size = accelerator.num_processes
        self.device = accelerator.device
        self.timeout = timeout
        # Small messages of the hosts (what to resume, whether to stop) go beside the GPUs' traffic and never wait for it.
        self.control: Any = dist.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None
        # The board on which a rank that fails leaves its reason. The server is the one that the ranks met at.
        self._board: Any = None
        if self.size > 1:
            store = dist.TCPStore(world.address, world.port, is_master=False, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
            self._board = dist.PrefixStore("mnist_dist", store)  # type: ignore[attr-defined]

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero, the only one that writes."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Rank zero's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The `value` of each rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on rank zero alone; its result, or its `UserError` or `RunError`, comes to every rank."""
        result: Any = None
        if self.is_main:
            try:
                result = work()
            except (UserError, RunError) as error:
                result = error
        result = self.broadcast(result)
        if isinstance(result, UserError | RunError):
            raise result
        return result

    def count_nodes(self, world: World) -> int:
        """How many hosts take part: each has one local rank of zero. All ranks call it alike."""
        return int(self.sum(torch.tensor(int(world.local_rank == 0), device=self.device)))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of a tensor on the device, on every rank."""
        return self.accelerator.reduce(values, reduction="sum")

    @contextlib.contextmanager
    def sharing_failures(self) -> Iterator[None]:
        """Let every rank that fails because another one did raise `RunError` with that rank's reason."""
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            if is_loss(error):
                raise RunError(self._explain_loss(error)) from None
            with contextlib.suppress(RuntimeError):
                first_line = str(error).strip().split("\n")[0]
                self._board.compare_set(_CAUSE, "", f"rank {self.rank} failed: {type(error).__name__}: {first_line}")
                # The others learn of it when the connections close. Rank zero may be the one that serves the board: let them read it.
                self.accelerator.end_training()
                time.sleep(_READING_S)
            raise

    def _read_cause(self, causes: list[str]) -> None:
        with contextlib.suppress(RuntimeError):
            end = time.monotonic() + _READING_S
            while time.monotonic() < end:
                if self._board.check([_CAUSE]):
                    causes.append(self._board.get(_CAUSE).decode())
                    return
                time.sleep(0.05)

    def _explain_loss(self, error: Exception) -> str:
        causes: list[str] = []
        # In a thread: the rank that serves the board may be the one that no longer answers.
        reader = threading.Thread(target=self._read_cause, args=(causes,), daemon=True)
        reader.start()
        reader.join(_READING_S)
        if causes:
            return causes[0]
        if re.search("[Tt]imed? ?out", str(error)):
            return f"another rank was silent for {self.timeout.total_seconds():g} s (stopped, or its node is out of reach); see --timeout_s"
        gone = "another rank is gone and left no reason (killed, or its node went down)"
        # Gloo fails so where a connection breaks, and for no other reason; NCCL also where it cannot work here at all.
        return gone if type(error) is RuntimeError else f"{gone}, or it is this: {str(error).strip().splitlines()[0]}"


class Agreement:
    """Lets the ranks agree on the highest of a small number, once a step, without waiting for each other.

    The exchange of one step travels while the next is computed and is read after it: all ranks read the same value at the same step.
    """

    def __init__(self, group: Group) -> None:
        # A group of its own, so that these messages never stand in line behind those of the gradients.
        self._group: Any = dist.new_group(backend="gloo", timeout=group.timeout) if group.size > 1 else None
        self._value = torch.zeros((), dtype=torch.int64)
        self._work: Any = None

    def exchange(self, value: int) -> int:
        """Send this rank's `value`; the highest that any rank sent at the previous call (alone: `value` itself)."""
        if self._group is None:
            return value
        agreed = self.finish()
        self._value.fill_(value)
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def finish(self) -> int:
        """Read what is still on its way; no rank may leave before."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._value.item())


@contextlib.contextmanager
def join_group(world: World, config: Config) -> Iterator[Group]:
    """Start this process's part of the group: threads, device, precision, process group; end it on leaving.

    Raises `UserError` where the group that forms is not the one that `world` describes.
    """
    device = choose_device(config, world)
    check_graph(config, world, device)
    precision = choose_precision(config, device)
    threads = config.threads or choose_threads(world)
    torch.set_num_threads(threads)
    if device == "cpu":
        keep_memory()
    timeout = timedelta(seconds=config.timeout_s)
    accelerator: Accelerator | None = None
    with patch_environment(**_choose_variables(world, device, threads)):
        try:
            with _watchdog(world, config.timeout_s):
                accelerator = _make_accelerator(world, device, precision, timeout)
                _check_world(accelerator, world)
                group = Group(accelerator, precision, world, timeout)
                with group.sharing_failures():
                    _check_settings(group)
            with group.sharing_failures():
                yield group
        finally:
            if accelerator is not None:
                accelerator.end_training()  # ranks that end without this may abort at exit
            # Accelerate keeps one state for each process; without this a second run in it, as in a notebook, would get the first's.
            AcceleratorState._reset_state(reset_partial_state=True)


def _make_accelerator(world: World, device: str, precision: str, timeout: timedelta) -> Accelerator:
    try:
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision={"bf16": "bf16", "fp32": "no"}[precision],
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timeout),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if is_loss(error):
            raise RunError(
                f"rank {world.rank} of {world.size} could not join the others at {world.address}:{world.port} within "
                f"{timeout.total_seconds():g} s: {first_line} (a port that is taken? set MASTER_PORT to a free one)"
            ) from error
        # Accelerate reads some forty variables, and each fails in its own way on a value that it does not know.
        variables = sorted(name for name in os.environ if name.startswith("ACCELERATE_"))
        if not variables:
            raise
        raise UserError(
            f"Accelerate cannot start ({first_line}); of its variables the environment has "
            f"{', '.join(f'{name}={os.environ[name][:40]!r}' for name in variables)}: correct or unset them"
        ) from error


@contextlib.contextmanager
def _watchdog(world: World, timeout_s: float) -> Iterator[None]:
    """End this process if it has not joined the others in time.

    A rank that dies while the others connect can leave one of them waiting beyond every timeout of the libraries.
    """
    timer = threading.Timer(timeout_s + 5, _give_up, (world, timeout_s))
    timer.daemon = True
    if world.size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(world: World, timeout_s: float) -> None:
    with contextlib.suppress(OSError):
        message = f"[rank {world.rank}] error: rank {world.rank} of {world.size} could not join the others within {timeout_s:g} s\n"
        os.write(2, message.encode())
    os._exit(RunError.exit_code)


def _choose_variables(world: World, device: str, threads: int) -> dict[str, str]:
    """What torch, Accelerate and their libraries read from the environment while the group lives."""
    # Launchers leave 1 thread here, whatever the machine has; where there is nothing, Accelerate would set a number of its own.
    variables = {"OMP_NUM_THREADS": str(threads)}
    if world.size > 1:
        variables |= world.variables()
        if world.local_size == world.size and Path("/sys/class/net/lo").exists() and "GLOO_SOCKET_IFNAME" not in os.environ:
            variables["GLOO_SOCKET_IFNAME"] = "lo"  # all on one machine, whatever its host name resolves to
    if device == "cuda":
        # cuBLAS and cuDNN repeat their results only with a fixed workspace and fixed algorithms.
        variables["CUBLAS_WORKSPACE_CONFIG"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32; who wants less asks for bf16
        if torch.cuda.device_count() == 1 and world.size > 1:
            variables["LOCAL_RANK"] = "0"  # one GPU for each task: Accelerate and DDP take the GPU's number from here
    return variables


def _check_world(accelerator: Accelerator, world: World) -> None:
    if (accelerator.num_processes, accelerator.process_index) != (world.size, world.rank):
        raise UserError(
            f"{world.launcher} says this is rank {world.rank} of {world.size}, but Accelerate found rank {accelerator.process_index} "
            f"of {accelerator.num_processes}: each process would train alone. Check ACCELERATE_* variables and Accelerate's own config file"
        )


def _check_settings(group: Group) -> None:
    accelerator = group.accelerator
    allowed = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in allowed:
        raise UserError(
            f"Accelerate is set up for {accelerator.distributed_type.value}; allowed: {', '.join(kind.value for kind in allowed)}"
        )
    compiler = accelerator.state.dynamo_plugin.backend
    if compiler != DynamoBackend.NO:
        raise UserError(
            f"ACCELERATE_DYNAMO_BACKEND is {compiler.value.lower()}; allowed: no (a compiled step is not what the tests vouch for)"
        )
    accumulation = accelerator.gradient_accumulation_steps
    if accumulation != 1:
        raise UserError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {accumulation}; allowed: 1 (batch_size is the whole batch)")
    bf16_ranks = int(group.sum(torch.tensor(int(group.precision == "bf16"), device=group.device)))
    if bf16_ranks not in (0, group.size):
        raise UserError(f"{bf16_ranks} of {group.size} ranks would compute in bf16, the others in fp32: give all of them --precision fp32")
