"""What more processes bring on one machine: 1, 2, 4 of them, against uncoupled copies; variants of DDP; and more GPUs on paper.

`python -m benchmarks.scaling`; how to read it: benchmarks/README.md.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.futures import Future
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from benchmarks import common
from benchmarks.common import Row, Step
from mnist_dist.batches import Batch
from mnist_dist.config import Config, make_config, read_recipe, resolve_config
from mnist_dist.distributed import Group
from mnist_dist.errors import RunError
from mnist_dist.exchange import Flat, TreeSum
from mnist_dist.program import run_program
from mnist_dist.starter import find_free_port
from mnist_dist.state import TrainingState
from mnist_dist.tasks.mnist.model import PARAMETERS

_WARM_UP_STEPS = 3
_SMALL_BATCH = 8  # beside the whole batch: tells what a step costs whatever its batch
_SHARDS = (2, 4, 8)
_ANSWER_S = 600.0

# Variants of DDP beside our own choice, which is gradient_as_bucket_view and torch's default buckets.
_VARIANTS: dict[str, Row] = {
    "no bucket view": {"gradient_as_bucket_view": False},
    "buckets of 0.25 MB": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.25},
    "buckets of 1 MB": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1},
    "static graph": {"gradient_as_bucket_view": True, "static_graph": True},
}


@dataclass(frozen=True)
class Link:
    """How long messages take: seconds for any message, bytes/s for its content."""

    name: str
    latency_s: float
    bytes_per_s: float

    def all_reduce_s(self, processes: int, size: int) -> float:
        """Seconds of a ring all-reduce of `size` bytes: each process sends and receives twice all but its own share."""
        if processes == 1:
            return 0.0
        return 2 * (processes - 1) * (self.latency_s + size / processes / self.bytes_per_s)


# Not measured: round numbers of the order that such links have.
_ASSUMED_LINKS = (
    Link("assumed: GPUs of one node, 5 us, 200 GB/s", 5e-6, 200e9),
    Link("assumed: fast network, 5 us, 25 GB/s", 5e-6, 25e9),
    Link("assumed: 10 Gbit/s Ethernet, 50 us, 1.1 GB/s", 50e-6, 1.1e9),
)
_PAPER_PROCESSES = (8, 64, 1024)


def _compressing_hook(dtype: torch.dtype) -> Any:
    """A communication hook of our own: the gradients travel in `dtype`."""

    # DDP checks these annotations.
    def hook(_: object, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        buffer = bucket.buffer()
        sent = buffer.to(dtype).div_(dist.get_world_size())
        work: Any = dist.all_reduce(sent, async_op=True)

        return work.get_future().then(lambda _: buffer.copy_(sent))

    return hook


class Worker:
    """One rank: runs the real loop, and between its steps what the parent asks for."""

    def __init__(self, config: Config, pipe: Connection) -> None:
        self.config = config
        self.pipe = pipe

    def take_turns(self, loaded: Iterable[Batch], state: TrainingState) -> Iterator[Batch]:
        """The loop's batches, each block of them when the parent asks for it."""
        batches, group, accelerator = iter(loaded), state.group, state.group.accelerator
        size, device = group.size, group.device
        for _ in range(_WARM_UP_STEPS):
            yield next(batches)
        self.pipe.send({"precision": common.name_precision(accelerator), "threads": torch.get_num_threads(), **_read_memory()})
        steps, unsupported = self._make_steps(accelerator, size)
        steps |= self._make_sharded_steps(group)
        for step in list(steps.values()) * 2:
            step()
        self.pipe.send({"unsupported": unsupported})
        while True:
            command, count = self.pipe.recv()
            if command == "stop":
                break
            if command == "loop":
                common.wait_for_device(device)
                start = time.perf_counter()
                for _ in range(count):
                    yield next(batches)
                common.wait_for_device(device)
                self.pipe.send((time.perf_counter() - start) / count)
            else:
                self.pipe.send(self._time_steps(steps, count, device, size))
        yield next(batches)  # the loop ends with this one

    def _time_steps(self, steps: dict[str, Step], count: int, device: torch.device, size: int) -> dict[str, float]:
        """Median seconds of each of the steps, done in turn. The ranks begin each together, as uncoupled ones would otherwise drift."""
        times_s: dict[str, list[float]] = defaultdict(list)
        warm_up = next(iter(steps.values()))
        for _ in range(count):
            warm_up()  # the last of a turn compute nothing, after which the first would be slower than the others
            for name, step in steps.items():
                if size > 1:
                    dist.barrier()
                common.wait_for_device(device)
                start = time.perf_counter()
                step()
                common.wait_for_device(device)
                times_s[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in times_s.items()}

    def _make_steps(self, accelerator: Accelerator, size: int) -> tuple[dict[str, Step], dict[str, str]]:
        """What is timed beside the loop, by name; and the variants that do not work here, with the reason."""
        share = self.config.batch_size // size

        def make_step(model: nn.Module, batch_size: int = share) -> Step:
            return common.make_step(model, self.config, accelerator, batch_size)

        if size == 1:
            alone = common.make_model(accelerator)
            return {"alone": make_step(alone), "alone, small batch": make_step(alone, min(share, _SMALL_BATCH))}, {}

        def make_ddp(**settings: Any) -> DistributedDataParallel:
            devices = [accelerator.device] if accelerator.device.type == "cuda" else None
            return DistributedDataParallel(common.make_model(accelerator), device_ids=devices, **settings)

        coupled = make_ddp(gradient_as_bucket_view=True)
        coupled_step = make_step(coupled)

        def step_without_exchange() -> None:
            with coupled.no_sync():
                coupled_step()

        steps: dict[str, Step] = {
            "ddp": coupled_step,
            "no exchange": step_without_exchange,
            "copies": make_step(common.make_model(accelerator)),
        }
        for name, settings in _VARIANTS.items():
            steps[name] = make_step(make_ddp(**settings))
        unsupported: dict[str, str] = {}
        hooks = {
            "torch's bf16 hook": default_hooks.bf16_compress_hook,
            "torch's fp16 hook": default_hooks.fp16_compress_hook,
            "own bf16 hook": _compressing_hook(torch.bfloat16),
            "own fp16 hook": _compressing_hook(torch.float16),
        }
        for name, hook in hooks.items():
            model = make_ddp(gradient_as_bucket_view=True)
            step = make_step(model)
            try:
                model.register_comm_hook(None, hook)
                step()
            except (TypeError, ValueError, RuntimeError) as error:  # not for this backend or build: alike on all ranks
                unsupported[name] = str(error).strip().splitlines()[0]
            else:
                steps[name] = step
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
            steps[f"all-reduce {name}"] = _make_all_reduce(torch.zeros(PARAMETERS, dtype=dtype, device=accelerator.device))
        steps["all-reduce of one number"] = _make_all_reduce(torch.zeros(1, device=accelerator.device))
        return steps, unsupported

    def _make_sharded_steps(self, group: Group) -> dict[str, Step]:
        """Steps whose gradients are added up along the tree of some shards, as --shards does."""
        accelerator, batch_size = group.accelerator, self.config.batch_size
        smoothing = self.config.values()["label_smoothing"]

        def make_step(shards: int) -> Step:
            model = common.make_model(accelerator)
            parameters = list(model.parameters())
            optimizer = common.build_still_optimizer(parameters, self.config, accelerator)
            tree, flat = TreeSum(shards, group), Flat(parameters, extra=1)
            images = torch.randn(batch_size // shards, 1, 28, 28, device=accelerator.device)
            labels = torch.arange(len(images), device=accelerator.device) % 10

            def compute(_: int) -> list[Tensor]:
                with accelerator.autocast():
                    logits = model(images)
                loss = functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing) / batch_size
                return [flat.pack(torch.autograd.grad(loss, parameters), [loss.detach()])]

            def step() -> None:
                [total] = tree(compute)
                for parameter, gradient in zip(parameters, flat.views(total), strict=True):
                    parameter.grad = gradient
                optimizer.step()

            return step

        counts = sorted({group.size, *_SHARDS})
        return {f"{shards} shards": make_step(shards) for shards in counts if group.size <= shards <= batch_size}


