"""What a process computes with: its threads, its device, its precision, its memory."""

import contextlib
import ctypes
import logging
import os
import platform
import re
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic
from torch.nn.attention import SDPBackend, sdpa_kernel

from mnist_dist.config import Config
from mnist_dist.errors import UserError
from mnist_dist.world import World

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_FILES_ENOUGH = 65_536

_log = logging.getLogger(__name__)


def choose_device(config: Config, world: World) -> str:
    """The device of this process: cpu or cuda. Raises `UserError` where it may not have what it asks for."""
    available = torch.cuda.is_available() and not _is_kept_on_cpu()
    if config.device == "cuda" and not available:
        raise UserError(f"device is cuda, but torch finds no GPU here that it may use ({explain_no_gpu()}); allowed: auto, cpu")
    if config.device == "auto" and not available and world.gpus:
        _log.warning(
            "Slurm gave this node %d GPUs, and torch finds none that it may use (%s): the run is on the CPU; --device cuda would refuse it",
            world.gpus,
            explain_no_gpu(),
        )
    return "cpu" if config.device == "cpu" or not available else "cuda"


def describe_choice(config: Config, device: str) -> str:
    """The device that this process has chosen, and why if it is the CPU."""
    if device == "cuda":
        return "on a GPU"
    return f"on the CPU ({'device is cpu' if config.device == 'cpu' else explain_no_gpu()})"


def explain_no_gpu() -> str:
    """Why torch may find no GPU, as far as this process can know."""
    if _is_kept_on_cpu():
        return f"ACCELERATE_USE_CPU is {os.environ['ACCELERATE_USE_CPU']!r}"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"torch {torch.__version__}; " + (
        "is its driver new enough? see nvidia-smi" if visible is None else f"CUDA_VISIBLE_DEVICES is {visible!r}"
    )


def _is_kept_on_cpu() -> bool:
    """Whether Accelerate was told to leave the GPUs alone, as by `accelerate launch --cpu`."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def choose_gpu(world: World) -> int:
    """The number of this process's GPU among those that it sees."""
    return world.local_rank % torch.cuda.device_count()


def identify_gpu(world: World) -> str:
    """What tells this process's GPU from all others, on any host; empty where torch does not know."""
    try:
        return str(getattr(torch.cuda.get_device_properties(choose_gpu(world)), "uuid", ""))
    except RuntimeError:  # of a GPU that fails: whoever computes on it will tell
        return ""


def check_graph(config: Config, device: str) -> None:
    """Raise `UserError` where --cuda_graph has no GPU."""
    if config.cuda_graph and device != "cuda":
        raise UserError("cuda_graph replays the steps of one process on a GPU, and this run is on a CPU: leave it out")


def choose_precision(config: Config, device: str) -> str:
    """What a run of `config` computes in on `device` (cpu, cuda): fp32 or bf16. Raises `UserError` where a launcher asks for another."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "bf16"):
        raise UserError(f"accelerate launch asks for mixed precision {launched}; allowed: no, bf16 (or leave it to --precision)")
    if config.precision != "auto":
        if launched == "bf16" and config.precision != "bf16":
            raise UserError(f"precision is {config.precision}, but accelerate launch asks for bf16: leave one of them out")
        return config.precision
    if launched == "bf16":
        return "bf16"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else has_native_bfloat16()
    return "bf16" if native else "fp32"


def has_native_bfloat16() -> bool:
    """Whether this CPU computes bfloat16 by itself."""
    # Elsewhere oneDNN emulates bfloat16, slower than float32.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: float32
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def count_open_files(world: World) -> int:
    """How many files and connections a process of `world` may need at once, generously."""
    # Of gloo's connections, each of three groups has some for each doubling of the world. Rank zero serves the store to the others: one
    # connection to each is the group's, and two are the board's.
    return 256 + 6 * world.size.bit_length() + (3 * world.size if world.rank == 0 else 0)


def raise_file_limit(needed: int) -> None:
    """Let this process have as many open files as it may. Raises `UserError` where that is less than it needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _FILES_ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < max(wanted, needed):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise UserError(
            f"this process may open {soft} files, and needs up to {needed} with so many ranks: raise the limit (ulimit -Hn {needed})"
        )


