"""A cluster of Ray on this machine, for servers that run their replicas as its actors."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from servers.server import ServerError

OBJECT_STORE_BYTES = 80 * 2**20  # about the least that Ray takes; servers put nothing large in it


@contextlib.contextmanager
def ray_nodes(count: int) -> Iterator[str]:
    """Starts so many nodes, each with room for one replica, and gives the address of the cluster for RAY_ADDRESS; ends
    them with the block.

    Raises:
        ServerError: Ray is not installed, or does not start.
    """
    try:
        from ray._private.utils import get_ray_address_file
        from ray.cluster_utils import Cluster
    except ImportError:
        raise ServerError("Ray is not installed; it comes with: pip install -e '.[ray]'") from None
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "temp_dir": directory}
        # Ray notes the address of the last cluster there, and makes the directory only where files of its own are.
        Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
        cluster = Cluster()
        try:
            try:
                for _ in range(count):
                    cluster.add_node(**node, include_dashboard=False)
            except (RuntimeError, OSError, TimeoutError) as error:
                raise ServerError(f"Ray has not started {count} nodes: {error}") from error
            yield cluster.address
        finally:
            cluster.shutdown()
