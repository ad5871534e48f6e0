"""What the ranks of `mnist_dist.probe` find out about themselves and each other. All ranks come to the same findings."""

import contextlib
import errno
import math
import secrets
import shutil
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.nn import functional as F

from mnist_dist.config import Config
from mnist_dist.distributed import Group, join_group
from mnist_dist.errors import UserError
from mnist_dist.files import describe_error, read_file, write_atomically
from mnist_dist.finding import WORDS, Finding
from mnist_dist.lock import Lock
from mnist_dist.machine import choose_device, choose_gpu, explain_no_gpu, identify_gpu
from mnist_dist.model import build_model
from mnist_dist.network import check_exchange, list_first
from mnist_dist.randomness import make_generator
from mnist_dist.rendezvous import name_ranks, name_with_hosts
from mnist_dist.run_folder import describe_versions
from mnist_dist.source import BUILT_IN, find_task, hash_files, hash_package
from mnist_dist.world import World, find_host, list_cores, may_share_gpus, read_quota

SLOW_TIMES = 1.6  # a rank is slow where the median rank is so much faster

_UNWRITABLE = "cannot write: "
_MAY_NOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)
_SHOWN = 20  # findings: one host that nobody reaches makes a line with each other host
_CLOCK_WARN_S, _CLOCK_WRONG_S = 1.0, 60.0
_PINGS = 5
_STEP_SAMPLES = {"cpu": 8, "cuda": 512}
_ROUND_S, _ROUNDS_MIN, _ROUNDS_MAX = 0.2, 3, 12
_STEPS_MIN = 3  # in a round
_WAITED_SHOWN = 0.25
_SEEN_S = 20.0
_CHECKPOINT_BYTES = 7 << 20  # of the built-in model, with its optimizer
_CHECKPOINT_SLOW_S, _CHECKPOINT_TRIES = 5.0, 3
_FREE_BYTES = 1 << 30

Hosts = Mapping[int, str]


def survey(check: str, world: World, config: Config, folder: Path | None, made: list[Path]) -> list[Finding]:
    """The findings of a check; where there are many, the first, and one that counts the others. All ranks call it alike.

    `folder`: of the check files. `made` holds the folders that exist for the moment, for whoever ends this early.
    Raises `UserError` and `RunError` as `join_group` does.
    """
    found = _find(check, world, config, folder, made)
    if len(found) > _SHOWN:
        more = f"and {len(found) - _SHOWN} more such lines"
        word = max((finding.word for finding in found[_SHOWN:]), key=WORDS.index)
        found = [*found[:_SHOWN], Finding(check, word, more, "begin with the host that is named most often")]
    return found


def _find(check: str, world: World, config: Config, folder: Path | None, made: list[Path]) -> list[Finding]:
    if check == "exchange":
        return check_exchange(world, config)
    # Only what needs the GPU goes there: a GPU that is given to two ranks would end the group before it could be named.
    with join_group(world, config if check == "speed" else config.replace(device="cpu")) as group:
        hosts = dict(enumerate(group.gather(find_host())))
        if check == "joined":
            return check_joined(group, hosts, world, config)
        if check == "agree":
            return check_agreement(group, hosts)
        if check == "speed":
            return check_speed(group, hosts)
        assert folder is not None
        return check_files(group, hosts, folder, made)


def _conclude(check: str, problems: list[Finding], measured: str, values: dict[str, Any]) -> list[Finding]:
    """The problems, or one line that all is well."""
    return problems or [Finding(check, "ok", measured, "", values)]


def _count(number: int, one: str) -> str:
    return f"{number} {one}{'' if number == 1 else 's'}"


# joined