def _make_all_reduce(tensor: Tensor) -> Step:
    def step() -> None:
        dist.all_reduce(tensor)

    return step


def _read_memory() -> Row:
    """MB of this process: resident; its proportional part of what is shared; what it alone has. None where the system does not tell."""
    names = {"Rss": "rss_mb", "Pss": "pss_mb", "Private_Clean": "private_mb", "Private_Dirty": "private_mb"}
    found: Row = dict.fromkeys(names.values())
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        name, _, value = line.partition(":")
        if name in names:
            found[names[name]] = (found[names[name]] or 0) + int(value.split()[0]) / 1000
    return found


def _work(variables: dict[str, str], values: Row, pipe: Connection) -> None:
    """What a rank's process does."""
    os.environ.update(variables)
    config = make_config(values)

    def run() -> int:
        try:
            common.run_loop(config, Worker(config, pipe).take_turns)
        except EOFError:
            return RunError.exit_code  # the parent has gone and has said why
        return 0

    # A rank that fails closes its pipe, by which the parent knows.
    sys.exit(run_program(run))


class Ranks:
    """The processes of one world, which wait for commands."""

    def __init__(self, config: Config, size: int) -> None:
        context = multiprocessing.get_context("spawn")  # as a launcher starts them: nothing is shared but what the system shares
        self.size = size
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        port = find_free_port()
        for rank in range(size):
            here, there = context.Pipe()
            variables: Row = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size} if size > 1 else {}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if size > 1 else {}
            told = ({name: str(value) for name, value in variables.items()}, config.values(), there)
            work = context.Process(target=_work, args=told, daemon=True)
            work.start()
            there.close()
            self.processes.append(work)
            self.pipes.append(here)
        self.facts: list[Row] = self.hear()
        self.unsupported: dict[str, str] = self.hear()[0]["unsupported"]

    def ask(self, command: str, count: int) -> list[Any]:
        """Let all ranks do something `count` times; their answers."""
        for pipe in self.pipes:
            pipe.send((command, count))
        return self.hear()

    def hear(self) -> list[Any]:
        """An answer of each rank. Raises `RunError` if one has died or is silent."""
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(_ANSWER_S):
                raise RunError(f"rank {rank} of {self.size} has been silent for {_ANSWER_S:g} s")
            try:
                answers.append(pipe.recv())
            except (EOFError, OSError):
                raise RunError(f"rank {rank} of {self.size} has died; what it said stands above") from None
        return answers

    def stop(self) -> None:
        """Let the ranks end."""
        for pipe in self.pipes:
            pipe.send(("stop", 0))
        for process in self.processes:
            process.join(60)


