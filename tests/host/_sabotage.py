"""Takes safeguards out of a running server, for tests that show that other tests would notice, and makes it do often
what it does rarely.

`sabotage(directory)` gives the environment for a server that a test changes by making a file in `directory`, and
changes back by removing it. It works through `sitecustomize`, which Python imports in every process that it starts."""

from __future__ import annotations

import os
from pathlib import Path

ROW_UPDATES = "row-updates"
"""Hosts do not write down what owners tell them of their request rows."""
REWRITTEN_ROWS = "rewritten-rows"
"""Owners do not note that a row has other entries than the hosts know."""
RANDOM_CUTS = "random-cuts"
"""Batches that have layers elsewhere are cut into pieces anywhere; segments are executed in slices of any layers."""
SPOILED_LAYER = "spoiled-layer"
"""A bit of a layer's parameters is turned, once: the file has the numbers of replica and layer, and is removed then.
What is turned twice is as before."""
BROKEN_FORWARD = "broken-forward"
"""The replica whose number is in the file fails in its next batch."""
BROKEN_SEGMENT = "broken-segment"
"""The replica whose number is in the file fails in the next segment that it executes for another, once: the file is
removed then."""
BROKEN_HOME = "broken-home"
"""The replica whose number is in the file fails to attend to KV that it has lent, by messages, once: the file is
removed then."""
FAULT_IN_PHASE = "fault-in-phase"
"""A process gets a signal, once: the file has the process (replica and rank, or `controller`), a phase, the moment
(`begin`, when its order comes, or `end`, before it is answered) and the number of the signal, and is removed then. The
controller gets it when it has sent the orders of the phase."""
REFUSAL_IN_PHASE = "refusal-in-phase"
"""All ranks of the replica whose number is in the file refuse the phase that is named behind it."""
LIMITED_COPIES = "limited-copies"
"""KV that changes its home is copied as little at a time as it can be, and by each rank no more once it has copied the
bytes that the file says, for as long as there is one."""
UNSENT_ANSWERS = "unsent-answers"
"""No answer leaves the replica whose number is in the file any more: as if its sockets had not come to send them."""
POISONED_TOKEN = "poisoned-token"
"""The embedding of the token whose id is in the file is NaN, for as long as there is one."""
OTHER_MACHINE = "other-machine"
"""The replicas whose numbers are in the file when the server starts say that they are on another machine, and all map
memory within one and use it by messages between the two."""

