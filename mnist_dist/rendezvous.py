"""Where the ranks of a run find each other: they prove that they belong together and learn by which address each is reached. No torch.

Rank zero greets at MASTER_PORT until all have come, and then serves torch's store at a port that nobody else knows. So that port is free
again while the run trains, and whoever comes to it by mistake meets a greeting and no store. All of it are JSON lines, bounded in size and
in time: a stranger is turned away, and the run goes on waiting for its own.

It keeps out who comes by accident, not who means harm: whoever knows what the ranks know, or reads the network, can pose as one.
"""

import contextlib
import errno
import ipaddress
import json
import logging
import os
import platform
import re
import secrets
import selectors
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mnist_dist.errors import RunError, UserError
from mnist_dist.source import hash_package
from mnist_dist.world import World

PATIENCE_S = 10.0  # how long a port that is somebody else's is tried again: another run's ranks may be about to have met
_PAUSE_S = 0.2
_BANNER = b'{"mnist_dist": 2}\n'
_GREETING_S, _GREETING_BYTES = 10.0, 8192  # of one rank, or stranger
_ANSWER_BYTES = 4 << 20
_BAD_MESSAGE = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what it may come to, with whatever a stranger sends
_STRANGERS = 128  # that may be half-way through a greeting
_SHOWN_HOSTS = 8
_LOOPBACK = "127.0.0.1"
_WAITING_S = 30.0  # after so long a wait rank zero says for whom

_log = logging.getLogger(__name__)

Message = dict[str, Any]
FindPort = Callable[[float], int]  # the port of rank zero's greeting, looked for at most so many seconds


@dataclass(frozen=True)
class Place:
    """Where and with whom this rank has met the others."""

    hosts: tuple[str, ...]  # of each rank
    address: str  # of this rank, by which the others reach it
    is_local: bool  # whether all are on one machine
    store: str  # where rank zero serves the store
    port: int
    secret: str  # with which all keys in the store begin
    listener: socket.socket | None = None  # of the store, on rank zero


def describe_run(world: World, environ: Mapping[str, str], run_dir: str) -> dict[str, str]:
    """What all ranks of a run know, and ranks of another run do not by accident."""
    run = {"number of processes": str(world.size), "run_dir": run_dir, "program": Path(sys.argv[0]).stem}
    if world.launcher == "srun":
        # The jobs of a heterogeneous one have numbers of their own.
        run["job"] = environ.get("SLURM_HET_JOB_ID") or environ.get("SLURM_JOB_ID", "")
        run["job step"] = environ.get("SLURM_STEP_ID", "")
        run["start of the job"] = environ.get("SLURM_RESTART_COUNT", "0")
    elif world.launcher == "submitit":
        run["job"] = environ.get("SUBMITIT_LOCAL_JOB_ID", "")
    else:
        # Not its restart count: agents of several nodes count differently.
        run["torchrun's run id"] = environ.get("TORCHELASTIC_RUN_ID", "")
    return run


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks in words: `rank 1`, or `ranks 0-3, 7`."""
    ordered, parts = sorted(ranks), []
    start = 0
    for index, rank in enumerate(ordered, start=1):
        if index == len(ordered) or ordered[index] != rank + 1:
            first = ordered[start]
            parts.append(str(rank) if first == rank else f"{first}-{rank}")
            start = index
    shown = ", ".join(parts[:20]) + (f" and {len(parts) - 20} more groups" if len(parts) > 20 else "")
    return f"rank{'s' if len(ordered) > 1 else ''} {shown}"


def name_with_hosts(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Ranks by the hosts that they are on: `ranks 0, 1 on host a, rank 2 on host b`."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(ranks):
        by_host[hosts[rank]].append(rank)
    parts = [f"{name_ranks(there)} on host {host}" for host, there in by_host.items()]
    more = f", {len(parts) - _SHOWN_HOSTS} more hosts" if len(parts) > _SHOWN_HOSTS else ""
    return ", ".join(parts[:_SHOWN_HOSTS]) + more


def _mention_loopback(host: str, world: World) -> str:
    """That the name of rank zero's host, which is another one, is this host's own here, in words; empty where it is not so."""
    if world.local_rank == world.rank:  # the same host
        return ""
    with contextlib.suppress(OSError, ValueError):
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
        if host not in ("localhost", platform.node(), *addresses) and all(ipaddress.ip_address(own).is_loopback for own in addresses):
            return f"; {host} is {min(addresses)} on host {platform.node()}, which is that host itself: see /etc/hosts"
    return ""


def check_interfaces(environ: Mapping[str, str]) -> None:
    """Raise `UserError` where `GLOO_SOCKET_IFNAME` names a network interface that this host lacks."""
    there = {*psutil.net_if_addrs()}
    for name in filter(None, environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in there:
            raise UserError(f"GLOO_SOCKET_IFNAME is {name!r}, which host {platform.node()} lacks; it has {', '.join(sorted(there))}")


def find_interface(address: str) -> str | None:
    """The network interface of this host that has an address; None where none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address.partition("%")[0] == address for own in addresses):
            return name
    return None