def measure(options: argparse.Namespace) -> Row:
    """One row of results."""
    worlds = sorted({1, *options.worlds})
    steps = _WARM_UP_STEPS + options.rounds * options.steps + 1
    limits: Row = {"steps": steps, "evaluate_every": steps, "test_size": 100, "report": False, "wandb": "disabled"}
    limits |= {} if options.batch_size is None else {"batch_size": options.batch_size}
    rounds: list[Row] = []
    with common.temporary_folder() as folder:
        configs = {size: resolve_config(limits | {"run_dir": str(folder / str(size))}, read_recipe(options.config)) for size in worlds}
        for size, config in configs.items():
            config.check_world(size)
        groups = {size: Ranks(config, size) for size, config in configs.items()}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for number in range(options.rounds):
            round_: Row = {"products": common.measure_products(device), "worlds": {}}
            for size, group in groups.items():
                loop_s = statistics.mean(group.ask("loop", options.steps))
                parts = group.ask("steps", options.steps)
                means = {name: statistics.mean(part[name] for part in parts) for name in parts[0]}
                round_["worlds"][str(size)] = {"loop": loop_s} | means
            rounds.append(round_)
            times = ", ".join(f"{size}: {values['loop'] * 1e3:.1f} ms" for size, values in round_["worlds"].items())
            common.tell(f"round {number + 1} of {options.rounds}, a step of the loop by processes: {times}")
        for group in groups.values():
            group.stop()
    return {
        "benchmark": "scaling",
        "settings": {
            "config": common.name_recipe(options.config),
            "batch_size": configs[1].batch_size,
            "steps": options.steps,
            "worlds": worlds,
        },
        "precision": groups[1].facts[0]["precision"],
        "facts": {str(size): group.facts for size, group in groups.items()},
        "unsupported": {str(size): group.unsupported for size, group in groups.items()},
        "rounds": rounds,
        "machine": common.describe_machine(),
        **common.describe_origin(),
    }