_SITECUSTOMIZE = """
import importlib.abc, importlib.util, itertools, os, random, signal, sys

DIRECTORY = os.path.dirname(__file__)
METHODS = {
    "kunserve_sgl.integration.runner.request_rows": [
        ("KunserveReqToTokenPool", "apply_update", "row-updates"), ("KunserveReqToTokenPool", "enter", "row-updates")
    ],
    "kunserve_sgl.exchange.row_ledger": [
        ("RowLedger", "rewritten", "rewritten-rows"), ("RowLedger", "rewritten_from", "rewritten-rows")
    ],
    "kunserve_sgl.replica.kv_copy": [],
    "kunserve_sgl.replica.own_batches": [],
    "kunserve_sgl.replica.segment_server": [],
    "kunserve_sgl.exchange.attention_service": [],
    "kunserve_sgl.replica.layer_times": [],
    "kunserve_sgl.replica.place": [],
    "kunserve_sgl.integration.launcher.server_args": [],
    "kunserve_sgl.replica.transition_agent": [],
    "kunserve_sgl.control.transition": [],
    "kunserve_sgl.control.recovery": [],
    "kunserve_sgl.integration.scheduler.scheduler": [],
}


def unless_taken_out(method, name):
    def call(*args, **kwargs):
        if not os.path.exists(os.path.join(DIRECTORY, name)):
            return method(*args, **kwargs)
    return call


def cut_anywhere(sizes):
    def piece_sizes(amount, *args):
        if not os.path.exists(os.path.join(DIRECTORY, "random-cuts")):
            return sizes(amount, *args)
        tokens = amount.tokens
        borders = [0, *sorted(random.sample(range(1, tokens), random.randrange(min(5, tokens)))), tokens]
        return tuple(end - start for start, end in itertools.pairwise(borders))
    return piece_sizes


def slice_anywhere(slice_end):
    def end_of(start, end, *args):
        if not os.path.exists(os.path.join(DIRECTORY, "random-cuts")):
            return slice_end(start, end, *args)
        return random.randint(start + 1, end)
    return end_of


def fails_where_told(forward):
    def call(own_batches, batch):
        path = os.path.join(DIRECTORY, "broken-forward")
        if os.path.exists(path):
            with open(path) as file:
                if file.read() == str(own_batches._link.replica):
                    raise RuntimeError("this batch fails, as the test says")
        return forward(own_batches, batch)
    return call


def fails_once_where_told(serve, what, replica_of):
    def call(server, *args):
        path = os.path.join(DIRECTORY, f"broken-{what}")
        if os.path.exists(path):
            with open(path) as file:
                is_meant = file.read() == str(replica_of(server))
            if is_meant:
                os.remove(path)
                raise RuntimeError(f"this {what} fails, as the test says")
        return serve(server, *args)
    return call


def spoils_where_told(process):
    def call(scheduler, *args):
        path = os.path.join(DIRECTORY, "spoiled-layer")
        if os.path.exists(path):
            with open(path) as file:
                replica, layer = map(int, file.read().split())
            if replica == scheduler.ps.dp_rank:
                scheduler.tp_worker.model_runner.kunserve_memory.parameters.region(layer)[0] ^= 1
                os.remove(path)
        return process(scheduler, *args)
    return call


def sends_nothing_where_told(process):
    def call(scheduler, *args):
        if told("unsent-answers") == str(scheduler.ps.dp_rank):
            scheduler.ipc_channels.send_to_detokenizer.send_output = lambda *args: None
        return process(scheduler, *args)
    return call


def poisons_where_told(process):
    kept = {}  # of a row of the embedding, by its number

    def call(scheduler, *args):
        token = told("poisoned-token")
        if bool(token) != bool(kept):
            embedding = scheduler.tp_worker.model_runner.model.model.embed_tokens
            rows = embedding.weight.data
            if token:
                row = int(token) - embedding.shard_indices.org_vocab_start_index
                kept[row] = rows[row].clone() if 0 <= row < embedding.num_org_embeddings_per_partition else None
            for row, values in kept.items():
                if values is not None:
                    rows[row] = float("nan") if token else values
            if not token:
                kept.clear()
        return process(scheduler, *args)
    return call


def told(name):
    try:
        with open(os.path.join(DIRECTORY, name)) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def fault(*where):
    what, _, number = told("fault-in-phase").rpartition(" ")
    if what == " ".join(map(str, where)):
        os.remove(os.path.join(DIRECTORY, "fault-in-phase"))
        os.kill(os.getpid(), int(number))


def fails_to_begin(on_order):
    def call(agent, order):
        if told("refusal-in-phase") == f"{agent._replica} {order.phase.value}":
            from kunserve_sgl.control.messages import OrderReply, Result
            who = agent._replica, agent._rank
            agent._reply(OrderReply(order.transition, order.phase, *who, Result.REFUSED, "as the test says"))
            return
        fault(agent._replica, agent._rank, order.phase.value, "begin")
        on_order(agent, order)
    return call


def fails_to_end(finish_phase):
    def call(agent, active):
        fault(agent._replica, agent._rank, active.phase.value, "end")
        finish_phase(agent, active)
    return call


def fails_with_nothing_to_do(begin_refusal):
    def call(agent, order):
        answer = begin_refusal(agent, order)
        from kunserve_sgl.control.messages import Result
        if answer is not None and answer[0] is Result.APPLIED:
            fault(agent._replica, agent._rank, order.phase.value, "end")
        return answer
    return call


def fails_having_ordered(begin):
    def call(transition, phase):
        begin(transition, phase)
        fault("controller", phase.value, "begin")
    return call


def copies_where_told(chunk_bytes):
    def call(pace, is_serving):
        path = os.path.join(DIRECTORY, "limited-copies")
        if not os.path.exists(path):
            return chunk_bytes(pace, is_serving)
        with open(path) as file:
            limit, limited_by = int(file.read() or 0), os.fstat(file.fileno()).st_mtime_ns
        if getattr(pace, "limited_by", None) != limited_by:
            pace.limited_by, pace.limited_from = limited_by, pace.copied_bytes
        return 1024 if pace.copied_bytes - pace.limited_from < limit else 0
    return call


def names_another_machine(machine_of):
    def call(directory):
        import setproctitle
        replica = setproctitle.getproctitle().partition("_DP")[2].partition("_")[0]
        return machine_of(directory) + " elsewhere" * (replica in told("other-machine").split())
    return call


def takes_messages_between_machines(choose):
    def call(server_args):
        choose(server_args)
        if told("other-machine"):
            server_args.override("test", kunserve_lacks_access=True, kunserve_activations="collective")
    return call


def change(module):
    for owner, method, name in METHODS[module.__name__]:
        cls = getattr(module, owner)
        setattr(cls, method, unless_taken_out(getattr(cls, method), name))
    if module.__name__.endswith(".own_batches"):
        module.OwnBatches.forward = fails_where_told(module.OwnBatches.forward)
        module.piece_sizes = cut_anywhere(module.piece_sizes)
    if module.__name__.endswith(".segment_server"):
        cls = module.SegmentServer
        cls._segment = fails_once_where_told(cls._segment, "segment", lambda server: server._link.replica)
    if module.__name__.endswith(".attention_service"):
        cls = module.AttentionService
        cls._serve = fails_once_where_told(cls._serve, "home", lambda service: service._replica)
    if module.__name__.endswith(".scheduler"):
        cls = module.KunserveScheduler
        cls.process_input_requests = spoils_where_told(cls.process_input_requests)
        cls.process_input_requests = poisons_where_told(cls.process_input_requests)
        cls.process_input_requests = sends_nothing_where_told(cls.process_input_requests)
    if module.__name__.endswith(".transition_agent"):
        module.TransitionAgent.on_order = fails_to_begin(module.TransitionAgent.on_order)
        module.TransitionAgent._finish_phase = fails_to_end(module.TransitionAgent._finish_phase)
        module.TransitionAgent._begin_refusal = fails_with_nothing_to_do(module.TransitionAgent._begin_refusal)
    if module.__name__.endswith("control.transition"):
        module.Transition._begin = fails_having_ordered(module.Transition._begin)
    if module.__name__.endswith("control.recovery"):
        module.Recovery._begin = fails_having_ordered(module.Recovery._begin)
    if module.__name__.endswith(".kv_copy"):
        module.CopyPace.chunk_bytes = copies_where_told(module.CopyPace.chunk_bytes)
    if module.__name__.endswith("replica.place"):
        module.machine_of = names_another_machine(module.machine_of)
    if module.__name__.endswith("launcher.server_args"):
        module.choose_remote_attention = takes_messages_between_machines(module.choose_remote_attention)
    if module.__name__.endswith(".layer_times"):
        module.slice_end = slice_anywhere(module.slice_end)


class Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        change(module)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname not in METHODS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        spec.loader = Loader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
for name in [*METHODS]:
    if name in sys.modules:  # a server of `preloaded.py`
        change(sys.modules[name])
"""


def sabotage(directory: Path) -> dict[str, str]:
    (directory / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return {"PYTHONPATH": os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])}


def order_fault(switches: Path, process: str, phase: str, moment: str, number: int) -> None:
    """Lets a process get a signal in a phase; see FAULT_IN_PHASE. The file is there until it has."""
    new = switches / "new"
    new.write_text(f"{process} {phase} {moment} {number}")
    new.rename(switches / FAULT_IN_PHASE)


def spoil(switches: Path, replica: int, layer: int) -> None:
    """Turns a bit of a layer that is resident at a replica of one rank, before it does what it is asked next."""
    new = switches / "new"
    new.write_text(f"{replica} {layer}")
    new.rename(switches / SPOILED_LAYER)
