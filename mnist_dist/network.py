"""How the hosts of a run reach each other: in pairs by plain connections, then all together by the group of a training.

A collective fails for all ranks when two hosts do not reach each other, and names neither. So pairs come first, and outside of any group.
"""

import contextlib
import ipaddress
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch import distributed as dist

from mnist_dist.config import Config
from mnist_dist.distributed import Group, explaining_start, find_place, join_group, open_store
from mnist_dist.errors import RunError, is_lost_rank
from mnist_dist.finding import Finding
from mnist_dist.model import describe_dtype
from mnist_dist.rendezvous import Place, name_with_hosts
from mnist_dist.world import World, find_host

SLOW_TIMES = 5.0  # a pair is slow where the fastest pair, or a network of 1 Gbit/s, is so much faster
SLOW_BYTES_PER_S = 125e6  # and it is below this, 1 Gbit/s: a busy machine must not look like a slow network

_CHUNK = 4 << 20  # bytes; the gradients of the built-in model have 2.4 MB
_CHUNKS, _CHUNKS_S = 8, 0.3
_PINGS = 30
_ANSWER_S = 5.0  # how long one end of a pair waits for the other
_RANKS_OF_ONE_HOST = 8  # that are paired where there is one host
_REPEATS = 2  # of a pair that looks slow; of one that looks broken, one
_TYPES = (torch.float32, torch.float64, torch.int64, torch.bfloat16)
_SIZES = (1, 1000, 1 << 20)
_CALLS = 20

RankPair = tuple[int, int]


@dataclass(frozen=True)
class Link:
    """What two ranks have found of the way between them."""

    ranks: RankPair
    latency_s: float = 0.0  # half of the fastest round trip
    bytes_per_s: float = 0.0  # of the fastest chunk, in the slower direction
    problem: str = ""  # why one does not reach the other