def format_row(row: Row, options: argparse.Namespace) -> str:
    """The tables of a row, as markdown."""
    settings, rounds = row["settings"], row["rounds"]
    head = f"{common.describe_rows([row])}, recipe {settings['config']}, batch {settings['batch_size']} in all, {len(rounds)} rounds;\n"
    text = [head + common.describe_products(rounds), _format_worlds(row)]
    sizes = [str(size) for size in settings["worlds"] if size > 1]
    if sizes:
        text.append(_format_variants(row, sizes))
    if any(name.endswith(" shards") for name in rounds[0]["worlds"]["1"]):  # older rows have none
        text.append(_format_shards(row))
    text.append(_format_paper(row, options.paper_batches, options.paper_step_us))
    return "\n\n".join(text)


def _times_s(row: Row, size: str, name: str) -> list[float]:
    return [round_["worlds"][size][name] for round_ in row["rounds"]]


def _format_worlds(row: Row) -> str:
    header = ["processes", "threads each", "loop, images/s", "of one process", "bare step, ms", "uncoupled copies, ms", "coupled / copies"]
    header += ["exchange, of the step", "all-reduce, ms", "RSS, MB", "PSS, MB", "private, MB"]
    batch_size = row["settings"]["batch_size"]
    lines = []
    for size in map(str, row["settings"]["worlds"]):
        facts = row["facts"][size]
        loop_s = _times_s(row, size, "loop")
        line = [size, str(facts[0]["threads"]), f"{batch_size / statistics.median(loop_s):,.0f}"]
        line.append(common.compare(_times_s(row, "1", "loop"), loop_s))
        if size == "1":
            line += [f"{statistics.median(_times_s(row, size, 'alone')) * 1e3:.1f}", "-", "-", "-", "-"]
        else:
            coupled, copies, alone = (_times_s(row, size, name) for name in ("ddp", "copies", "no exchange"))
            share = [1 - without / with_ for with_, without in zip(coupled, alone, strict=True)]
            line += [f"{statistics.median(coupled) * 1e3:.1f}", f"{statistics.median(copies) * 1e3:.1f}", common.compare(coupled, copies)]
            line.append(f"{statistics.median(share):.1%} ({min(share):.1%} - {max(share):.1%})")
            line.append(f"{statistics.median(_times_s(row, size, 'all-reduce fp32')) * 1e3:.2f}")
        for name in ("rss_mb", "pss_mb", "private_mb"):
            line.append("-" if facts[0][name] is None else f"{statistics.mean(fact[name] for fact in facts):,.0f}")
        lines.append(line)
    return common.format_table(header, lines)


def _format_shards(row: Row) -> str:
    """How fast shards are: times the step of DDP on as many processes, or on one process the bare step."""
    sizes = [str(size) for size in row["settings"]["worlds"]]
    first = row["rounds"][0]["worlds"]
    names = sorted({name for size in sizes for name in first[size] if name.endswith(" shards")}, key=lambda name: int(name.split()[0]))
    lines = []
    for name in names:
        cells = []
        for size in sizes:
            plain = "alone" if size == "1" else "ddp"
            cells.append(common.compare(_times_s(row, size, plain), _times_s(row, size, name)) if name in first[size] else "-")
        lines.append([name, *cells])
    return common.format_table(["speed, times a step without shards", *(f"{size} process{'es' * (size != '1')}" for size in sizes)], lines)


def _format_variants(row: Row, sizes: Sequence[str]) -> str:
    """Each variant's time against our own choice, in the same rounds."""
    first = row["rounds"][0]["worlds"][sizes[0]]
    own = ("loop", "ddp", "no exchange", "copies")
    names = [name for name in first if name not in own and not name.startswith("all-reduce") and not name.endswith(" shards")]
    lines = [[name, *(common.compare(_times_s(row, size, name), _times_s(row, size, "ddp")) for size in sizes)] for name in names]
    for name in row["unsupported"][sizes[0]]:
        lines.append([name, *("not supported" for _ in sizes)])
    for name in [name for name in first if name.startswith("all-reduce")]:
        lines.append([f"{name}, ms", *(f"{statistics.median(_times_s(row, size, name)) * 1e3:.2f}" for size in sizes)])
    return common.format_table(["variant, times the step of DDP as we use it", *(f"{size} processes" for size in sizes)], lines)


