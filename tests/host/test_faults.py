"""Processes are killed and stopped in each phase of transitions and recoveries, under load: each ends as docs/faults.md
says, in time, and all is as before in the end.

The whole matrix is run by `make matrix`; without it there is a part in which each phase, role and fault comes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from _deployments import FAULTS_2, FAULTS_3, FAULTS_BOTH_WAYS, FAULTS_BY_MESSAGE, FAULTS_RANKS, Deployment
from _faults import PHASES, Case, Fault, Role, Way, cases, run, run_to_the_end
from _questions import Question, make_prompt
from _servers import RunningServer

pytestmark = [pytest.mark.server]

_CHANCE = random.Random(31)
# Half of them for the owner, half for anybody.
QUESTIONS = [
    Question(make_prompt(_CHANCE, _CHANCE.randrange(5, 200)), _CHANCE.randrange(20, 60) // 2, (1, None)[place % 2])
    for place in range(12)
]
KILL, STOP = Fault.KILL, Fault.STOP
OWNER, HOST, CONTROLLER = Role.OWNER, Role.HOST, Role.CONTROLLER

SAMPLE: dict[Deployment, Sequence[Case]] = {
    FAULTS_3: (
        Case(Way.DROP, "prepare", HOST, KILL),
        Case(Way.PARTIAL_DROP, "switch", OWNER, KILL),
        Case(Way.DROP, "release", OWNER, KILL, "end"),
        Case(Way.PARTIAL_DROP, "resume", HOST, KILL),
        Case(Way.RESTORE, "prepare", OWNER, KILL),
        Case(Way.RESTORE, "load", HOST, KILL),
        Case(Way.BACK_FROM_DROP, "revert", OWNER, KILL),
        Case(Way.BACK_FROM_RESTORE, "undo", HOST, KILL),
        Case(Way.BACK_FROM_DROP, "reopen", HOST, KILL),
        Case(Way.RECOVERY, "abandon", HOST, KILL),
        Case(Way.RECOVERY, "reload", OWNER, KILL),
        Case(Way.RECOVERY, "revive", HOST, KILL),
        Case(Way.DROP, "prepare", OWNER, STOP),
        Case(Way.PARTIAL_DROP, "switch", HOST, STOP),
        Case(Way.DROP, "release", CONTROLLER, STOP),
        Case(Way.RESTORE, "load", CONTROLLER, KILL),
    ),
    FAULTS_BY_MESSAGE: (
        Case(Way.RESTORE, "load", HOST, STOP),
        Case(Way.RECOVERY, "reload", OWNER, KILL),
    ),
    FAULTS_BOTH_WAYS: (
        Case(Way.DROP, "release", OWNER, KILL),
        Case(Way.BACK_FROM_DROP, "revert", HOST, KILL),
        Case(Way.RECOVERY, "reload", HOST, KILL),
    ),
    FAULTS_RANKS: (
        Case(Way.PARTIAL_RESTORE, "release", OWNER, KILL),
        Case(Way.RECOVERY, "abandon", HOST, STOP),
    ),
}
assert {(case.phase) for each in SAMPLE.values() for case in each} == {
    phase for phases in PHASES.values() for phase in phases
}


def _parameters() -> list[object]:
    """All cases with all deployments; those that are not in the sample are marked."""
    found: list[object] = []
    for deployment in (FAULTS_2, FAULTS_3, FAULTS_BY_MESSAGE, FAULTS_BOTH_WAYS, FAULTS_RANKS):
        sample = SAMPLE.get(deployment, ())
        for case in [*sample, *(each for each in cases() if each not in sample)]:
            marks = [] if case in sample else [pytest.mark.matrix]
            if (case.role, case.fault) == (CONTROLLER, KILL):
                marks.append(pytest.mark.ends_server)
            found.append(pytest.param(deployment, case, id=f"{deployment.name}-{case}", marks=marks))
    return found


@pytest.mark.parametrize(("deployment", "case"), _parameters(), indirect=["deployment"], scope="session")
def test_a_fault_in_a_phase(server: RunningServer, case: Case) -> None:
    if (case.role, case.fault) == (CONTROLLER, KILL):
        run_to_the_end(server, case, QUESTIONS)
    else:
        run(server, case, QUESTIONS)