def meet(world: World, run: dict[str, str], timeout_s: float, publish: Callable[[int], None] | None, find_port: FindPort | None) -> Place:
    """Meet the other ranks of a world of several.

    Rank zero greets at the world's port; or at any port, which it `publish`es and the others find by `find_port`.
    Raises `UserError` where the port is somebody else's, or `RunError` if nobody chose it, and `RunError` that names who did not come
    within `timeout_s`.
    """
    if world.rank == 0:
        listener = _listen(world, 0 if publish else world.port, timeout_s)
        try:
            if publish:
                publish(int(listener.getsockname()[1]))
            return _Host(world, run, listener, timeout_s).gather()
        finally:
            listener.close()
    return _Visitor(world, run, timeout_s, find_port or (lambda _: world.port)).visit()


def describe_missed_meeting(world: World, timeout_s: float, reason: str = "") -> str:
    """That this process did not come together with the others, and why if that is known."""
    where = f"{world.address}:{world.port}"
    words = f"rank {world.rank} of {world.size} could not join the others at {where} within {timeout_s:g} s"
    return f"{words}: {reason}" if reason else words


def _make_taken_error(world: World, text: str) -> UserError | RunError:
    """That the port is somebody else's: a mistake of who chose it. One that follows from the job may be free when the job starts again."""
    advice = "set MASTER_PORT to a free one"
    if "MASTER_PORT" in world.unchosen:
        return RunError(f"{text} start again later, or {advice} (this one follows from the number of the job)")
    return UserError(f"{text} {advice}")


def _unmap(address: str) -> str:
    """An IPv4 address as it is written, where a socket for both kinds has it in the other form."""
    return address.removeprefix("::ffff:") if "." in address else address.partition("%")[0]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


# Rank zero.


def _listen(world: World, port: int, timeout_s: float) -> socket.socket:
    """Listen at rank zero's port; a port that is taken is tried again for a while."""
    end = time.monotonic() + min(PATIENCE_S, timeout_s)
    while True:
        try:
            return _open_listener(world.address if world.local_size == world.size else "", port, world.size)
        except OSError as error:
            host = platform.node()
            if error.errno != errno.EADDRINUSE:
                reason = error.strerror or str(error)
                remedy = "set MASTER_PORT to a free one"
                if error.errno == errno.EADDRNOTAVAIL:
                    remedy = f"no network interface has the address {world.address} (of a loopback one: ip link set lo up)"
                raise UserError(f"port {port} on host {host} cannot be used: {reason}; {remedy}") from None
            if time.monotonic() > end:
                raise _make_taken_error(world, f"port {port} on host {host} is taken by another program:") from None
        time.sleep(_PAUSE_S)


def _open_listener(address: str, port: int, size: int) -> socket.socket:
    """A socket for `address` if that is a loopback one, so that no other host reaches it; else for all addresses of this host."""
    backlog = min(4096, max(128, 4 * size))
    with contextlib.suppress(socket.gaierror, ValueError):
        for family, _, _, _, found in socket.getaddrinfo(address or None, port, type=socket.SOCK_STREAM) if address else ():
            if _is_loopback(str(found[0]).partition("%")[0]):
                return socket.create_server((str(found[0]), port), family=family, backlog=backlog)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be compiled in and switched off; a port that is taken is found below again
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", port), backlog=backlog)


@dataclass(eq=False)
class _Guest:
    """Who has connected to rank zero: a rank once it has greeted well."""

    socket: socket.socket
    end: float
    received: bytes = b""
    rank: int | None = None
    unsent: bytes = _BANNER

    @property
    def own_address(self) -> str:
        """The address of this host by which the guest reached it."""
        return _unmap(self.socket.getsockname()[0])

    @property
    def is_near(self) -> bool:
        """Whether it is on this host."""
        return _is_loopback(self.own_address) or _unmap(self.socket.getpeername()[0]) == self.own_address


