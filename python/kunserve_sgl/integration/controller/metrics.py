"""The `kunserve:` metrics, beside SGLang's on /metrics: written by the data-parallel controller, where all is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kunserve_sgl.args import RemoteAttentionBy
from kunserve_sgl.control.answers import State
from kunserve_sgl.control.autopilot import Autopilot
from kunserve_sgl.control.coordinator import Coordinator
from kunserve_sgl.control.messages import LoadReport
from kunserve_sgl.control.transition import End, Transition
from kunserve_sgl.integration.rejection_metric import rejection_counter
from kunserve_sgl.policy.drop_plan import PlanCost

UPDATE_INTERVAL_S = 0.25
_KINDS = {State.DROPPING: "drop", State.RESTORING: "restore", State.MERGED: "exchange", State.LENDING: "lend"}
_SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Takes what happens; `update` brings the gauges in step, at most four times a second."""

    def __init__(self, model_name: str, ranks: int, clock: Callable[[], float]) -> None:
        # Only now: the import looks for the directory that all processes of the server share, which SGLang has set.
        from prometheus_client import Counter, Gauge, Histogram

        self._model_name = model_name
        self._ranks = ranks
        self._clock = clock
        self._next_s = float("-inf")
        self._maps: Sequence[Sequence[bool]] = ()
        self._counted: dict[tuple[str, ...], float] = {}

        def gauge(name: str, text: str, *labels: str) -> Any:
            return Gauge(f"kunserve:{name}", text, ["model_name", *labels], multiprocess_mode="mostrecent")

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"kunserve:{name}", text, ["model_name", *labels])

        def seconds(name: str, text: str, *labels: str) -> Any:
            return Histogram(f"kunserve:{name}", text, ["model_name", *labels], buckets=_SECONDS_BUCKETS)

        self._state = gauge("state", "1 for the state that the deployment is in, 0 for the others.", "state")
        self._epoch = gauge("epoch", "Number of the plan that holds.")
        self._group = gauge("group_replicas", "Replicas in this replica's group.", "replica")
        self._stalled = gauge("stalled", "1 while this replica has work and makes no progress.", "replica")
        self._capacity = gauge("capacity_tokens", "KV slots of this replica.", "replica")
        self._demand = gauge(
            "demand_tokens",
            "KV slots that requests need: used by running ones, expected growth of these, and for queued ones.",
            *("replica", "part"),
        )
        self._remote = gauge(
            "remote_tokens",
            "KV tokens attended by messages or mapped memory: in slots of which a layer runs elsewhere than its KV is.",
            "replica",
        )
        self._forecast = gauge("forecast_tokens", "The demand at the horizon.", "replica")
        self._transitions = counter("transitions", "Transitions that have ended.", "kind", "outcome")
        self._phases = seconds("phase_seconds", "Time that a phase of a transition took.", "kind", "phase")
        self._pauses = seconds("pause_seconds", "Longest pause of a rank in a transition.", "kind")
        self._dropped = counter("dropped_bytes", "Parameters dropped, over all ranks.")
        self._restored = counter("restored_bytes", "Parameters restored, over all ranks.")
        self._exchanged = counter("exchanged_bytes", "KV that has gone to where it is read, over all ranks.")
        self._decisions = counter("decisions", "What the automatic mode has decided.", "decision")
        self.on_rejected = rejection_counter(model_name)  # of the coordinator; those of ranks are added to them
        self._sent = counter("batches_sent", "Own batches that had layers elsewhere.", "replica")
        self._restarts = counter("restarts", "Times that the replica has been started again.", "replica")
        self._served = counter("batches_served", "Batches of others that were executed here.", "replica")
        text = (
            "Orders of a replica to attend to KV at a peer, one per layer of a batch. Of rank 0, as SGLang's metrics "
            "are; each rank of the replica has as many."
        )
        self._attention = counter("remote_attention", text, "replica", "peer")
        text = "1 for the way in which a replica uses the memory of a peer, 0 for the other."
        self._peer_memory = gauge("peer_memory", text, "replica", "peer", "way")

    def on_report(self, report: LoadReport) -> None:
        """Takes in a replica's report."""
        replica, load = str(report.replica), report.load
        self._capacity.labels(self._model_name, replica).set(load.capacity_tokens)
        parts = {"running": load.used_tokens, "growth": load.growth_tokens, "queued": load.queued_tokens}
        for part, tokens in parts.items():
            self._demand.labels(self._model_name, replica, part).set(tokens)
        self._remote.labels(self._model_name, replica).set(report.remote_tokens)
        self._count(self._sent, ("sent", replica), (replica,), report.batches_sent)
        self._count(self._served, ("served", replica), (replica,), report.batches_served)
        for each in load.attention:
            peer = str(each.home)
            self._count(self._attention, ("attention", replica, peer), (replica, peer), each.orders)

    def on_transition(self, kind: State, transition: Transition, cost: PlanCost) -> None:
        """Counts a transition that has ended."""
        name = _KINDS[kind]
        assert transition.end is not None
        self._transitions.labels(self._model_name, name, transition.end.value).inc()
        for phase, seconds in transition.phase_seconds.items():
            self._phases.labels(self._model_name, name, phase.value).observe(seconds)
        self._pauses.labels(self._model_name, name).observe(transition.longest_pause_s)
        self._dropped.labels(self._model_name).inc(transition.freed_bytes)
        if transition.end is End.SUCCEEDED:
            self._restored.labels(self._model_name).inc(cost.loaded_bytes * self._ranks)

    def on_restart(self, replica: int) -> None:
        """Counts a replica that is started again."""
        self._restarts.labels(self._model_name, str(replica)).inc()

    def update(self, coordinator: Coordinator, autopilot: Autopilot) -> None:
        """Brings the gauges in step. It is called whenever the controller wakes up."""
        if self._clock() < self._next_s:
            return
        self._next_s = self._clock() + UPDATE_INTERVAL_S
        status: Mapping[str, Any] = coordinator.status()
        for state in State:
            self._state.labels(self._model_name, state.value).set(status["state"] == state.value)
        self._epoch.labels(self._model_name).set(status["epoch"])
        if "exchange" in status:
            self._count(self._exchanged, ("exchanged",), (), status["exchange"]["moved_bytes"])
        for member in status["members"]:
            self._group.labels(self._model_name, str(member["id"])).set(len(member["group"]))
            self._stalled.labels(self._model_name, str(member["id"])).set(member["stalled"])
        if (maps := coordinator.maps) is not self._maps:
            self._maps = maps
            self._tell_ways(maps)
        for replica, forecast in autopilot.forecasts().items():
            self._forecast.labels(self._model_name, str(replica)).set(forecast.ahead_tokens)
        for act, count in autopilot.decisions.items():
            self._count(self._decisions, ("decision", act.value), (act.value,), count)

    def _tell_ways(self, maps: Sequence[Sequence[bool]]) -> None:
        for replica, peer in itertools.permutations(range(len(maps)), 2):
            used = RemoteAttentionBy.MAP if maps[replica][peer] else RemoteAttentionBy.MESSAGE
            for way in (RemoteAttentionBy.MAP, RemoteAttentionBy.MESSAGE):
                self._peer_memory.labels(self._model_name, str(replica), str(peer), way.value).set(way is used)

    def _count(self, counter: Any, key: tuple[str, ...], labels: tuple[str, ...], total: float) -> None:
        """Brings a counter up to a number that is counted elsewhere."""
        counter.labels(self._model_name, *labels).inc(max(0.0, total - self._counted.get(key, 0.0)))
        self._counted[key] = total
