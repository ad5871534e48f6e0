"""Hosts for the tests: network namespaces with names of their own, on one switch, each of which believes that its name is 127.0.1.1."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Hosts:
    """Some hosts; `names` are as the processes on them know them."""

    def __init__(self, tag: str, count: int) -> None:
        self.names = [f"{tag}{letter}" for letter in "abcdefgh"[:count]]
        self._bridge = f"{tag}br"
        self.addresses = {name: f"10.213.77.{number}" for number, name in enumerate(self.names, 1)}

    def make(self) -> None:
        """Make them. Raises `subprocess.CalledProcessError`."""
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        for name, address in self.addresses.items():
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth7", "netns", name)
            _ip("link", "set", f"{name}v", "master", self._bridge, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth7")
            _ip("-n", name, "link", "set", "eth7", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            others = "".join(f"{other_address} {other}\n" for other, other_address in self.addresses.items() if other != name)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")

    def remove(self) -> None:
        """Remove what there is of them, and nothing else."""
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", self._bridge)

    def lose(self, name: str, address: str) -> None:
        """Let what a host sends to an address go to a card that is not there, as into a firewall that drops it."""
        _ip("-n", name, "neigh", "replace", address, "lladdr", "02:00:00:00:00:99", "dev", "eth7", "nud", "permanent")

    def start(self, name: str, *command: str, **environ: str) -> "subprocess.Popen[str]":
        """Start a command on one of them."""
        clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        inside = ["ip", "netns", "exec", name, "unshare", "-u", "sh", "-c", 'hostname "$0"; exec "$@"', name, *command]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(inside, env=clean | {"PYTHONPATH": str(ROOT)} | environ, **options)  # type: ignore[call-overload, no-any-return]

    def start_ranks(self, arguments: Sequence[str], port: int, per_host: int = 1, main: str | None = None) -> list["subprocess.Popen[str]"]:
        """Start the training, with the plain variables of ranks."""
        size = per_host * len(self.names)
        return [
            self.start(
                self.names[rank // per_host],
                sys.executable,
                "-m",
                "mnist_dist.train",
                *arguments,
                RANK=str(rank),
                LOCAL_RANK=str(rank % per_host),
                WORLD_SIZE=str(size),
                LOCAL_WORLD_SIZE=str(per_host),
                MASTER_ADDR=main or self.names[0],
                MASTER_PORT=str(port),
            )
            for rank in range(size)
        ]


@contextlib.contextmanager
def making_hosts(tag: str, count: int) -> Iterator[Hosts]:
    """Hosts as long as they are needed. Fails where they cannot be made: as root only, with iproute2."""
    hosts = Hosts(tag, count)
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=60)
