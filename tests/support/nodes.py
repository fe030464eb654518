"""Two nodes on one machine: network namespaces joined by a cable where the machine allows it, else loopback."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from launch import end, free_port, start


_TIMEOUT = 240


@dataclass(frozen=True)
class Node:
    """A machine as a launcher sees it: its rank, its own network, and where to find the node of rank 0."""

    rank: int
    interface: str
    head: str
    port: int
    namespace: str | None = None

    def start(self, command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen:
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        # Else gloo takes the address that the host's name stands for, which the other node may not reach.
        return start([*inside, *command], log, GLOO_SOCKET_IFNAME=self.interface, **environment)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _kill_inside(namespace: str) -> None:
    """End what is left of a job: workers are in sessions of their own, so a dead launcher does not take them along."""
    with suppress(subprocess.CalledProcessError):
        for process in _ip("netns", "pids", namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


@contextmanager
def _cable(names: Sequence[str]) -> Iterator[list[str]]:
    """The addresses of two new namespaces; OSError or CalledProcessError where they are not to be had."""
    made, addresses = [], ["10.213.0.1", "10.213.0.2"]
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        # Made inside a namespace, so the machine's own network never sees it, and goes when the namespace goes.
        _ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for interface in ("lo", "cable"):
                _ip("-n", name, "link", "set", interface, "up")
        yield addresses
    finally:
        for name in made:
            _kill_inside(name)
            _ip("netns", "delete", name)


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two nodes, in networks of their own if root and the kernel allow it."""
    names = [f"qtarget-{os.getpid()}-{rank}" for rank in range(2)]
    with ExitStack() as stack:
        try:
            addresses = stack.enter_context(_cable(names))
            nodes = [Node(rank, "cable", addresses[0], 29500, name) for rank, name in enumerate(names)]
        except (OSError, subprocess.CalledProcessError):
            nodes = loopback_nodes()
        yield nodes


def loopback_nodes() -> list[Node]:
    """Two nodes that share the machine's loopback."""
    port = free_port()
    return [Node(rank, "lo", "127.0.0.1", port) for rank in range(2)]


def run_nodes(nodes: Sequence[Node], commands: Sequence[Sequence[str]], folder: Path, **environment: str) -> list[str]:
    """Start a launcher on every node and return what each wrote; RuntimeError if one of them fails or hangs."""
    logs = [folder / f"node{node.rank}.txt" for node in nodes]
    jobs = [node.start(command, log, **environment) for node, command, log in zip(nodes, commands, logs, strict=True)]
    deadline = time.monotonic() + _TIMEOUT
    try:
        # The others would wait a long time for a node that has failed.
        while any(job.poll() is None for job in jobs) and not any(job.poll() for job in jobs):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [job.poll() for job in jobs]
    finally:
        for job in jobs:
            end(job)
    texts = [log.read_text() for log in logs]
    if any(codes) or None in codes:
        tails = "\n".join(f"--- node {node.rank}\n{text[-4000:]}" for node, text in zip(nodes, texts, strict=True))
        raise RuntimeError(f"exit codes {codes} (None: still running)\n{tails}")
    return texts