def keep_memory() -> None:
    """Let this process keep what a step frees for the next step. Where the C library is not glibc, nothing is done.

    By default glibc gives large tensors back to the system, which hands out zeroed pages for them anew in each step: a quarter of the time
    of a step of 512 images.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Compute with one thread within the block: a sum is then rounded the same, however many threads this process has."""
    threads = torch.get_num_threads()
    if threads > 1:  # in a worker, once a batch, there is nothing to do
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def repeating_bits(device: str) -> Iterator[None]:
    """Let torch add numbers up in the same order each time. By itself it does not: two threads hurry to the gradient of `x[rows]`.

    Where torch knows of an operation that cannot, a warning names that once. On a GPU (`device` is cuda) attention is computed step by
    step: as long as torch is to warn and not to fail, its fused kernels hurry. A task may still ask for them by name (`sdpa_kernel`).
    """
    settings: Any = torch.utils.deterministic
    cudnn: Any = torch.backends.cudnn
    mode, fills = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    fixed, tries = cudnn.deterministic, cudnn.benchmark
    short = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    products = None
    if "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" in os.environ:  # some containers set it; a task's own choice stays
        with contextlib.suppress(RuntimeError):  # of a choice by torch's newer names
            products = torch.get_float32_matmul_precision()
    show, told = warnings.showwarning, set[str]()

    def tell(message: Warning | str, *more: Any, **others: Any) -> None:
        match = re.match(r"(.+?) (?:does not have a deterministic implementation|defaults to a non-deterministic algorithm)", str(message))
        if match is None:
            show(message, *more, **others)
        elif match[1] not in told:
            told.add(match[1])
            _log.warning("torch's %s does not give the same bits each time: two equal runs may differ", match[1])

    # As `torch.use_deterministic_algorithms(True, warn_only=True)` does, which would make torch import its compiler.
    torch.set_deterministic_debug_mode(max(mode, 1))
    settings.fill_uninitialized_memory = False  # nothing of ours reads it
    cudnn.deterministic, cudnn.benchmark = True, False  # the quickest kernel may be another one each time
    _set_precision("ieee", "ieee")  # float32 means float32; who wants less asks for bf16
    if products is not None:
        torch.set_float32_matmul_precision("highest")
    warnings.showwarning = tell
    try:
        with sdpa_kernel(SDPBackend.MATH) if device == "cuda" else contextlib.nullcontext():
            yield
    finally:
        warnings.showwarning = show
        settings.fill_uninitialized_memory = fills
        cudnn.deterministic, cudnn.benchmark = fixed, tries
        _set_precision(*short)
        if products is not None:
            torch.set_float32_matmul_precision(products)
        torch.set_deterministic_debug_mode(mode)


def _set_precision(convolutions: str, recurrent: str) -> None:
    """Set what cuDNN computes float32 with: ieee or tf32."""
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = convolutions == recurrent == "tf32"  # torch's older name, which some of its code reads, and refuses to if it differs
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = convolutions, recurrent


def describe_arithmetic(device: torch.device) -> str:
    """What decides how this process rounds, in words: its processor or GPU, its threads, torch."""
    return f"{find_kind(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def find_kind(device: torch.device) -> str:
    """The model of the GPU, or of the processor, that a process computes on: the rounding of sums depends on it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else find_processor()


def find_processor() -> str:
    """The model of this machine's processor."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    if "model name" in found:
        return found["model name"]
    # Linux gives the processors of Arm no other name than these numbers.
    numbers = [f"{name} {found[name]}" for name in ("CPU implementer", "CPU part") if name in found]
    return ", ".join([platform.processor() or platform.machine(), *numbers])
