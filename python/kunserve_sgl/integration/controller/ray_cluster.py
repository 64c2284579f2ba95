"""The controller's way into Ray: the cluster it connects to or starts, and a place there for each replica."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kunserve_sgl.control.addresses import is_host
from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.controller.nodes import Node, Nodes, await_place, living_nodes

# What Ray's workers get of the environment of the server; they have that of their node otherwise.
_HANDED_ON = (
    *("SGLANG_", "KUNSERVE_", "OMP_", "MKL_", "NCCL_", "GLOO_", "TORCH", "HF_", "CUTE_DSL_", "PYTHON"),
    "PROMETHEUS_",
)
_OBJECT_STORE_BYTES = 80 * 2**20  # about the least that Ray takes; nothing large goes through it
_PLACE_DEADLINE_S = 60.0


class RayCluster:
    """Holds the connection and the places of one server. Both end with this process, and the actors with them."""

    def __init__(self, server_args: Any) -> None:
        """Connects to the cluster of RAY_ADDRESS, or the one that runs on this machine, or starts one. Raises
        TransientError where there is none or no room."""
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # Ray reads it when it is imported
        import ray

        environment = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
        how: dict[str, Any] = {"runtime_env": {"env_vars": environment}, "configure_logging": False}
        try:
            try:
                ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **how)
            except ConnectionError:
                if "RAY_ADDRESS" in os.environ:
                    raise
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _temp_dir=str(Path(server_args.kunserve_directory, "ray")),
                    **how,
                )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = os.environ.get("RAY_ADDRESS", "this machine")
            raise TransientError(f"--use-ray: no cluster of Ray at {where}: {error}") from error
        from sglang.srt.ray import engine

        from kunserve_sgl.integration.attach.scheduler_actor import KunserveSchedulerActor

        engine.SchedulerActor = ray.remote(KunserveSchedulerActor)
        if server_args.device == "cpu":
            from kunserve_sgl.integration.cpu_platform import ray_mode

            ray_mode.install()
        self.node_ip: str = ray.util.get_node_ip_address()
        self.nodes: Nodes | None = None
        if server_args.is_on_network:
            if not is_host(self.node_ip):
                raise TransientError(f"--kunserve-control network: this node of Ray is at {self.node_ip}, not at IPv4")
            server_args.override("kunserve", kunserve_host=self.node_ip)
            self.nodes = Nodes(server_args)
        self._hosts: dict[int, str] = {}
        self._numbers: dict[int, str] = {}  # of the nodes that replicas have got
        self._own_number: str = ray.get_runtime_context().get_node_id()
        self.is_lost = False  # the node that this process is on has ended: Ray ends all that it has started
        self._group = _make_places(server_args)

    def host_of(self, replica: int) -> str | None:
        """Returns the address of the node that a replica is on; None where nobody has asked for its place."""
        return self._hosts.get(replica)

    def await_node(
        self, replica: int, is_given_up: Callable[[], bool], tell: Callable[[str | None], None]
    ) -> Node | None:
        """Waits until there is a place for a replica, and with a network for the node's agent. Returns None where the
        wait is given up, and without a network. `tell` gets the reason why it lasts. Raises TransientError, and what
        Ray raises."""
        number = await_place(self._group, replica, is_given_up, tell)
        if number is None:
            return None
        self._numbers[replica] = number
        if self.nodes is None:
            return None
        node = self.nodes.at(number)
        self._hosts[replica] = node.host
        return node

    def has_lost_node(self, replica: int) -> bool:
        """Tells whether the node that a replica has got has ended, as Ray says; sets `is_lost`, too. Raises what Ray
        raises."""
        living = living_nodes()
        self.is_lost |= self._own_number not in living
        return replica in self._numbers and self._numbers[replica] not in living

    def place(self, replica: int) -> tuple[Any, int]:
        """Returns the placement group, and the number of the bundle in it that is the replica's."""
        return self._group, replica


def _make_places(server_args: Any) -> Any:
    """Makes a bundle for each replica, so that one can go to another node when its own has ended."""
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.placement_group import placement_group

    bundle: Mapping[str, float] = {"CPU": 1, "GPU": server_args.tp_size}
    strategy = "STRICT_PACK" if server_args.kunserve_nodes == 1 else "SPREAD"
    group = placement_group([dict(bundle) for _ in range(server_args.dp_size)], strategy=strategy)
    try:
        ray.get(group.ready(), timeout=_PLACE_DEADLINE_S)
    except GetTimeoutError:
        wanted, there = group.bundle_specs, ray.cluster_resources()
        has = {what: there.get(what, 0.0) for what in sorted({*wanted[0], "CPU"})}
        raise TransientError(
            f"--use-ray: Ray has had no room for {server_args.dp_size} replicas for {_PLACE_DEADLINE_S:.0f} s: each "
            f"takes {wanted[0]}, by {strategy}; the cluster has {has} in all"
        ) from None
    return group
