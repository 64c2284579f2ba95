"""A cluster of Ray on this machine, for servers that run their replicas as its actors."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from servers.server import ServerError

# How long Ray waits for its own processes, which it ends otherwise, where the machine has much else to do. And it is to
# end none because others on the machine take memory.
_PATIENCE = {
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_memory_monitor_refresh_ms": "0",
}
OBJECT_STORE_BYTES = 80 * 2**20  # about the least that Ray takes; servers put nothing large in it


class RayNodes:
    """Are the nodes of one cluster, each with room for one replica. The first one is the head."""

    def __init__(self, cluster: Any, directory: str) -> None:
        self._cluster = cluster
        self._directory = directory
        self._nodes: list[Any] = []

    @property
    def address(self) -> str:
        """What RAY_ADDRESS has to be for the cluster."""
        address: str = self._cluster.address
        return address

    def add(self) -> None:
        """Starts one more node, and waits until the cluster has it.

        Raises:
            ServerError: it does not start.
        """
        room = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": OBJECT_STORE_BYTES}
        how = {"temp_dir": self._directory, "env_vars": _PATIENCE}
        ports = {
            "include_dashboard": False,
            "dashboard_agent_listen_port": None,
        }  # which would be a fixed one at the head
        try:
            self._nodes.append(self._cluster.add_node(**room, **how, **ports))
        except (RuntimeError, OSError, TimeoutError) as error:
            raise ServerError(f"Ray has not started a node: {error}") from error

    def kill(self, number: int, *, with_workers: bool = True) -> None:
        """Kills a node, of which number 0 is the head, where the cluster's own processes live on; `with_workers` with
        all that runs on it, as when a machine goes down, else its raylet only, which its workers are to find out."""
        node = self._nodes[number]
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in (raylet, *(raylet.children(recursive=True) if with_workers else ())):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if number:
            self._cluster.remove_node(self._nodes.pop(number), allow_graceful=False)


@contextlib.contextmanager
def ray_nodes(count: int) -> Iterator[RayNodes]:
    """Starts so many nodes, and ends them with the block.

    Raises:
        ServerError: Ray is not installed, or does not start.
    """
    try:
        from ray._private.utils import get_ray_address_file
        from ray.cluster_utils import Cluster
    except ImportError:
        raise ServerError("Ray is not installed; it comes with: pip install -e '.[ray]'") from None
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        # Ray notes the address of the last cluster there, and makes the directory only where files of its own are.
        Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
        cluster = Cluster()
        nodes = RayNodes(cluster, directory)
        try:
            for _ in range(count):
                nodes.add()
            yield nodes
        finally:
            cluster.shutdown()