def check_joined(group: Group, hosts: Hosts, world: World, config: Config) -> list[Finding]:
    """Ranks and hosts; ranks that share too few CPUs; ranks that share a GPU, or lack one."""
    own: dict[str, Any] = {"cpus": list_cores(), "quota": read_quota(), **describe_device(world, config)}
    told = group.gather(own)
    problems = []
    for host, ranks in _by_value(hosts).items():
        quota = max(told[rank]["quota"] or math.inf for rank in ranks)
        crowded, cpus = find_crowded({rank: told[rank]["cpus"] for rank in ranks})
        shared = f"{_count(len(cpus), 'CPU')} ({', '.join(map(str, cpus[:8]))}{', ...' if len(cpus) > 8 else ''})"
        if not crowded and len(ranks) > quota:
            crowded, shared = ranks, f"{_count(int(quota), 'CPU')} by the quota of their control group"
        if crowded:
            problems.append(
                Finding(
                    "joined",
                    "WARN",
                    f"{name_ranks(crowded)} on host {host} share {shared}",
                    "give each rank CPUs of its own (--cpus-per-task, srun --cpu-bind), or start fewer ranks on a host",
                    {"host": host, "ranks": crowded, "cpus": cpus},
                )
            )
    problems += _judge_devices(told, hosts)
    cpus = sorted({len(one["cpus"]) for one in told})
    each = f"{cpus[0]} to {cpus[-1]} CPUs" if len(cpus) > 1 else _count(cpus[0], "CPU")
    devices = ", ".join(sorted({one["device"] for one in told}))
    measured = (
        f"{_count(group.size, 'rank')} on {_count(len(set(hosts.values())), 'host')} by {world.launcher}, each with {each}; {devices}"
    )
    return _conclude("joined", problems, measured, {"ranks": [{"host": hosts[rank], **one} for rank, one in enumerate(told)]})


def describe_device(world: World, config: Config) -> dict[str, str]:
    """The device that a training would take here, its identity, and why it would take none."""
    try:
        kind = choose_device(config, world)
    except UserError as error:
        return {"device": "none", "identity": "", "problem": str(error)}
    if kind == "cpu":
        missed = world.gpus if config.device == "auto" else 0
        problem = f"Slurm gave this node {_count(missed, 'GPU')}, and torch finds none ({explain_no_gpu()})" if missed else ""
        return {"device": "no GPU", "identity": "", "problem": problem}
    return {"device": torch.cuda.get_device_name(choose_gpu(world)), "identity": identify_gpu(world), "problem": ""}


def _judge_devices(told: list[dict[str, Any]], hosts: Hosts) -> list[Finding]:
    def find(text: str, ranks: list[int], next_step: str, word: str = "WRONG") -> Finding:
        return Finding("joined", word, text, next_step, {"ranks": ranks})

    ask = "ask for one GPU for each rank (--gpus-per-task, or --gpus_per_node of launch.submit)"
    problems = []
    look = "look at the driver there (nvidia-smi)"
    for text, ranks in _by_value({rank: one["problem"] for rank, one in enumerate(told) if one["problem"]}).items():
        is_lost = told[ranks[0]]["device"] == "no GPU"
        problems.append(find(f"{name_with_hosts(ranks, hosts)}: {text}", ranks, f"{look}, and at the build of torch" if is_lost else ask))
    for _, ranks in _by_value({rank: (hosts[rank], one["identity"]) for rank, one in enumerate(told) if one["identity"]}).items():
        if len(ranks) > 1:
            text = f"{name_with_hosts(ranks, hosts)} have the same GPU"
            problems.append(find(text, ranks, ask, "WARN" if may_share_gpus() else "WRONG"))
    without = [rank for rank, one in enumerate(told) if one["device"] == "no GPU"]
    if 0 < len(without) < len(told):
        problems.append(find(f"no GPU is seen by {name_with_hosts(without, hosts)}, but by the others", without, look))
    return problems


def _by_value(values: Mapping[int, Any]) -> dict[Any, list[int]]:
    found: dict[Any, list[int]] = defaultdict(list)
    for rank, value in values.items():
        found[value].append(rank)
    return found


def find_crowded(cpus: Mapping[int, Iterable[int]]) -> tuple[list[int], list[int]]:
    """Ranks that may use fewer CPUs than they are, and these CPUs; two empty lists where each rank can have a CPU of its own.

    `cpus` are those that each rank of a host may use. Two threads of a core count as two, as Slurm and the kernel count them.
    """
    owners: dict[int, int] = {}

    def give(rank: int, asked: set[int]) -> bool:
        """Give a rank a CPU, for which others may have to take another one. Notes which CPUs it `asked` for."""
        for cpu in cpus[rank]:
            if cpu not in asked:
                asked.add(cpu)
                if cpu not in owners or give(owners[cpu], asked):
                    owners[cpu] = rank
                    return True
        return False

    crowded, shared = set[int](), set[int]()
    for rank in cpus:
        asked = set[int]()
        if not give(rank, asked):
            # All that it can come by belong to ranks that have no other choice.
            crowded |= {rank, *(owners[cpu] for cpu in asked)}
            shared |= asked
    return sorted(crowded), sorted(shared)


