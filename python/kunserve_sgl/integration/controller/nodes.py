"""The nodes of Ray that replicas are on, where these share no directory with the server: an agent on each, and what the
controller asks it. Calls wait for the network, with deadlines: only threads that follow actors make them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from kunserve_sgl.control.addresses import files_for_nodes, is_host
from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.attach.node_agent import NodeAgent, NodePlace, Remains, Sight, sight_of

logger = logging.getLogger(__name__)

_CALL_S = 20.0  # for an answer that takes an agent no time
_START_S = 120.0  # for Ray to start an agent
_WAIT_S = 5.0  # that an agent waits for the end of a process it has killed
_CALLS_AT_ONCE = 64  # of one agent; one of them lasts as long as it does
_POLL_S = 0.5


class NodeGoneError(TransientError):
    """Says that a node has ended as Ray says, and with it all processes that were there."""


class Node:
    """Is one node with an agent."""

    def __init__(self, number: str, agent: Any, place: NodePlace) -> None:
        """`number` is Ray's."""
        self.number = number
        self.host, self.directory, self.is_shared = place
        self._agent = agent
        self.until_gone: Any = agent.stay.remote()  # becomes ready, for Ray, when the agent ends

    def end(self, pid: int, started: str) -> bool:
        """Kills a process. Tells whether it has ended. Raises what Ray raises."""
        return bool(_result(self._agent.end.remote(pid, started, _WAIT_S), _WAIT_S + _CALL_S))

    def kill(self, pid: int, started: str) -> None:
        """Kills a process, and waits for nothing."""
        self._agent.end.remote(pid, started, 0.0)

    def remains(self, replica: int, rank: int, incarnation: int) -> Remains:
        """Returns what a rank has left that has ended. Raises what Ray raises."""
        found: Remains = _result(self._agent.remains.remote(replica, rank, incarnation), _CALL_S)
        return found

    def remove_files(self, replica: int, incarnation: int) -> None:
        """Removes the files of an incarnation that has ended, and waits for nothing."""
        self._agent.remove_files.remote(replica, incarnation)


class Nodes:
    """Knows the nodes by their numbers. It is used by many threads."""

    def __init__(self, options: Any) -> None:
        """`options` are those of the server; its keys and the coordinator's address are there when the first agent is
        started."""
        self._options = options
        self._known: dict[str, Node] = {}
        # By node: one agent is started there at a time, and who waits for another node waits for nothing else.
        self._locks: dict[str, threading.Lock] = {}

    def at(self, number: str) -> Node:
        """Returns the node, with an agent that lives; starts one where there is none. Raises NodeGoneError,
        TransientError where there is none within a deadline, and what Ray raises."""
        with self._locks.setdefault(number, threading.Lock()):
            node = self._known.get(number)
            if node is None or not self._lives(node):
                self.require_alive(number)
                node = self._known[number] = self._start(number)
            return node

    def require_alive(self, number: str) -> None:
        """Raises NodeGoneError where Ray says that the node has ended."""
        if number not in living_nodes():
            raise NodeGoneError(f"the node {number[:8]} of Ray has ended")

    def _lives(self, node: Node) -> bool:
        import ray

        ready, _ = ray.wait([node.until_gone], timeout=0)
        return not ready

    def _start(self, number: str) -> Node:
        import ray
        from ray.exceptions import GetTimeoutError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        agent: Any = (
            ray.remote(NodeAgent)
            .options(
                num_cpus=0,
                max_restarts=0,
                max_concurrency=_CALLS_AT_ONCE,
                scheduling_strategy=NodeAffinitySchedulingStrategy(number, soft=False),
            )
            .remote(self._sight(), files_for_nodes(self._options))
        )
        try:
            place = NodePlace(*_result(agent.place.remote(), _START_S))
        except GetTimeoutError:
            ray.kill(agent)
            raise TransientError(f"the node {number[:8]} of Ray has started no agent for {_START_S:.0f} s") from None
        if not is_host(place.host):
            ray.kill(agent)
            raise TransientError(f"a node of Ray is at {place.host}; accepted with a network: an address of IPv4")
        logger.info(
            "KunServe: node %s of Ray at %s: processes there use %s%s",
            *(number[:8], place.host, place.directory, ", as the server does" if place.is_shared else ""),
        )
        return Node(number, agent, place)

    def _sight(self) -> Sight:
        return sight_of(self._options.kunserve_directory)


def living_nodes() -> set[str]:
    """Returns the numbers of the nodes that have not ended, as Ray says. Raises what Ray raises."""
    import ray

    return {each["NodeID"] for each in ray.nodes() if each["Alive"]}


def await_place(
    group: Any, bundle: int, is_given_up: Callable[[], bool], tell: Callable[[str | None], None]
) -> str | None:
    """Waits until Ray has a place for `bundle` of a placement group; returns the number of the node, None where the
    wait is given up. Meanwhile `tell` gets the reason, and None when there is a place."""
    from ray.util import placement_group_table

    while not is_given_up():
        table = placement_group_table(group)
        if number := table["bundles_to_node_id"].get(bundle):
            tell(None)
            return str(number)
        tell(f"Ray has no room for it: it takes {table['bundles'].get(bundle, 'a place')} on one node")
        time.sleep(_POLL_S)
    return None


def _result(reference: Any, timeout_s: float) -> Any:
    import ray

    return ray.get(reference, timeout=timeout_s)