def check_exchange(world: World, config: Config) -> list[Finding]:
    """The findings about the exchange between the ranks, the same on every rank. All ranks call it alike."""
    if world.size == 1:
        return [Finding("exchange", "ok", "one process, which exchanges nothing")]
    links, hosts, left_out = measure_links(world, config)
    found = judge_links(links, hosts)
    values: dict[str, Any] = {
        "pairs": [{"ranks": link.ranks, "latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s} for link in links],
        "pairs_left_out": left_out,
    }
    if any(link.problem for link in links):
        return found  # a collective would wait in vain
    with join_group(world, config) as group:
        found += check_sums(group, hosts)
        values |= measure_together(group)
    if found:
        return found
    worst = min(links, key=lambda link: link.bytes_per_s)
    measured = (
        f"sums right; all together {values['latency_s'] * 1e3:.2f} ms for one number, {_describe_speed(values['bytes_per_s'])} for "
        f"{_CHUNK >> 20} MiB; {len(links)} pair{'s' if len(links) > 1 else ''} in turn, the slowest {_describe_speed(worst.bytes_per_s)} "
        f"({name_with_hosts(worst.ranks, hosts)})"
    )
    if left_out:
        measured += f"; no time for {left_out} more pairs"
    return [Finding("exchange", "ok", measured, "", values)]


def judge_links(links: Sequence[Link], hosts: dict[int, str]) -> list[Finding]:
    """A finding for each pair that is broken, or much slower than the fastest one or than any sane network."""
    found = [
        Finding(
            "exchange",
            "WRONG",
            link.problem,
            "let the hosts reach each other at all ports above 1023 (firewall), or leave one out with --exclude",
            {"ranks": link.ranks},
        )
        for link in links
        if link.problem
    ]
    fastest = max((link.bytes_per_s for link in links if not link.problem), default=0.0)
    for link in links:
        if is_slow(link, fastest):
            found.append(
                Finding(
                    "exchange",
                    "SLOW",
                    f"{name_with_hosts(link.ranks, hosts)} exchange {_describe_speed(link.bytes_per_s)}, the fastest pair "
                    f"{_describe_speed(fastest)}",
                    "have the network of these hosts looked at, or leave one out with --exclude",
                    {"ranks": link.ranks, "bytes_per_s": link.bytes_per_s, "fastest_bytes_per_s": fastest},
                )
            )
    return found


def is_slow(link: Link, fastest: float) -> bool:
    """Whether a pair is much slower than it could be, and not fast all the same.

    Not the median pair is what counts: of three hosts, one that is slow makes two pairs of three slow.
    """
    return not link.problem and link.bytes_per_s < min(SLOW_BYTES_PER_S, max(fastest, SLOW_BYTES_PER_S) / SLOW_TIMES)


def _describe_speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.3g} MB/s" if bytes_per_s < 1e9 else f"{bytes_per_s / 1e9:.2g} GB/s"


# In pairs.


def measure_links(world: World, config: Config) -> tuple[list[Link], dict[int, str], int]:
    """Measure the way between each two hosts, or between ranks where there is one host.

    Returns the links, the host of each rank, and how many pairs there was no time for: the same on every rank.
    """
    place = find_place(world, config)
    timeout = timedelta(seconds=config.timeout_s)
    with explaining_start(world, timeout):
        store = open_store(place, timeout)
        store.set(f"host/{world.rank}", find_host())
        names = [f"host/{rank}" for rank in range(world.size)]
        try:
            store.wait(names, timeout)
        except RuntimeError:
            lost = [rank for rank, name in enumerate(names) if world.rank == 0 and not store.check([name])]
            if not lost:
                raise
            who = name_with_hosts(lost, dict(enumerate(place.hosts)))
            raise RunError(
                f"{who} met rank zero at port {world.port}, and did not reach it at port {place.port}: is there a firewall?"
            ) from None
        hosts = {rank: name.decode() for rank, name in enumerate(store.multi_get(names))}
        members = choose_members(hosts)
        if world.rank in members:
            with _End(place, store, world.rank, min(_ANSWER_S, config.timeout_s / 6), hosts) as end:
                if world.rank == 0:
                    _lead(end, members, time.monotonic() + config.timeout_s)
                else:
                    end.follow()
        store.wait(["links"], timedelta(seconds=3 * config.timeout_s))
        answer = json.loads(store.get("links"))
        _part(store, world, config.timeout_s)
    return [Link(tuple(ranks), *rest) for ranks, *rest in answer["links"]], hosts, answer["left_out"]


def choose_members(hosts: dict[int, str]) -> list[int]:
    """The ranks that are paired: the first of each host; where there is one host, its first ranks."""
    first = list_first(hosts)
    return first if len(first) > 1 else sorted(hosts)[:_RANKS_OF_ONE_HOST]


def list_first(hosts: Mapping[int, str]) -> list[int]:
    """The first rank of each host."""
    return sorted({hosts[rank]: rank for rank in sorted(hosts, reverse=True)}.values())


def list_rounds(members: Sequence[int]) -> Iterator[list[RankPair]]:
    """Every two of the members once, in rounds in which each has one partner or none, as in a tournament."""
    ring: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    for _ in range(len(ring) - 1):
        couples = [(ring[index], ring[-1 - index]) for index in range(len(ring) // 2)]
        yield [(min(one, other), max(one, other)) for one, other in couples if one is not None and other is not None]
        ring.insert(1, ring.pop())


def _lead(end: "_End", members: Sequence[int], until: float) -> None:
    """Rank zero says which pairs measure in each round, and puts up what they found."""
    links: dict[RankPair, Link] = {}

    def plan() -> Iterator[list[RankPair]]:
        yield from list_rounds(members)
        for repeat in range(_REPEATS):  # each alone
            fastest = max(link.bytes_per_s for link in links.values())
            again = [link.ranks for link in links.values() if is_slow(link, fastest) or (link.problem and not repeat)]
            yield from ([ranks] for ranks in again)

    for pairs in plan():
        if time.monotonic() > until:
            break
        for link in end.measure(pairs):
            before = links.get(link.ranks, link)
            links[link.ranks] = link if before.problem or before.bytes_per_s < link.bytes_per_s else before
    end.finish()
    rows = [(link.ranks, link.latency_s, link.bytes_per_s, link.problem) for link in links.values()]
    left_out = len(members) * (len(members) - 1) // 2 - len(links)
    end.store.set("links", json.dumps({"links": rows, "left_out": left_out}))


def _part(store: Any, world: World, seconds: float) -> None:
    """Rank zero serves the store, and leaves when all others have left."""
    if store.add("left", 1) and world.rank == 0:
        until = time.monotonic() + seconds
        while int(store.add("left", 0)) < world.size and time.monotonic() < until:
            time.sleep(0.01)


class _End:
    """One rank that takes part in pairs: it listens, calls others, and reads from the store what to do next."""

    def __init__(self, place: Place, store: Any, rank: int, answer_s: float, hosts: dict[int, str]) -> None:
        self.store = store
        self._rank, self._answer_s, self._hosts = rank, answer_s, hosts
        self._secret = place.secret.encode()
        self._round = 0
        self._buffer = bytearray(_CHUNK)
        address = _find_address(place)
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family)
        store.set(f"end/{rank}", json.dumps([address, self._listener.getsockname()[1]]))

    def __enter__(self) -> "_End":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def measure(self, pairs: list[RankPair]) -> list[Link]:
        """Let these pairs measure at the same time. Rank zero calls it."""
        self.store.set(f"round/{self._round}", json.dumps(pairs))
        number = self._round
        self._take_part()
        links = []
        until = time.monotonic() + 5 * self._answer_s
        for first, second in pairs:
            rows: list[Any] = []
            for caller, called in ((first, second), (second, first)):
                key = f"found/{number}/{caller}-{called}"
                try:
                    self.store.wait([key], timedelta(seconds=max(0.1, until - time.monotonic())))
                    rows.append(json.loads(self.store.get(key)))
                except RuntimeError:
                    rows.append((0.0, 0.0, f"{name_with_hosts([caller], self._hosts)} has stopped answering"))
            problem = rows[0][2] or rows[1][2]
            links.append(Link((first, second), max(rows[0][0], rows[1][0]), 0.0 if problem else min(rows[0][1], rows[1][1]), problem))
        return links

    def finish(self) -> None:
        """Tell the others that no round follows."""
        self.store.set(f"round/{self._round}", "null")

    def follow(self) -> None:
        """Take part in each round that rank zero announces."""
        while self._take_part():
            pass

    def _take_part(self) -> bool:
        pairs = json.loads(self.store.get(f"round/{self._round}"))
        for first, second in pairs or ():
            if self._rank == first:
                self._call(second)
                self._answer(second)
            elif self._rank == second:
                self._answer(first)
                self._call(first)  # one direction may be slow, or be stopped by a firewall
        self._round += 1
        return pairs is not None

    def _greet(self, caller: int) -> bytes:
        return self._secret + b"%8d%8d" % (self._round, caller)

    def _call(self, other: int) -> None:
        address, port = "?", 0
        try:
            address, port = json.loads(self.store.get(f"end/{other}"))
            with socket.create_connection((address, port), self._answer_s) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(self._greet(self._rank))
                _expect(connection, b"G")
                found = (*self._measure(connection), "")
        except OSError as error:
            here, there = (name_with_hosts([rank], self._hosts) for rank in (self._rank, other))
            found = (0.0, 0.0, f"{here} does not reach {there} at {address}:{port}: {error.strerror or error}")
        self.store.set(f"found/{self._round}/{self._rank}-{other}", json.dumps(found))

    def _measure(self, connection: socket.socket) -> tuple[float, float]:
        def send(message: bytes, content: bytes | bytearray = b"") -> float:
            begun = time.perf_counter()
            connection.sendall(message)
            connection.sendall(content)
            _expect(connection, message)
            return time.perf_counter() - begun

        latency_s = min(send(b"P") for _ in range(_PINGS)) / 2
        begun, best_s = time.perf_counter(), float("inf")
        for _ in range(_CHUNKS):
            best_s = min(best_s, send(b"C", self._buffer))
            if time.perf_counter() - begun > _CHUNKS_S:
                break
        return latency_s, _CHUNK / best_s

    def _answer(self, caller: int) -> None:
        """Wait for a call of `caller`, and answer until it hangs up. What goes wrong, the caller tells."""
        until = time.monotonic() + self._answer_s + 1
        expected = self._greet(caller)
        while (left_s := until - time.monotonic()) > 0:
            self._listener.settimeout(left_s)
            with contextlib.suppress(OSError), self._listener.accept()[0] as connection:
                connection.settimeout(self._answer_s)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if _receive(connection, len(expected)) != expected:
                    continue  # of an earlier round, or a stranger
                until = 0.0  # this was the call
                connection.sendall(b"G")
                while message := connection.recv(1):
                    if message == b"C":
                        _receive(connection, _CHUNK, self._buffer)
                    connection.sendall(message)


def _find_address(place: Place) -> str:
    """The address at which this rank listens: of the network that gloo would take."""
    for own in psutil.net_if_addrs().get(os.environ.get("GLOO_SOCKET_IFNAME", ""), ()):
        if own.family in (socket.AF_INET, socket.AF_INET6):
            return str(own.address).partition("%")[0]
    return place.address


def _receive(connection: socket.socket, size: int, buffer: bytearray | None = None) -> bytes:
    """Exactly `size` bytes, into `buffer` where there is one. Raises OSError."""
    view = memoryview(buffer if buffer is not None else bytearray(size))
    received = 0
    while received < size:
        count = connection.recv_into(view[received:size])
        if not count:
            raise ConnectionAbortedError("the connection was closed")
        received += count
    return b"" if buffer is not None else bytes(view)


def _expect(connection: socket.socket, message: bytes) -> None:
    if connection.recv(1) != message:
        raise ConnectionAbortedError("the connection was closed")


# All together.


def make_part(rank: int, size: int, kind: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a rank adds: whole numbers from -5 to 5, whose partial sums any type holds exactly."""
    # Over ranks they repeat in a cycle of eleven that sums up to zero: no sum becomes large, however many ranks there are.
    return ((torch.arange(size, device=device) * 7 + rank * 3) % 11 - 5).to(kind)


def check_sums(group: Group, hosts: dict[int, str]) -> list[Finding]:
    """A finding for each type whose sums over the ranks come out wrong on some rank."""
    found = []
    for kind in _TYPES:
        name = describe_dtype(kind)
        wrong = ""
        for size in _SIZES:
            places = torch.arange(size) % 11
            expected = sum(make_part(rank, 11, torch.int64, torch.device("cpu")) for rank in range(group.size))[places]  # type: ignore[index]
            values = make_part(group.rank, size, kind, group.device)
            try:
                dist.all_reduce(values)
            except RuntimeError as error:
                if is_lost_rank(error) or kind != torch.bfloat16:
                    raise
                break  # older versions of gloo have no such sums, and no rank has begun one
            differing = (values.cpu().double() != expected.double()).nonzero()
            if len(differing) and not wrong:
                at = int(differing[0])
                wrong = f"{float(values[at]):g} instead of {int(expected[at])} at place {at} of {size:,}, {len(differing):,} places differ"
        told = group.gather(wrong)
        if ranks := [rank for rank, text in enumerate(told) if text]:
            found.append(
                Finding(
                    "exchange",
                    "WRONG",
                    f"the sum of {name} over {group.size} ranks is wrong on {name_with_hosts(ranks, hosts)}: {told[ranks[0]]}",
                    "do not train here: look for another version of torch or NCCL, then for faulty memory or network of these hosts",
                    {"type": name, "ranks": ranks},
                )
            )
    return found


def measure_together(group: Group) -> dict[str, float]:
    """How long all ranks need for the sum of one number, and how many bytes a second they sum in a large one; the best of some calls."""

    def measure(size: int, calls: int) -> float:
        values = torch.zeros(size, device=group.device)
        times_s = []
        for _ in range(calls):
            begun = time.perf_counter()
            dist.all_reduce(values)
            float(values[0])  # on a GPU: wait for it
            times_s.append(time.perf_counter() - begun)
        return max(group.gather(min(times_s)))

    return {"latency_s": measure(1, _CALLS), "bytes_per_s": _CHUNK / measure(_CHUNK // 4, _CALLS // 2)}