# agree


def check_agreement(group: Group, hosts: Hosts) -> list[Finding]:
    """Versions and files that differ between ranks, and clocks that differ between hosts."""
    told = group.gather(describe_software())
    problems = []
    for name in told[0]:
        if name == "prefix":
            continue
        answers = [one[name] for one in told]
        most = Counter(answers).most_common(1)[0][0]
        for answer, ranks in _by_value({rank: answer for rank, answer in enumerate(answers) if answer != most}).items():
            others = [rank for rank, one in enumerate(answers) if one == most]
            problems.append(
                Finding(
                    "agree",
                    "WARN" if name in ("python", "numpy", "accelerate") else "WRONG",
                    f"{name} of {name_with_hosts(ranks, hosts)} is {answer}, of {name_ranks(others)} {most}",
                    f"use one environment everywhere (sys.prefix of rank {ranks[0]} is {told[ranks[0]]['prefix']})",
                    {"name": name, "ranks": ranks, "value": answer, "others": most},
                )
            )
    clocks = measure_clocks(group, hosts)
    for rank, (offset_s, bound_s) in clocks.items():
        # What the answer took on its way is no fault of the clock.
        if (off_s := abs(offset_s) - bound_s) > _CLOCK_WARN_S:
            compared = "most others" if len(clocks) > 2 else f"host {hosts[min(clocks)]}'s: one of the two is wrong"
            problems.append(
                Finding(
                    "agree",
                    "WRONG" if off_s > _CLOCK_WRONG_S else "WARN",
                    f"the clock of host {hosts[rank]} is {abs(offset_s):.1f} s {'ahead of' if offset_s > 0 else 'behind'} {compared}",
                    "have the clocks set by one server (chrony, ntp): times in logs and of files do not compare",
                    {"host": hosts[rank], "offset_s": offset_s, "bound_s": bound_s},
                )
            )
    versions = {name: value for name, value in told[0].items() if name != "prefix"}
    measured = ", ".join(f"{name} {value}" for name, value in versions.items())
    if len(clocks) > 1:
        measured += f"; clocks within {max(max(abs(offset_s), bound_s) for offset_s, bound_s in clocks.values()):.2g} s"
    return _conclude("agree", problems, measured, versions | {"clocks": {hosts[rank]: offset_s for rank, (offset_s, _) in clocks.items()}})


def describe_software() -> dict[str, str]:
    """Versions, the beginnings of the hashes of this package's code and data, and where Python's packages are."""
    data = Path(str(resources.files("mnist_dist.tasks.mnist")))
    return {
        **describe_versions(),
        "numpy": np.__version__,
        "code": hash_package(),
        "data": hash_files(data, [*data.glob("*.json"), *data.glob("files/*.xz")]),
        "prefix": sys.prefix,
    }


def read_clock() -> float:
    """The time of this host, in seconds."""
    return time.time()


def measure_clocks(group: Group, hosts: Hosts) -> dict[int, tuple[float, float]]:
    """How far the clock of each host is ahead of the median one, by its first rank: seconds, and their uncertainty.

    Of two hosts, the other is compared with rank zero's.
    """
    offsets = {0: (0.0, 0.0)}
    first = list_first(hosts)
    for other in first:
        if other == 0 or group.rank not in (0, other):
            continue
        answers = []
        for _ in range(_PINGS):
            box = torch.zeros(1, dtype=torch.float64)
            if group.rank == other:
                dist.recv(box, 0, group=group.control)
                box[0] = read_clock()
                dist.send(box, 0, group=group.control)
            else:
                begun_at, begun = read_clock(), time.perf_counter()
                dist.send(box, other, group=group.control)
                dist.recv(box, other, group=group.control)
                half_s = (time.perf_counter() - begun) / 2
                answers.append((half_s, float(box[0]) - begun_at - half_s))
        if group.rank == 0:
            half_s, offset_s = min(answers)  # the fastest answer tells the most
            offsets[other] = (offset_s, half_s)
    offsets = group.broadcast(offsets)
    # Of two, none is in the middle: rank zero's is what the other is compared with.
    middle = statistics.median_low([offset_s for offset_s, _ in offsets.values()]) if len(offsets) > 2 else 0.0
    return {rank: (offset_s - middle, bound_s) for rank, (offset_s, bound_s) in offsets.items()}


