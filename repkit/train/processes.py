"""Several processes that train as one: how they find each other, agree, and end when one of them is lost.

    REPKIT_COORDINATOR=host:port REPKIT_PROCESSES=4 REPKIT_PROCESS=0 repkit train ...   # on each host, its own number
    srun --ntasks=4 repkit train ...                                                    # under SLURM, as it is

On Kubernetes, an indexed job gives `JOB_COMPLETION_INDEX` in the place of `REPKIT_PROCESS`; on GKE's TPU slices, the
`TPU_WORKER_*` variables say everything.
"""

import contextlib
import os
import re
import select
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from repkit.checks import InputError

EXIT_LOST_PEER = 80
"""Exit code of a process whose peer is gone. No standard gives it another meaning."""

LOST_AFTER = 20.0
"""Seconds of silence after which a peer counts as lost. One that was killed is noticed at once."""

_PORT, _SLURM_PORTS = 8476, (61440, 4096)
_BEAT, _BYE = b".", b"b"
_GRACE = 3.0


class Cluster(NamedTuple):
    """Which process this one is, of how many, and where the first one is.

    Attributes:
        coordinator: host and port of process 0.
        process: number of this process, from 0.
        processes: how many there are.
    """

    coordinator: str
    process: int
    processes: int


def cluster_from(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that environment variables describe; None where this is the only process.

    Args:
        environment: such as `os.environ`. Our own variables count before those of SLURM, and these before GKE's.

    Raises:
        InputError: variables that contradict one another, or of which some are missing.

    Example:
        >>> slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_NODELIST": "gpu[03-04]"}
        >>> cluster_from(slurm)
        Cluster(coordinator='gpu03:61447', process=1, processes=2)
    """
    if "REPKIT_COORDINATOR" in environment or "REPKIT_PROCESSES" in environment:
        count = _number(environment, "REPKIT_PROCESSES")
        own, job = "REPKIT_PROCESS", "JOB_COMPLETION_INDEX"
        name = job if job in environment and own not in environment else own
        return _checked(environment.get("REPKIT_COORDINATOR", ""), _number(environment, name), count)
    # An interactive allocation has tasks, but a process in it that srun did not start has no number.
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
        first, span = _SLURM_PORTS
        port = first + _number(environment, "SLURM_JOB_ID") % span
        count = _number(environment, "SLURM_NTASKS")
        return _checked(f"{_first_host(nodes)}:{port}", _number(environment, "SLURM_PROCID"), count)
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1:
        return _checked(f"{hosts[0]}:{_PORT}", _number(environment, "TPU_WORKER_ID"), len(hosts))
    return None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise InputError(f"several processes need {name} to be a number from 0, got {text!r}")
    return int(text)


def _checked(coordinator: str, process: int, processes: int) -> Cluster | None:
    if not re.fullmatch(r"[^:\s]+:\d{1,5}", coordinator):
        raise InputError(f"several processes need REPKIT_COORDINATOR to be host:port of process 0, got {coordinator!r}")
    if not process < processes:
        raise InputError(f"process {process} is none of {processes}; they are numbered from 0")
    return Cluster(coordinator, process, processes) if processes > 1 else None


def _first_host(nodes: str) -> str:
    """The first of SLURM's nodes, such as 'gpu[003-006,9],other'."""
    match = re.match(r"([^,\[\s]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise InputError(f"several processes need SLURM_NODELIST, got {nodes!r}")
    return match[1] + (match[2] or "")


def join(cluster: Cluster, *, seconds: int = 300) -> None:
    """Makes this process one of the cluster; before anything else of JAX runs.

    Args:
        cluster: the cluster.
        seconds: how long to wait for the others.

    Raises:
        InputError: they did not come.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself; `repkit.train.interrupt` does.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            initialization_timeout=seconds,
            # Later than ours, which says more.
            heartbeat_timeout_seconds=round(3 * LOST_AFTER),
            shutdown_timeout_seconds=30,
        )
    except RuntimeError as error:
        raise InputError(
            f"process {cluster.process} of {cluster.processes} found no cluster at {cluster.coordinator} within "
            f"{seconds} s: {str(error).splitlines()[0][:200]}"
        ) from error


def barrier(name: str, *, seconds: float = 600.0) -> None:
    """Returns when all processes have come here; ends this one if they have not in time.

    Args:
        name: of the place, the same on all.
        seconds: how long to wait.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    text = f"not all of {jax.process_count()} processes came to '{name}' within {seconds:g} s"
    timer = threading.Timer(seconds, lambda: _end(text))
    timer.daemon = True
    timer.start()
    try:
        multihost_utils.sync_global_devices(name)
    finally:
        timer.cancel()


def from_first(value: int) -> int:
    """The value that the first process has."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def largest(value: int) -> int:
    """The largest of the values that the processes have."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(value)).max())


def on_this_process(tree: Any) -> Any:
    """Arrays that every process holds in full, as arrays of this process alone; others are gathered."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    def local(x: jax.Array) -> Any:
        if x.is_fully_replicated:
            return x.addressable_data(0)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(local, tree)


class Peers:
    """Ends this process when another one is lost, with a line that says which, and `EXIT_LOST_PEER`.

    Every process holds a connection to the first, which breaks at once when one end is killed, and is given up after
    `LOST_AFTER` seconds of silence when a machine or the network is gone. The first then ends, and the others with it.
    A process that leaves with an exception is lost as well: the others could not go on without it.

    Args:
        cluster: where the processes are; None where there is but one, which has no peers.
    """

    def __init__(self, cluster: Cluster | None):
        self._cluster = cluster
        self._connections: dict[int, socket.socket] = {}
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._cluster is not None:
            self._connections = _connected(self._cluster)
            self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if error is not None:
            self._leave_because_of(error)
        elif self._cluster is not None:
            # Nobody leaves before all have come to the end.
            barrier("the end", seconds=60)
            self._leave(_BYE)

    @contextlib.contextmanager
    def left_on_error(self) -> Iterator[None]:
        """Leaves at once when an exception comes, so that the others end before anything here waits for them."""
        try:
            yield
        except BaseException as error:
            self._leave_because_of(error)
            raise

    def _leave_because_of(self, error: BaseException) -> None:
        # Exchanges between devices fail when a peer is gone. Then that is to be said, and the watch is about to.
        is_failed_exchange = isinstance(error, jax.errors.JaxRuntimeError) or type(error) is ValueError
        if is_failed_exchange and self._thread is not None and not self._leaving.is_set():
            self._thread.join(LOST_AFTER + 2 * _GRACE)
        self._leave(b"")

    def _leave(self, word: bytes) -> None:
        self._leaving.set()
        if self._thread is not None:
            self._thread.join()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(word)
            connection.close()
        self._connections = {}

    def _watch(self) -> None:
        heard = dict.fromkeys(self._connections, monotonic())
        peers = {connection: process for process, connection in self._connections.items()}
        sent = 0.0
        while peers and not self._leaving.is_set():
            if monotonic() - sent > 1:
                for connection in peers:
                    with contextlib.suppress(OSError):  # It is noticed where it is read.
                        connection.sendall(_BEAT)
                sent = monotonic()
            readable, _, _ = select.select(list(peers), [], [], 0.2)
            for connection in readable:
                heard[peers[connection]] = monotonic()
                content = _received(connection)
                if _BYE in content:
                    del peers[connection]
                elif not content and not self._leaving.is_set():
                    self._lost(peers[connection], "has ended")
            for process in peers.values():
                if monotonic() - heard[process] > LOST_AFTER:
                    self._lost(process, f"was silent for {LOST_AFTER:g} s")

    def _lost(self, process: int, how: str) -> None:
        # What ends one process often ends all: then each says why itself.
        if self._leaving.wait(_GRACE):
            return
        _end(f"process {process} {how}; the newest checkpoint is as it was, --resume continues")


def _end(text: str) -> None:
    sys.stdout.flush()
    os.write(2, f"repkit: process {jax.process_index()} ends: {text}\n".encode())
    os._exit(EXIT_LOST_PEER)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1024)
    except OSError:
        return b""


def _connected(cluster: Cluster) -> dict[int, socket.socket]:
    """The first process's connections to all others, or this one's to the first, by process."""
    host = cluster.coordinator.rpartition(":")[0]
    if cluster.process > 0:
        connection = socket.create_connection((host, from_first(0)), timeout=60)
        connection.sendall(cluster.process.to_bytes(4, "big"))
        connection.settimeout(None)
        return {0: connection}
    with socket.create_server(("", 0), backlog=cluster.processes) as server:
        server.settimeout(60)
        from_first(server.getsockname()[1])
        connections: dict[int, socket.socket] = {}
        while len(connections) < cluster.processes - 1:
            process, connection = _accepted(server)
            if process in connections or not 0 < process < cluster.processes:
                connection.close()  # Somebody who does not belong here.
            else:
                connections[process] = connection
        return connections


def _accepted(server: socket.socket) -> tuple[int, socket.socket]:
    connection, _ = server.accept()
    connection.settimeout(60)
    number = b""
    while len(number) < 4:
        received = connection.recv(4 - len(number))
        if not received:
            break
        number += received
    connection.settimeout(None)
    return int.from_bytes(number, "big"), connection


def described_processes() -> list[str]:
    """Host and devices of every process, and behind a semicolon its versions; all processes must call it."""
    from jax.experimental import multihost_utils

    versions = f"Python {sys.version.split()[0]}, jax {jax.__version__}"
    line = f"{socket.gethostname()}, {len(jax.local_devices())} device(s); {versions}"
    row = np.frombuffer(line.encode()[:200].ljust(200), np.uint8)
    return [bytes(each).decode(errors="replace").strip() for each in multihost_utils.process_allgather(row)]
