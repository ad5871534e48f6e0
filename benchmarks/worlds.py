"""How start-up time, memory and open files grow with the number of ranks, on one machine.

`python -m benchmarks.worlds`; how to read it: benchmarks/README.md.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Row
from mnist_dist.batches import Batch
from mnist_dist.config import configure
from mnist_dist.errors import RunError
from mnist_dist.program import run_program
from mnist_dist.starter import find_free_port

_STEPS = 4
_MEMORY_EACH = 150 << 20  # of a rank, beyond what all share
_WAIT_S = 600.0
_LARGE = 1024  # the world that is reckoned, not measured


def run_rank(environ: dict[str, str], folder: str) -> None:
    """Train as one rank, and note what it took."""
    os.environ.update(environ)
    size, rank = int(environ["WORLD_SIZE"]), environ["RANK"]
    options: dict[str, Any] = {"dataset": "synthetic", "train_size": 2 * size, "test_size": 10, "batch_size": size, "steps": _STEPS}
    options |= {"threads": 1, "precision": "fp32", "report": False, "wandb": "disabled", "timeout_s": _WAIT_S}
    noted: Row = {}

    def take_turns(batches: Iterable[Batch], group: Any) -> Iterator[Batch]:
        noted["joined_s"] = time.monotonic()
        for batch in batches:
            if batch.step == 1:
                noted["first_step_s"] = time.monotonic()
            if batch.step == _STEPS - 1:
                noted["last_step_s"] = time.monotonic()
                noted["open_files"] = len(os.listdir("/proc/self/fd"))
                noted["own_bytes"] = _read_own_bytes()
            yield batch

    def work() -> int:
        common.run_loop(configure(**options, run_dir=str(Path(folder) / "run")), take_turns)
        (Path(folder) / f"rank{rank}.json").write_text(json.dumps(noted))
        return 0

    sys.exit(run_program(work))


def _read_own_bytes() -> int:
    """The memory that this process shares with no other."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) << 10
    return 0


def measure_world(size: int) -> Row:
    """Start `size` ranks that train for a few steps; what they took. Raises `RunError` if one fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.common"])
    with common.temporary_folder() as folder:
        environ = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(find_free_port()),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }
        begun_s = time.monotonic()
        ranks = []
        for rank in range(size):
            own = environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(context.Process(target=run_rank, args=(own, str(folder))))
            ranks[-1].start()
        for process in ranks:
            process.join(_WAIT_S)
            if process.exitcode != 0:
                for other in ranks:
                    other.kill()
                raise RunError(f"a rank of {size} ended with {process.exitcode}")
        notes = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]
    others = notes[1:] or notes
    return {
        "ranks": size,
        "joined_s": max(note["joined_s"] for note in notes) - begun_s,
        "first_step_s": max(note["first_step_s"] for note in notes) - begun_s,
        "step_s": statistics.median((note["last_step_s"] - note["first_step_s"]) / (_STEPS - 2) for note in notes),
        "open_files_main": notes[0]["open_files"],
        "open_files_others": max(note["open_files"] for note in others),
        "own_bytes": statistics.median(note["own_bytes"] for note in notes),
    }


def measure(options: argparse.Namespace) -> Row:
    """One row of results. Raises `RunError` where the memory would not do."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if max(options.ranks) * _MEMORY_EACH > available:
        raise RunError(
            f"{max(options.ranks)} ranks need about {max(options.ranks) * _MEMORY_EACH >> 20:,} MiB; {available >> 20:,} are free"
        )
    measure_world(1)  # the first start imports everything
    rounds: list[Row] = []
    for number in range(options.rounds):
        round_: Row = {"products": common.measure_products(torch.device("cpu")), "worlds": []}
        for size in options.ranks:
            round_["worlds"].append(measure_world(size))
            world = round_["worlds"][-1]
            common.tell(f"round {number + 1} of {options.rounds}, {size} ranks: first step after {world['first_step_s']:.1f} s")
        rounds.append(round_)
    return {
        "benchmark": "worlds",
        "settings": {"ranks": options.ranks},
        "rounds": rounds,
        "machine": common.describe_machine(),
        **common.describe_origin(),
    }


def format_row(row: Row) -> str:
    """The tables of a row, as markdown."""
    rounds = row["rounds"]
    lines = []
    for index, size in enumerate(row["settings"]["ranks"]):
        worlds = [round_["worlds"][index] for round_ in rounds]
        times = [_describe([world[name] for world in worlds]) for name in ("joined_s", "first_step_s")]
        step = _describe([1e3 * world["step_s"] for world in worlds], 0)
        files = [str(max(world[name] for world in worlds)) for name in ("open_files_main", "open_files_others")]
        memory = f"{statistics.median(world['own_bytes'] for world in worlds) / 2**20:.0f}"
        lines.append([str(size), *times, step, *files, memory])
    header = ["ranks", "ready, s", "first step, s", "step, ms", "open files, rank zero", "another rank, at most", "own memory, MiB"]
    head = f"{common.describe_rows([row])}, {len(rounds)} rounds;\n{common.describe_products(rounds)}"
    return "\n\n".join([head, common.format_table(header, lines), reckon_large(rounds[-1]["worlds"])])


def reckon_large(worlds: Sequence[Row]) -> str:
    """One line: what follows for a large world from the growth between the two largest that were measured."""
    # One rank alone connects to nobody: its files are no beginning of that growth.
    by_size = {world["ranks"]: world for world in worlds if world["ranks"] > 1}
    if len(by_size) < 2:
        return "Fewer than two worlds of several ranks tell nothing of a larger one."
    before, last = (by_size[size] for size in sorted(by_size)[-2:])
    each = (last["open_files_main"] - before["open_files_main"]) / (last["ranks"] - before["ranks"])
    main = last["open_files_main"] + each * (_LARGE - last["ranks"])
    doublings = (_LARGE.bit_length() - last["ranks"].bit_length()) * max(0, last["open_files_others"] - before["open_files_others"])
    return (
        f"On paper, {_LARGE:,} ranks: rank zero has {main:,.0f} open files ({each:.2f} for each rank), "
        f"another at most {last['open_files_others'] + doublings:,}."
    )


def _describe(values: Sequence[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    parser = common.make_parser("worlds", "How start-up time, memory and open files grow with the number of ranks on one machine.")
    parser.add_argument("--ranks", type=common.positive, nargs="+", default=[2, 4, 8, 16, 32, 64], metavar="N", help="sizes of the worlds")
    parser.add_argument("--rounds", type=common.positive, default=1, help="alternations")
    options = parser.parse_args(arguments)
    return common.measure_or_show(options, lambda: measure(options), format_row)


if __name__ == "__main__":
    sys.exit(run_program(main))