# speed


def check_speed(group: Group, hosts: Hosts) -> list[Finding]:
    """The time of one small training step of each rank, which all compute at the same time, each for itself.

    A rank counts by its best round, without the time in which others had its CPU: on a busy machine no rank is slow for that.
    """
    step = make_step(group.device)
    threads = torch.get_num_threads()
    if group.device.type == "cpu":
        torch.set_num_threads(1)  # what a second thread waits for is not to be told from its work
    try:
        for _ in range(_STEPS_MIN):
            step()
        best_s, waited, rounds = [float("inf")] * group.size, [0.0] * group.size, 0
        while rounds < _ROUNDS_MIN or (rounds < _ROUNDS_MAX and _list_slow(best_s)):
            group.gather(None)  # all begin together
            told = group.gather(measure_steps(step))
            best_s = [min(before, now) for before, (now, _) in zip(best_s, told, strict=True)]
            waited = [max(before, now) for before, (_, now) in zip(waited, told, strict=True)]
            rounds += 1
    finally:
        torch.set_num_threads(threads)
    median_s = statistics.median_low(best_s)
    problems = [
        Finding(
            "speed",
            "SLOW",
            f"{name_with_hosts([rank], hosts)} needs {best_s[rank] * 1e3:.3g} ms for a step, the median rank {median_s * 1e3:.3g} ms",
            "look for heat, a power limit or a quota of CPU time on that host, or leave it out with --exclude",
            {"rank": rank, "host": hosts[rank], "step_s": best_s[rank], "median_s": median_s, "rounds": rounds},
        )
        for rank in _list_slow(best_s)
    ]
    slowest = max(range(group.size), key=best_s.__getitem__)
    measured = f"a small step takes {median_s * 1e3:.3g} ms"
    if group.size > 1:
        measured += f", on the slowest, {name_with_hosts([slowest], hosts)}, {best_s[slowest] / median_s:.2f} times that"
    if (most := max(waited)) > _WAITED_SHOWN:
        measured += f"; not counted: up to {most:.0%} of the time other programs had the CPU of {name_ranks([waited.index(most)])}"
    values = {"step_s": best_s, "waited_for_a_cpu": waited, "rounds": rounds, "samples": _STEP_SAMPLES[group.device.type]}
    return _conclude("speed", problems, measured, values)


def _list_slow(best_s: list[float]) -> list[int]:
    # Of two, the faster one is the measure.
    limit_s = SLOW_TIMES * statistics.median_low(best_s)
    return [rank for rank, seconds in enumerate(best_s) if seconds > limit_s]


def make_step(device: torch.device) -> Callable[[], object]:
    """One training step of the built-in model on random images, the same on every rank, to the end of its work."""
    model = build_model(find_task(BUILT_IN)(), seed=0).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    size = _STEP_SAMPLES[device.type]
    images = torch.randn(size, 1, 28, 28, generator=make_generator(0, "probe")).to(device)
    labels = (torch.arange(size) % 10).to(device)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())  # on a GPU: wait for it

    return step


def measure_steps(step: Callable[[], object]) -> tuple[float, float]:
    """The median time of a step without waiting for a CPU, in seconds; and the part of all time that was such waiting."""
    times_s, waits_s = list[float](), list[float]()
    begun, throttled_s = time.perf_counter(), _read_throttled()
    while len(times_s) < _STEPS_MIN or time.perf_counter() - begun < _ROUND_S:
        start, wait = time.perf_counter(), _read_wait()
        step()
        waits_s.append(_read_wait() - wait)
        times_s.append(time.perf_counter() - start)
    active_s = statistics.median(seconds - waited for seconds, waited in zip(times_s, waits_s, strict=True))
    # A quota makes a process wait as others do, and is no other program that goes away.
    throttled_s = min(_read_throttled() - throttled_s, sum(waits_s))
    return active_s + throttled_s / len(times_s), sum(waits_s) / sum(times_s)


