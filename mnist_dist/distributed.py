"""The Accelerator that joins this process to the others of its world, and what the processes say to each other."""

import contextlib
import ctypes
import itertools
import logging
import os
import sys
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

from mnist_dist.board import Board
from mnist_dist.config import Config
from mnist_dist.errors import RunError, UserError, first_line, is_device_failure, is_lost_rank
from mnist_dist.machine import (
    check_graph,
    choose_device,
    choose_gpu,
    choose_precision,
    count_open_files,
    describe_choice,
    identify_gpu,
    keep_memory,
    raise_file_limit,
    repeating_bits,
)
from mnist_dist.program import end_at_once_at_exit, list_variables, start_thread
from mnist_dist.rendezvous import Place, check_interfaces, describe_missed_meeting, describe_run, find_interface, meet, name_with_hosts
from mnist_dist.world import (
    MPI_VARIABLES,
    RANK_VARIABLES,
    SHARED_GPUS,
    World,
    choose_threads,
    count_usable_cores,
    may_share_gpus,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

_CLOSING_S = 1.0
_NCCL_EXTRA_S = 60.0
_READING_S = 5.0
_SLOW_S = 4.0  # of what takes milliseconds: a lookup waits 5 s for a name server that is silent
_SHOWN_CHOICES = 8
_FOREVER = timedelta(days=365)

# The second is its old name, which is deprecated since torch 2.14.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """The processes of one run, once they have found each other."""

    def __init__(self, accelerator: Accelerator, precision: str, board: Board | None, timeout: timedelta) -> None:
        self.accelerator = accelerator
        self.precision = precision
        self.rank = accelerator.process_index
        self.size = accelerator.num_processes
        self.device = accelerator.device
        self.timeout = timeout
        # Small messages of the hosts (what to resume, whether to stop) go beside the GPUs' traffic and never wait for it.
        self.control: Any = dist.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None
        self._board = board  # alone: none
        self._reason, self._explaining = "", threading.Lock()
        self._is_disconnected = False
        self._neighbour = _Neighbour(self, self._notice) if self.size > 1 and self.device.type == "cuda" else None

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero, which writes the run folder."""
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

    def gather_rows(self, row: torch.Tensor) -> torch.Tensor:
        """The `row` of each rank, a tensor on the device of one shape on all, one below the other on the CPU, on every rank."""
        if self.size == 1:
            return row.unsqueeze(0).cpu()
        rows = torch.empty(self.size * row.numel(), dtype=row.dtype, device=row.device)
        all_gather(rows, row.contiguous().view(-1))
        return rows.view(self.size, *row.shape).cpu()

    @contextlib.contextmanager
    def sharing_failures(self) -> Iterator[None]:
        """Let every rank that fails because another one did raise `RunError` with that rank's reason."""
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            assert self._board is not None
            if is_lost_rank(error):
                raise RunError(self.explain(error)) from None
            self._disconnect()  # the others learn of it when the connections close
            self._board.blame_self(error)
            raise
        except BaseException:  # Ctrl-C
            self._disconnect()
            raise

    def keep_stacks_in(self, folder: Path) -> None:
        """Where the Python stacks of the ranks go when one of them is silent. All ranks call it alike."""
        if self._board is not None:
            self._board.folder = folder

    def explain(self, error: BaseException) -> str:
        """Why a collective has failed with `error`, in the same words on every rank; found once, and best as soon as it is known."""
        assert isinstance(error, Exception)
        assert self._board is not None
        with self._explaining:
            if not self._reason:
                self._board.report_lost_rank(error)
            self._disconnect()
            self._reason = self._reason or self._board.explain(error)
        return self._reason

    def _notice(self, error: Exception) -> None:
        """End this process, which may wait for its GPU, because another rank is gone."""
        assert self._board is not None
        with self._explaining:
            if not self._reason:
                # Still connected: if NCCL gave up now, what waits for the GPU would go on, with numbers that are wrong.
                self._board.report_lost_rank(error)
                self._reason = self._board.explain(error)
        self._board.leave(self._reason)

    def leave(self) -> None:
        """Tell the others that this rank ends as it should, unless it has told them another end."""
        if self._neighbour is not None:
            self._neighbour.leave(says_goodbye=not self._is_disconnected)

    def _disconnect(self) -> None:
        """Close the connections, so that ranks that wait for this one notice at once."""
        if self._is_disconnected:
            return
        self._is_disconnected = True
        # In a thread: what is still on its way to a silent rank would hold it up.
        with contextlib.suppress(RuntimeError):  # where this host starts no more threads, they are closed as the process ends
            start_thread(self._close).join(_CLOSING_S)

    def _close(self) -> None:
        if self._neighbour is not None:
            self._neighbour.leave(says_goodbye=False)
            # To end the group would wait for the kernels, and so for the rank that is gone.
            dist.distributed_c10d._abort_process_group()
        self.accelerator.end_training()


class _Neighbour:
    """The rank before this one, listened to by a thread: that it is gone is noticed even while this rank waits for its GPU."""

    def __init__(self, group: Group, notice: Callable[[Exception], None]) -> None:
        self._notice = notice
        self._is_leaving = False
        self._group: Any = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._before, self._next = (group.rank - 1) % group.size, (group.rank + 1) % group.size
        for work in (self._say(), self._hear()):  # two ranks are connected when they first talk
            work.wait(group.timeout)
        self._goodbye = self._hear()
        start_thread(self._listen, "neighbour")

    def _say(self) -> Any:
        return dist.isend(torch.zeros(1), self._next, self._group)

    def _hear(self) -> Any:
        return dist.irecv(torch.zeros(1), self._before, self._group)

    def _listen(self) -> None:
        try:
            self._goodbye.wait()
        except RuntimeError as error:
            if not self._is_leaving:
                self._notice(error)

    def leave(self, says_goodbye: bool) -> None:
        """Stop listening; and tell the rank after this one that this one ends as it should."""
        self._is_leaving = True
        with contextlib.suppress(RuntimeError):  # that may have gone before
            if says_goodbye:
                self._say().wait(timedelta(seconds=_CLOSING_S))


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
    check_graph(config, device)
    precision = choose_precision(config, device)
    threads = config.threads or choose_threads(world)
    if threads > (cores := count_usable_cores()) and world.local_rank == 0:
        _log.warning("threads is %d, and this process may use %d core%s: they wait for each other", threads, cores, "s" * (cores > 1))
    torch.set_num_threads(threads)
    if device == "cpu":
        keep_memory()
    timeout = timedelta(seconds=config.timeout_s)
    place = find_place(world, config) if world.size > 1 else None
    accelerator: Accelerator | None = None
    group: Group | None = None
    board: Board | None = None
    store: Any = None
    with patch_environment(**_choose_variables(world, device, threads, place)), repeating_bits(device):
        try:
            with _watchdog(world, config.timeout_s):
                with explaining_start(world, timeout):
                    if place is not None:
                        store, board = _start_group(world, config, place, device, timeout)
                    with _telling(board):
                        accelerator = _make_accelerator(device, precision, timeout)
                        _check_world(accelerator, world)
                        group = Group(accelerator, precision, board, timeout)
                with group.sharing_failures():
                    _check_settings(group)
            with group.sharing_failures():
                yield group
            if board is not None:
                board.close(store, waits=True)  # before rank zero goes, and its store with it
        except BaseException as error:
            if world.size > 1:
                # Another rank may be lost: what DDP holds, by the frames of this error, is never freed. Gloo would then wait for a thread
                # of its own that may not end.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))
                end_at_once_at_exit()
            raise
        finally:
            if group is not None:
                group.leave()
            if accelerator is not None:
                accelerator.end_training()  # ranks that end without this may abort at exit
            if dist.is_initialized():  # Accelerate leaves it where a notebook has forked this process
                dist.destroy_process_group()
            if board is not None:
                board.close(store)
            # Accelerate keeps one state for each process; without this a second run in it, as in a notebook, would get the first's.
            AcceleratorState._reset_state(reset_partial_state=True)


def find_place(world: World, config: Config) -> Place:
    """Meet the others, before anything of torch listens or waits for them. Raises `UserError` and `RunError` as `meet` does."""
    if dist.is_initialized():
        raise UserError("this process is in a process group of torch already: leave it (destroy_process_group) before the training")
    raise_file_limit(count_open_files(world))
    run = describe_run(world, os.environ, config.run_dir)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return meet(world, run, config.timeout_s, None, None)
    # torchrun itself serves a store at MASTER_PORT, so rank zero greets at another port, and leaves its number there.
    timeout = timedelta(seconds=config.timeout_s)
    with explaining_start(world, timeout):
        agent = dist.TCPStore(world.address, world.port, is_master=False, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
        key = f"mnist_dist/greeting/{next(_meetings)}"  # the same after a restart: agents count those differently

        def find_port(timeout_s: float) -> int:
            agent.wait([key], timedelta(seconds=timeout_s))
            return int(agent.get(key))

        return meet(world, run, config.timeout_s, lambda port: agent.set(key, str(port)), find_port)


_meetings = itertools.count()  # of this process: a script may train more than once


def _start_group(world: World, config: Config, place: Place, device: str, timeout: timedelta) -> tuple[Any, Board]:
    """Make the process group over a store of its own, and the board beside it."""
    begun = time.monotonic()
    store = open_store(place, timeout)
    if world.rank == 0 and (took_s := time.monotonic() - begun) > _SLOW_S:
        _log.warning(
            "torch took %.0f s to open its store, perhaps for the name server: it is asked for the name of each rank's address, and one "
            "that does not answer (see /etc/resolv.conf) holds up every start",
            took_s,
        )
    _check_devices(store, world, place, device, describe_choice(config, device), identify_gpu(world) if device == "cuda" else "")
    board = Board(lambda: _connect(place, timeout, is_master=False), world.rank, place.hosts, timeout, on_gpu=device == "cuda")
    # Gloo must be the first to notice a silent rank: NCCL ends the process and leaves no reason.
    nccl = device == "cuda"
    longer = timeout + timedelta(seconds=_NCCL_EXTRA_S) if nccl else timeout
    with _telling(board):
        check_interfaces(os.environ)
        dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=world.rank, world_size=world.size, timeout=longer)
    return store, board


@contextlib.contextmanager
def _telling(board: Board | None) -> Iterator[None]:
    """Tell the others why this rank fails before it has joined them: they wait for it."""
    try:
        yield
    except Exception as error:
        if board is not None and not is_lost_rank(error):
            board.blame_self(error)
        raise


def _check_devices(store: Any, world: World, place: Place, device: str, choice: str, gpu: str) -> None:
    """Raise `RunError` on all ranks where some have chosen another device: one would start NCCL, the other gloo, and both would wait.

    On other nodes, or when the GPU that was lost is back, the same command may do. Raises `UserError` where two ranks have the same `gpu`.
    """
    store.multi_set([f"{name}/{world.rank}" for name in ("choice", "device", "gpu")], [choice, device, gpu])

    def find_alike(name: str) -> dict[str, list[int]]:
        alike: dict[str, list[int]] = {}
        for rank, text in enumerate(store.multi_get([f"{name}/{rank}" for rank in range(world.size)])):
            alike.setdefault(text.decode(), []).append(rank)
        return alike

    hosts = dict(enumerate(place.hosts))
    gpus = {} if device == "cpu" or may_share_gpus() else find_alike("gpu")
    sharing = next((ranks for name, ranks in gpus.items() if name and len(ranks) > 1), [])
    problem: UserError | RunError
    if len(find_alike("device")) > 1:
        choices = [*find_alike("choice").items()][:_SHOWN_CHOICES]
        found = "; ".join(f"{name_with_hosts(ranks, hosts)} would compute {text}" for text, ranks in choices)
        problem = RunError(f"{found}: all must have a GPU (look at the driver with nvidia-smi), or give all of them --device cpu")
    elif sharing:
        problem = UserError(
            f"{name_with_hosts(sharing, hosts)} have the same GPU; allowed: at most one process for each GPU (or {SHARED_GPUS}=1, with "
            "NCCL 2.30 or newer, for a test)"
        )
    else:
        return
    # Rank zero serves the store: it lets the others read before it ends.
    end = time.monotonic() + _READING_S
    read = store.add("choices read", 1)
    while world.rank == 0 and read < world.size and time.monotonic() < end:
        time.sleep(0.02)
        read = store.add("choices read", 0)
    raise problem


def open_store(place: Place, timeout: timedelta) -> Any:
    """The store of those who met at `place`, which rank zero serves."""
    options = {"is_master": True, "master_listen_fd": place.listener.detach()} if place.listener else {"is_master": False}
    return _connect(place, timeout, **options)


def _connect(place: Place, timeout: timedelta, **options: Any) -> Any:
    store = dist.TCPStore(place.store, place.port, timeout=timeout, wait_for_workers=False, **options)  # type: ignore[attr-defined]
    return dist.PrefixStore(place.secret, store)  # type: ignore[attr-defined]


@contextlib.contextmanager
def explaining_start(world: World, timeout: timedelta) -> Iterator[None]:
    """Say what torch's own failures mean while the ranks connect."""
    try:
        yield
    except Exception as error:
        if not is_lost_rank(error):
            raise
        raise RunError(describe_missed_meeting(world, timeout.total_seconds(), first_line(error))) from error


def _make_accelerator(device: str, precision: str, timeout: timedelta) -> Accelerator:
    # Accelerate's wrapper of the optimizer looks for this package twice a step, through all of sys.path, which may be on a shared file
    # system. This tells Python that it is not there.
    sys.modules.setdefault("lomo_optim", None)  # type: ignore[arg-type]
    try:
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision={"bf16": "bf16", "fp32": "no"}[precision],
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout), DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except Exception as error:
        if is_lost_rank(error) or is_device_failure(error):
            raise
        # It reads some forty variables, and each fails in its own way on a value that it does not know.
        if not (variables := list_variables("ACCELERATE_")):
            raise
        raise UserError(
            f"Accelerate cannot start ({first_line(error)}); of its variables the environment has {variables}: correct or unset them"
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
        os.write(2, f"[rank {world.rank}] error: {describe_missed_meeting(world, timeout_s)}\n".encode())
    os._exit(RunError.exit_code)


def _choose_variables(world: World, device: str, threads: int, place: Place | None = None) -> dict[str, str]:
    """What torch, Accelerate and their libraries read from the environment while the group lives."""
    # Launchers leave 1 thread here, whatever the machine has; where there is nothing, Accelerate would set a number of its own.
    variables = {"OMP_NUM_THREADS": str(threads)}
    # Accelerate fails on a number that is empty, as in a script that sets it to that of a job, and there is none. It takes -1 for none.
    variables |= {name: "-1" for name in (*RANK_VARIABLES, *MPI_VARIABLES) if os.environ.get(name) == ""}
    if world.size > 1:
        variables |= world.variables()
        # Gloo would connect each rank with every other at once.
        variables["TORCH_GLOO_LAZY_INIT"] = os.environ.get("TORCH_GLOO_LAZY_INIT", "1")
        if place is not None and (interface := find_interface(place.address)) is not None:
            # They would offer what this host's name means here, which may be an address that only this host reaches.
            variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME") or interface
            if device == "cuda" and not place.is_local:
                variables["NCCL_SOCKET_IFNAME"] = os.environ.get("NCCL_SOCKET_IFNAME") or f"={interface}"
    if device == "cuda":
        # cuBLAS repeats its results only with a fixed workspace.
        variables["CUBLAS_WORKSPACE_CONFIG"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if world.size > 1:
            variables["LOCAL_RANK"] = str(choose_gpu(world))  # Accelerate and DDP take the GPU's number from here
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
