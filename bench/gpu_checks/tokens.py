"""Checks of answers: against stock (F4), through a drop and a restore (F5), and through ten under load (F6)."""

from __future__ import annotations

import random

from gpu_checks.memory import nvidia_smi
from gpu_checks.place import CheckError, Place
from gpu_checks.runner import Result, Status, Table
from gpu_checks.serving import (
    ALL,
    CONTEXT_TOKENS,
    NO_GRAPHS,
    REPLICAS,
    agreement,
    ask,
    ask_all,
    command_of,
    medium,
    prompts,
    ready_controls,
    require_near,
    require_same_tokens,
    servers,
)
from long_run.watch import holdings, memory_of
from servers.server import ServerProcess
from servers.streams import Controls, Stream

# Natural-log units: what rounding does, where a kernel is chosen by the size of a batch. A wrong weight or slot changes
# far more.
_TOLERANCE = {"bfloat16": 0.15, "float32": 1e-3}
_KV_TOKENS = 16384
_MAX_SLOTS = 8388608  # of each replica: the second one's lie behind those that 32 bits can count elements of
_CYCLES, _RUNNERS, _STEADY_TOKENS = 10, 2, 8
_MOST_GROWTH_MIB = 256  # of a GPU's memory, over all cycles but the first


def check_one_replica(place: Place) -> Result:
    """F4: one replica over frames answers as stock does, with the graphs of both."""
    model = medium(place, "bfloat16")
    commands = {
        "F4-stock": command_of(place, model, 1, _KV_TOKENS, stock=True),
        "F4-ours": command_of(place, model, 1, _KV_TOKENS),
    }
    with servers(place, commands, place.start_s) as started:
        answers = {name: [ask(server, prompt) for prompt in prompts()] for name, server in started.items()}
    found = agreement(answers["F4-stock"], answers["F4-ours"])
    require_near("ours against stock", found, _TOLERANCE[model.spec.dtype])
    if not place.is_cuda:
        require_same_tokens("ours against stock", found)
    figures = {
        "model": model.name,
        "same tokens": f"{found.equal} of {found.answers} answers",
        "log probabilities off by at most": f"{found.worst:.1e}",
    }
    skipped = {} if place.is_cuda else {"graphs": "there are none on a CPU"}
    return Result(Status.PASSED, figures=figures, skipped=skipped)


def check_two_replicas(place: Place) -> Result:
    """F5: each replica gives the same tokens before a drop, merged, and restored; the second one as the first,
    although its slots have numbers above 8 million."""
    model = medium(place, "float32")
    flags = ["--kunserve-activations", "mapped", "--kunserve-max-slots", str(_MAX_SLOTS)]
    graphs = NO_GRAPHS if place.is_cuda else ()
    with servers(
        place, {"F5": command_of(place, model, REPLICAS, _KV_TOKENS, *flags, *graphs)}, place.start_s
    ) as started:
        server = started["F5"]
        controls = ready_controls(server)
        before = ask_all(server, controls)
        others = {"replica 1 against replica 0": agreement(before[0], before[1])}
        drop = controls.drop(ALL)
        merged = ask_all(server, controls)
        restore = controls.restore()
        restored = ask_all(server, controls)
    for replica in range(REPLICAS):
        others[f"replica {replica} merged"] = agreement(before[replica], merged[replica])
        others[f"replica {replica} restored"] = agreement(before[replica], restored[replica])
    for what, found in others.items():
        require_same_tokens(what, found)
        require_near(what, found, _TOLERANCE["float32"])
    rows = [[what, f"{found.equal} of {found.answers}", f"{found.worst:.1e}"] for what, found in others.items()]
    figures = {
        "model": model.name,
        "drop": f"{drop.answered_s - drop.ordered_s:.3f} s, {drop.answer['extension_slots']} slots gained",
        "restore": f"{restore.answered_s - restore.ordered_s:.3f} s",
    }
    return Result(
        Status.PASSED,
        figures=figures,
        tables=[Table("answers against those before a drop", ["what", "same tokens", "log probability off by"], rows)],
    )


def check_under_load(place: Place) -> Result:
    """F6: ten drops and restores while requests decode; afterwards graphs replay with the same answers, and memory,
    descriptors and ledger are as after the first."""
    model = medium(place, "bfloat16")
    skipped = {} if place.is_cuda else {"graphs, GPU memory": "there are none on a CPU"}
    flags = ["--kunserve-activations", "mapped"]
    with servers(place, {"F6": command_of(place, model, REPLICAS, _KV_TOKENS, *flags)}, place.start_s) as started:
        server = started["F6"]
        controls = ready_controls(server)
        before = ask_all(server, controls)
        seconds: dict[str, list[float]] = {"drop": [], "restore": []}
        held = []
        for cycle in range(_CYCLES):
            _cycle(server, controls, cycle, seconds)
            if cycle in (0, _CYCLES - 1):
                controls.wait_idle()
                held.append(_held(place, server, controls))
        after = ask_all(server, controls)
    for replica in range(REPLICAS):
        found = agreement(before[replica], after[replica])
        require_same_tokens(f"replica {replica} after {_CYCLES} drops and restores", found)
    first, last = held
    for name in ("memory", "descriptors"):
        if first[name] != last[name]:
            raise CheckError(f"{name} after the first cycle {first[name]}, after the last {last[name]}")
    figures = {
        "model": model.name,
        "cycles": str(_CYCLES),
        **{what: f"{min(each):.3f} to {max(each):.3f} s" for what, each in seconds.items()},
    }
    if place.is_cuda:
        grown_mib = int(str(last["gpu"])) - int(str(first["gpu"]))
        figures["GPU memory grown by"] = f"{grown_mib} MiB"
        if grown_mib > _MOST_GROWTH_MIB:
            raise CheckError(f"the GPU's memory has grown by {grown_mib} MiB; accepted: {_MOST_GROWTH_MIB}")
    return Result(Status.PASSED, figures=figures, skipped=skipped)


def _cycle(server: ServerProcess, controls: Controls, cycle: int, seconds: dict[str, list[float]]) -> None:
    """A drop and a restore, with requests that decode at both replicas before, between and after."""
    chance = random.Random(cycle)
    runners = [
        Stream(server.port, [chance.randrange(300, 2000) for _ in range(32)], CONTEXT_TOKENS // 2, replica)
        for replica in range(REPLICAS)
        for _ in range(_RUNNERS)
    ]
    for order in (lambda: controls.drop(ALL), controls.restore, lambda: None):
        for runner in runners:
            runner.wait_tokens(runner.tokens + _STEADY_TOKENS)
        ordered = order()
        if ordered is not None:
            seconds[ordered.action].append(ordered.answered_s - ordered.ordered_s)
    controls.abort(runners)


def _held(place: Place, server: ServerProcess, controls: Controls) -> dict[str, object]:
    """What must not grow: the ledgers, the schedulers' descriptors, and the GPU's memory in MiB."""
    descriptors = {
        title: each.descriptors for title, each in holdings(server).items() if title.startswith("sglang::scheduler")
    }
    found: dict[str, object] = {"memory": memory_of(controls.status()), "descriptors": descriptors}
    if place.is_cuda:
        found["gpu"] = nvidia_smi("memory.used")[0]
    return found