def _read_wait() -> float:
    """How long this thread was ready to run, and others had its CPU, since it began: seconds. Zero where the kernel does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _read_throttled() -> float:
    """How long the quota of a control group has kept its processes from running: seconds, for those of this process together."""
    seconds = 0.0
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, group = line.split(":", 2)
            root = Path("/sys/fs/cgroup", *(["cpu"] if names else []))  # version 2 has no names
            if names and "cpu" not in names.split(","):
                continue
            for folder in (root / group.lstrip("/"), *(root / group.lstrip("/")).parents):
                if folder.is_relative_to(root) and (folder / "cpu.stat").exists():
                    rows = dict(row.split() for row in (folder / "cpu.stat").read_text().splitlines())
                    seconds += int(rows.get("throttled_usec", 0)) / 1e6 + int(rows.get("throttled_time", 0)) / 1e9
    return seconds


# files


def check_files(group: Group, hosts: Hosts, folder: Path, made: list[Path]) -> list[Finding]:
    """Whether all ranks see what rank zero writes in `folder`, and how soon; locks between hosts; space; the time of a checkpoint.

    All of it happens in a new folder there, which is removed at the end. `made` holds it meanwhile.
    """
    own = folder / group.broadcast(f"probe-{secrets.token_hex(8)}")
    try:
        found = _look_at_files(group, hosts, own, made)
        group.gather(None)  # nobody looks there any more
        return found
    finally:
        remove_folders(made)


def remove_folders(made: list[Path]) -> None:
    """Remove what a check has made, if it is still there."""
    while made:
        shutil.rmtree(made.pop(), ignore_errors=True)


def _look_at_files(group: Group, hosts: Hosts, own: Path, made: list[Path]) -> list[Finding]:
    def make() -> None:
        own.mkdir()
        made.append(own)

    seconds = min(_SEEN_S, group.timeout.total_seconds() / 2)
    values: dict[str, Any] = {}
    # A new file, then another one that is renamed to its name, as checkpoints and results are.
    steps: list[tuple[str, str, Callable[[], object], bytes]] = [
        ("seen_s", "a new file", lambda: (own / "seen").write_bytes(b"first"), b"first"),
        ("renamed_s", "a file renamed to the name of another", lambda: write_atomically(own / "seen", b"second"), b"second"),
    ]
    if reason := _try_on_main(group, make):
        return [_make_unwritable(hosts, own.parent, reason)]
    for name, what, write, content in steps:
        if reason := _try_on_main(group, write):
            return [_make_unwritable(hosts, own.parent, reason)]
        told = group.gather(wait_for_content(own / "seen", content, seconds))
        if blind := [rank for rank, waited_s in enumerate(told) if waited_s is None]:
            text = f"{name_with_hosts(blind, hosts)} did not see {what} that rank zero wrote in {own.parent} within {seconds:g} s"
            step = "use a folder that all nodes share (NFS, Lustre), mounted at the same path"
            return [Finding("files", "WRONG", text, step, {"ranks": blind, "hosts": sorted({hosts[rank] for rank in blind})})]
        values[name] = max(waited_s for waited_s in told if waited_s is not None)
    problems = check_lock(group, hosts, own, seconds)
    if reason := _try_on_main(group, lambda: values.update(measure_disk(own))):
        return [*problems, _make_unwritable(hosts, own.parent, reason)]
    values = group.broadcast(values)
    if values["free_bytes"] < _FREE_BYTES:
        text = f"{own.parent} has {values['free_bytes'] / 1e6:,.0f} MB of free space"
        problems.append(Finding("files", "WARN", text, "make room, or name another folder", values))
    if values["checkpoint_s"] > _CHECKPOINT_SLOW_S:
        text = f"a checkpoint of 7 MB takes {values['checkpoint_s']:.1f} s in {own.parent}"
        problems.append(Finding("files", "SLOW", text, "use a faster file system, or a higher --checkpoint_every", values))
    measured = (
        f"all ranks see a new file after {values['seen_s']:.2g} s, a renamed one after {values['renamed_s']:.2g} s; locks hold; "
        f"{values['free_bytes'] / 1e9:,.0f} GB free; a checkpoint of 7 MB takes {values['checkpoint_s']:.2g} s"
    )
    return _conclude("files", problems, measured, values)


def _make_unwritable(hosts: Hosts, folder: Path, reason: str, ranks: Sequence[int] = (0,)) -> Finding:
    text = f"{name_with_hosts(ranks, hosts)} cannot write in {folder}: {reason}"
    return Finding("files", "WRONG", text, "name a folder that you may write in, on all nodes", {"ranks": [*ranks]})


def _try_on_main(group: Group, work: Callable[[], object]) -> str:
    """Do `work` on rank zero; what the system says where it fails, on every rank."""
    reason = ""
    if group.is_main:
        try:
            work()
        except OSError as error:
            reason = describe_error(error)
    return group.broadcast(reason)


def wait_for_content(path: Path, content: bytes, seconds: float) -> float | None:
    """Wait until a file has this content; after how many seconds it has, None for not in time."""
    begun = time.perf_counter()
    while True:
        with contextlib.suppress(OSError):
            if read_file(path, len(content)) == content:
                return time.perf_counter() - begun
        if time.perf_counter() - begun > seconds:
            return None
        time.sleep(0.01)


def check_lock(group: Group, hosts: Hosts, own: Path, seconds: float) -> list[Finding]:
    """Whether the lock of a run folder that rank zero holds keeps the other hosts out, and lets them in when it is given back."""
    testers = [rank for rank in list_first(hosts) if hosts[rank] != hosts[0]] or [group.size - 1]

    def enter() -> str:
        try:
            Lock(own).release()
            return "entered"
        except UserError:
            return "kept out"
        except OSError as error:
            return f"{_UNWRITABLE if error.errno in _MAY_NOT_WRITE else ''}{describe_error(error)}"

    held: list[Lock] = []
    if reason := _try_on_main(group, lambda: held.append(Lock(own))):
        return [_make_unwritable(hosts, own.parent, reason)]
    during = group.gather(enter() if group.rank in testers else "kept out")
    for lock in held:
        lock.release()
    if ranks := [rank for rank, answer in enumerate(during) if answer.startswith(_UNWRITABLE)]:
        return [_make_unwritable(hosts, own.parent, during[ranks[0]].removeprefix(_UNWRITABLE), ranks)]
    group.gather(None)
    after, until = "entered", time.monotonic() + seconds
    for tester in testers:  # in turn: they would keep each other out
        if group.rank == tester:
            while (after := enter()) != "entered" and time.monotonic() < until:
                pass
        group.gather(None)
    problems = []
    next_step = "let no two jobs use one run folder; ask for locks (Lustre: mount with -o flock)"
    for told, expected, what in (
        (during, "kept out", "could take the lock of a folder while rank zero held it"),
        (group.gather(after), "entered", "could not take the lock of a folder after rank zero had released it"),
    ):
        if ranks := [rank for rank, answer in enumerate(told) if answer != expected]:
            text = f"{name_with_hosts(ranks, hosts)} {what}"
            text += "" if told[ranks[0]] in ("entered", "kept out") else f" ({told[ranks[0]]})"
            problems.append(Finding("files", "WARN", text, next_step, {"ranks": ranks}))
    return problems


def measure_disk(own: Path) -> dict[str, float]:
    """The free space of a folder's file system, and the seconds that a checkpoint takes there at best. Raises OSError."""
    content, best_s = secrets.token_bytes(_CHECKPOINT_BYTES), float("inf")
    for _ in range(_CHECKPOINT_TRIES):
        begun = time.perf_counter()
        write_atomically(own / "checkpoint", content)
        best_s = min(best_s, time.perf_counter() - begun)
        if best_s < _CHECKPOINT_SLOW_S:
            break
    return {"free_bytes": shutil.disk_usage(own).free, "checkpoint_s": best_s}