class _Host:
    """Rank zero, while the others come to it."""

    def __init__(self, world: World, run: dict[str, str], listener: socket.socket, timeout_s: float) -> None:
        self._world, self._run, self._listener, self._timeout_s = world, run, listener, timeout_s
        self._selector = selectors.DefaultSelector()
        self._came: dict[int, _Guest] = {}
        self._hosts, self._codes = {0: platform.node()}, {0: hash_package()}
        self._warned: set[str] = set()
        self._is_here = True
        threading.Thread(target=self._look_for_address, daemon=True).start()  # a name server may take half a minute

    def _look_for_address(self) -> None:
        self._is_here = _is_here(self._world.address)

    def gather(self) -> Place:
        """Greet whoever comes until all ranks have come, and tell them where the store is."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        begun = time.monotonic()
        said = False
        try:
            while len(self._came) < self._world.size - 1:
                waited_s = time.monotonic() - begun
                if waited_s > self._timeout_s:
                    reason = self._name_missing()
                    self._tell_all({"failed": reason})
                    raise RunError(describe_missed_meeting(self._world, self._timeout_s, reason))
                if waited_s > _WAITING_S and not said:
                    said = True
                    _log.info("waiting for the other ranks: %s", self._name_missing())
                self._serve(min(0.5, self._timeout_s - waited_s + 0.01))
            if reason := self._name_other_codes():
                self._tell_all({"mistake": reason})
                raise UserError(reason)
            return self._share()
        finally:
            for guest in self._guests():
                guest.socket.close()
            self._selector.close()

    def _guests(self) -> list[_Guest]:
        return [key.data for key in self._selector.get_map().values() if key.data is not None]

    def _serve(self, timeout_s: float) -> None:
        for key, events in self._selector.select(timeout_s):
            if key.data is None:
                self._welcome()
            elif key.data.socket.fileno() >= 0:  # it may have had to go for one that came
                try:
                    self._attend(key.data, events)
                except _BAD_MESSAGE:
                    self._part_with(key.data)
        for guest in self._guests():
            if guest.rank is None and time.monotonic() > guest.end:
                self._part_with(guest)

    def _welcome(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            strangers = [guest for guest in self._guests() if guest.rank is None]
            if len(strangers) >= _STRANGERS + self._world.size:
                self._part_with(strangers[0])  # the oldest
            guest = _Guest(connection, time.monotonic() + _GREETING_S)
            self._selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE, guest)

    def _attend(self, guest: _Guest, events: int) -> None:
        """Send and read what there is. Raises OSError or ValueError where this guest is to go."""
        if events & selectors.EVENT_WRITE:
            guest.unsent = guest.unsent[guest.socket.send(guest.unsent) :]
            if not guest.unsent:
                if guest.rank is None and guest.received:
                    raise ConnectionAbortedError  # it was told why it is refused
                self._selector.modify(guest.socket, selectors.EVENT_READ, guest)
        if events & selectors.EVENT_READ:
            received = guest.socket.recv(_GREETING_BYTES)
            if not received:
                raise ConnectionAbortedError
            if guest.rank is not None:
                return  # it has nothing more to say
            guest.received += received
            if len(guest.received) > _GREETING_BYTES:
                raise ValueError("a greeting of such a size")
            if guest.received.endswith(b"\n"):
                answer = self._judge(guest, json.loads(guest.received))
                guest.unsent += json.dumps(answer).encode() + b"\n"
                self._selector.modify(guest.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, guest)

    def _judge(self, guest: _Guest, greeting: Message) -> Message:
        """The answer to a greeting; one of a rank of this run makes the guest that rank."""
        run, rank, host, code = (greeting[name] for name in ("run", "rank", "host", "code"))
        if not (isinstance(run, dict) and isinstance(rank, int) and isinstance(host, str) and isinstance(code, str)):
            raise ValueError("not a greeting")
        differing = sorted(name for name in {*run, *self._run} if run.get(name) != self._run.get(name))
        host = _show(host, 64)
        visitor = f"rank {rank} on host {host}"
        if differing:
            what = ", ".join(name for name in differing if name in self._run) or "what they are"
            self._warn(f"{visitor} came to port {self._port}, belongs to another run ({what} differ) and was refused")
            return {"refused": f"another run meets there ({what} differ)", "own": False}
        if 0 < rank < self._world.size and rank not in self._came:
            guest.rank = rank
            self._came[rank], self._hosts[rank], self._codes[rank] = guest, host, _show(code, 64)
            return {"accepted": True}
        self._warn(f"a second {visitor} came to port {self._port} and was refused")
        if rank in self._came:
            return {"refused": f"rank {rank} has come already, from host {self._hosts[rank]}: is this the same command twice?", "own": True}
        return {"refused": f"{name_with_hosts([0], self._hosts)} is there, and no other rank {rank} is expected", "own": True}

    @property
    def _port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _warn(self, text: str) -> None:
        if text not in self._warned and len(self._warned) < 20:
            self._warned.add(text)
            _log.warning("%s", text)

    def _part_with(self, guest: _Guest) -> None:
        self._selector.unregister(guest.socket)
        guest.socket.close()
        if guest.rank is not None:
            del self._came[guest.rank]
            self._warn(f"{name_with_hosts([guest.rank], self._hosts)} came and left before all ranks were there")

    def _name_missing(self) -> str:
        missing = set(range(self._world.size)) - {0, *self._came}
        left = {rank for rank in missing if rank in self._hosts}
        came = name_with_hosts({0, *self._came}, self._hosts)
        text = f"{name_ranks(missing - left)} of {self._world.size} did not come" if missing - left else ""
        if left:
            text += f"{'; ' if text else ''}{name_with_hosts(left, self._hosts)} came and left"
        text += f"; {came} came"
        if nodes := os.environ.get("SLURM_STEP_NODELIST") if self._world.launcher == "srun" else None:
            text += f" (the job step has the hosts {_show(nodes, 200)})"
        if not self._is_here:
            text += f"; no address of this host is MASTER_ADDR, {self._world.address}, where the others look for rank zero"
        return text

    def _name_other_codes(self) -> str:
        """Which ranks run other code than rank zero, in words; empty where none does."""
        others = [rank for rank, code in self._codes.items() if code != self._codes[0]]
        if not others:
            return ""
        who, main = name_with_hosts(others, self._hosts), name_with_hosts([0], self._hosts)
        found = ", ".join(sorted({self._codes[rank] for rank in others}))
        differ = f"{who} run{'' if len(others) > 1 else 's'} other code of mnist_dist (hash {found}) than {main} ({self._codes[0]})"
        return f"{differ}: all nodes need the same version, or the same checkout"

    def _share(self) -> Place:
        world = self._world
        far = {rank: guest.own_address for rank, guest in sorted(self._came.items()) if not guest.is_near}
        # The ranks that came over the network show by which address this host is reached; its own name may mean only itself to it.
        address = next(iter(far.values()), _LOOPBACK)
        store = _open_listener("" if far else _LOOPBACK, 0, 2 * world.size)
        port, secret = int(store.getsockname()[1]), secrets.token_hex(16)
        hosts = tuple(self._hosts[rank] for rank in range(world.size))
        self._tell_all({"port": port, "secret": secret, "hosts": hosts, "address": address, "is_local": not far})
        return Place(hosts, address, not far, _LOOPBACK, port, secret, store)

    def _tell_all(self, message: Message) -> None:
        line = json.dumps(message).encode() + b"\n"
        for guest in self._came.values():
            with contextlib.suppress(OSError):
                guest.socket.setblocking(True)
                guest.socket.settimeout(_GREETING_S)
                guest.socket.sendall(guest.unsent + line)


def _is_here(address: str) -> bool:
    """Whether an address, or a name, is one of this host; True where nobody knows."""
    try:
        for family, _, _, _, found in socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind(found)
                return True
        return False
    except (OSError, UnicodeError):
        return True


# The other ranks.


class _RefusalError(Exception):
    """Who answers is not rank zero of this run, or not for this rank."""


class _Visitor:
    """A rank other than zero, which goes to it."""

    def __init__(self, world: World, run: dict[str, str], timeout_s: float, find_port: FindPort) -> None:
        self._world, self._run, self._timeout_s, self._find_port = world, run, timeout_s, find_port
        self._end = time.monotonic() + timeout_s
        self._port = world.port
        self._host = world.address

    def visit(self) -> Place:
        """Greet rank zero as soon as it is there, and wait with it for the others."""
        refused_since: float | None = None
        unknown_since: float | None = None
        while True:
            begun = time.monotonic()
            try:
                return self._call()
            except socket.gaierror as error:
                unknown_since, refused_since = unknown_since or begun, None
                reason = f"host {platform.node()} does not know {self._host!r} ({error.strerror})"
                # A name server may be out of reach for a while; a name that the user gave may be wrong.
                may_pass = error.errno == socket.EAI_AGAIN and "MASTER_ADDR" in self._world.unchosen
                if time.monotonic() - unknown_since >= PATIENCE_S and not may_pass:
                    raise UserError(
                        f"MASTER_ADDR is {self._host!r}, which host {platform.node()} does not know: {error.strerror}"
                    ) from None
            except _RefusalError as refusal:
                # Another run may be about to have met, and then the port is free for this one.
                unknown_since, refused_since = None, refused_since or time.monotonic()  # rank zero may have been held up for one try
                reason = str(refusal)
                if time.monotonic() - refused_since >= PATIENCE_S:
                    raise _make_taken_error(self._world, f"port {self._port} on host {self._host} is taken: {reason};") from None
            except OSError as error:
                refused_since = unknown_since = None
                reason = f"rank zero is not there ({error.strerror or error}){_mention_loopback(self._host, self._world)}"
            if time.monotonic() > self._end:
                raise RunError(describe_missed_meeting(self._world, self._timeout_s, reason))
            time.sleep(_PAUSE_S)

    def _call(self) -> Place:
        """One try. Raises OSError where nobody is there yet."""
        self._port = self._find_port(max(1.0, self._end - time.monotonic()))
        with socket.create_connection((self._host, self._port), timeout=max(1.0, min(10.0, self._end - time.monotonic()))) as connection:
            if connection.getsockname() == connection.getpeername():
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")  # to itself: nobody listens there
            reader = _Reader(connection)
            try:
                if reader.read(_GREETING_S) != json.loads(_BANNER):
                    raise _RefusalError("by another version of mnist_dist (another run's, or that of a node of this one)")
                greeting = {"run": self._run, "rank": self._world.rank, "host": platform.node(), "code": hash_package()}
                connection.sendall(json.dumps(greeting).encode() + b"\n")
                answer = reader.read(_GREETING_S)
            except _BAD_MESSAGE:
                raise _RefusalError("by another program, which does not answer as rank zero of a run does") from None
            if "refused" in answer:
                if answer.get("own") is True:
                    raise UserError(f"rank {self._world.rank} was refused at {self._host}:{self._port}: {_show(answer['refused'])}")
                raise _RefusalError(_show(answer["refused"]))
            try:
                # Rank zero ends the wait, and says who is missing; it may have begun it later than this rank.
                answer = reader.read(self._timeout_s + _GREETING_S)
                if "failed" in answer:
                    raise RunError(describe_missed_meeting(self._world, self._timeout_s, _show(answer["failed"])))
                if "mistake" in answer:
                    raise UserError(_show(answer["mistake"]))
                own, store = (_unmap(name[0]) for name in (connection.getsockname(), connection.getpeername()))
                hosts, is_local = tuple(_show(host, 64) for host in answer["hosts"]), answer["is_local"] is True
                address = str(answer["address"]) if _is_loopback(own) or own == store else own
                return Place(hosts, address, is_local, _LOOPBACK if is_local else store, int(answer["port"]), str(answer["secret"]))
            except UserError:
                raise
            except _BAD_MESSAGE:
                raise RunError(
                    f"rank {self._world.rank} of {self._world.size} was left by rank zero at {self._host}:{self._port} "
                    "while both waited for the others: its log has the reason"
                ) from None


class _Reader:
    """Lines of JSON from a connection, each with a time and a size."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""

    def read(self, timeout_s: float) -> Message:
        """The next message. Raises OSError or ValueError."""
        end = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            self._connection.settimeout(max(0.01, end - time.monotonic()))
            received = self._connection.recv(1 << 16)
            if not received or len(self._received) > _ANSWER_BYTES:
                raise ConnectionAbortedError
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message


def _show(text: object, most: int = 2000) -> str:
    """Text of another process, fit for a message."""
    return re.sub(r"[^ -~]", "?", str(text))[:most]