def fit_step(row: Row) -> tuple[float, float]:
    """Seconds of a step of one process whatever its batch, and seconds for each image, from its times at two batch sizes."""
    large, small = row["settings"]["batch_size"], min(row["settings"]["batch_size"], _SMALL_BATCH)
    large_s, small_s = (statistics.median(_times_s(row, "1", name)) for name in ("alone", "alone, small batch"))
    image_s = max(0.0, large_s - small_s) / (large - small) if large > small else large_s / large
    return max(0.0, large_s - image_s * large), image_s


def predict_step_s(fixed_s: float, image_s: float, batch_size: int, processes: int, link: Link) -> float:
    """Seconds of a step of `batch_size` images shared by `processes`, whose gradients travel when all are computed (no overlap)."""
    return fixed_s + image_s * math.ceil(batch_size / processes) + link.all_reduce_s(processes, 4 * PARAMETERS)


def find_last_useful(fixed_s: float, image_s: float, batch_size: int, link: Link) -> int:
    """The number of processes, a power of two, beyond which doubling it makes a step less than a quarter quicker."""
    processes = 1
    while 2 * processes <= batch_size:
        now_s, doubled_s = (predict_step_s(fixed_s, image_s, batch_size, count, link) for count in (processes, 2 * processes))
        if now_s < 1.25 * doubled_s:
            break
        processes *= 2
    return processes


def _format_paper(row: Row, batches: Sequence[int], step_us: Sequence[float] | None) -> str:
    """What more devices would do if each were as quick as the one process measured here, or as one measured elsewhere."""
    fixed_s, image_s = (value * 1e-6 for value in step_us) if step_us else fit_step(row)
    links = [*_ASSUMED_LINKS]
    if "2" in row["facts"]:
        # Two processes send two messages of half the gradients each, one after the other.
        one_s, all_s = (statistics.median(_times_s(row, "2", name)) for name in ("all-reduce of one number", "all-reduce fp32"))
        latency_s, bytes_per_s = one_s / 2, 4 * PARAMETERS / max(all_s - one_s, 1e-9)
        name = f"measured: loopback, {latency_s * 1e6:.0f} us, {bytes_per_s / 1e9:.2f} GB/s"
        links.insert(0, Link(name, latency_s, bytes_per_s))
    lines = []
    for batch_size in batches:
        for link in links:
            line = [f"batch {batch_size:,}, {link.name}"]
            alone_s = predict_step_s(fixed_s, image_s, batch_size, 1, link)
            for processes in _PAPER_PROCESSES:
                speedup = alone_s / predict_step_s(fixed_s, image_s, batch_size, processes, link)
                line.append("more than images" if processes > batch_size else f"{speedup:.1f} ({speedup / processes:.0%})")
            line.append(f"{find_last_useful(fixed_s, image_s, batch_size, link):,}")
            lines.append(line)
    source = "given" if step_us else "measured"
    head = f"On paper: {source} step of one device {fixed_s * 1e6:,.0f} us + {image_s * 1e6:,.2f} us an image, gradients of "
    head += f"{4 * PARAMETERS / 1e6:.2f} MB, ring all-reduce without overlap. Times as fast as one device (efficiency); the last column "
    head += "is where one more doubling gains less than a quarter."
    return head + "\n\n" + common.format_table(["", *(f"{count:,} devices" for count in _PAPER_PROCESSES), "pays up to"], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    parser = common.make_parser("scaling", "More processes on one machine, variants of DDP, and more devices on paper.")
    parser.add_argument("--config", default="mnist", help="recipe")
    parser.add_argument("--batch_size", type=common.positive, help="batch of all processes together; None: the recipe's")
    parser.add_argument("--worlds", type=common.positive, nargs="+", default=[1, 2, 4], help="numbers of processes; one is always measured")
    parser.add_argument("--rounds", type=common.positive, default=7, help="alternations")
    parser.add_argument("--steps", type=common.positive, default=10, help="steps of each kind in each round")
    parser.add_argument("--paper_batches", type=common.positive, nargs="+", default=[64, 4096], help="batches of the table on paper")
    parser.add_argument(
        "--paper_step_us",
        type=float,
        nargs=2,
        metavar=("FIXED", "IMAGE"),
        help="a device's step on paper, in microseconds: for any batch, and for each image of it; None: as measured here",
    )
    options = parser.parse_args(arguments)
    return common.measure_or_show(options, lambda: measure(options), lambda row: format_row(row, options))


if __name__ == "__main__":
    sys.exit(run_program(main))
