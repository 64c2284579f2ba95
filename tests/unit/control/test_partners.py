"""Who can be merged with whom, and how activations are handed over, by GPUs and by what a batch may have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_deployment import FakeDeployment, make_facts

from kunserve_sgl.args import Activations
from kunserve_sgl.control.answers import Verdict
from kunserve_sgl.control.messages import Device, Hello, Welcome
from kunserve_sgl.control.partners import choose_activations, islands, why_apart
from kunserve_sgl.errors import ConfigurationError

AUTO, MAPPED, COLLECTIVE = Activations.AUTO, Activations.MAPPED, Activations.COLLECTIVE
CPU = Device()
LONE_A, LONE_B = Device("a"), Device("b")
A, B = Device("a", ("b",)), Device("b", ("a",))
ONE_WAY = Device("b")  # a reaches it, and it does not reach a


def hello(replica: int, rank: int = 0, device: Device = CPU, requests: int = 8, tokens: int = 100) -> Hello:
    facts = make_facts(replica)
    return Hello(replica, rank, f"inbox {replica}", f"frames {replica}", facts, (), device, requests, tokens)


def reports(*replicas: tuple[Device, ...]) -> dict[int, tuple[Hello, ...]]:
    """Those of replicas with these devices, one per rank."""
    return {
        replica: tuple(hello(replica, rank, device) for rank, device in enumerate(devices))
        for replica, devices in enumerate(replicas)
    }


@pytest.mark.parametrize(
    ("replicas", "chosen"),
    [
        (((CPU,), (CPU,)), MAPPED),
        (((LONE_A,), (LONE_A,)), MAPPED),
        (((A,), (B,)), MAPPED),
        (((LONE_A,), (LONE_B,)), COLLECTIVE),
        (((A,), (ONE_WAY,)), COLLECTIVE),
        (((A, LONE_A), (B, LONE_B)), COLLECTIVE),  # at the second rank
        # Groups may be on one GPU or the other: there is no other way than through memory.
        (((LONE_A,), (LONE_A,), (LONE_B,), (LONE_B,)), MAPPED),
    ],
)
def test_auto_takes_what_works(replicas: tuple[tuple[Device, ...], ...], chosen: Activations) -> None:
    assert choose_activations(AUTO, reports(*replicas)) is chosen


@pytest.mark.parametrize(
    ("requested", "replicas"),
    [
        (MAPPED, ((CPU,), (CPU,))),
        (COLLECTIVE, ((CPU,), (CPU,))),
        (MAPPED, ((A,), (B,))),
        (COLLECTIVE, ((A,), (B,))),
        (MAPPED, ((LONE_A,), (LONE_A,), (LONE_B,), (LONE_B,))),
    ],
)
def test_what_is_asked_for_is_taken_where_it_works(
    requested: Activations, replicas: tuple[tuple[Device, ...], ...]
) -> None:
    assert choose_activations(requested, reports(*replicas)) is requested


def test_what_cannot_work_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"collective: replicas 0 and 2 are on the same GPU, .*mapped"):
        choose_activations(COLLECTIVE, reports((A,), (B,), (A,)))
    with pytest.raises(
        ConfigurationError, match=r"mapped: no two replicas are on GPUs .*\(--kunserve-replicas-per-gpu"
    ):
        choose_activations(MAPPED, reports((LONE_A, A), (LONE_B, B)))


def test_islands_hold_those_who_can_all_be_merged() -> None:
    assert islands(reports((CPU,), (CPU,), (CPU,))) == (frozenset({0, 1, 2}),)
    assert islands(reports((LONE_A,), (LONE_B,), (LONE_A,), (LONE_B,))) == (frozenset({0, 2}), frozenset({1, 3}))
    # b reaches everybody, a and c not each other
    middle = Device("b", ("a", "c"))
    found = islands(reports((Device("a", ("b",)),), (middle,), (Device("c", ("b",)),)))
    assert found == (frozenset({0, 1}), frozenset({2}))


def test_batches_of_other_sizes_keep_replicas_apart() -> None:
    known = {0: (hello(0),), 1: (hello(1, requests=9),), 2: (hello(2, tokens=101),)}
    assert why_apart(known, 0, 0) is None
    requests, tokens = str(why_apart(known, 0, 1)), str(why_apart(known, 0, 2))
    assert "up to 8 and 9 requests" in requests
    assert "give --max-running-requests" in requests
    assert "up to 100 and 101 tokens" in tokens
    assert "give --chunked-prefill-size" in tokens


def test_the_coordinator_says_how_and_merges_those_that_can_be_merged() -> None:
    deployment = FakeDeployment(replicas=3)
    for replica, device in enumerate((LONE_A, LONE_B, LONE_A)):
        deployment.say(hello(replica, device=device))
    deployment.deliver()
    welcomes = [message for *_, message in deployment.sent if isinstance(message, Welcome)]
    assert [welcome.activations for welcome in welcomes] == [MAPPED] * 3
    view = deployment.coordinator.view()
    assert view is not None
    assert view.islands == (frozenset({0, 2}), frozenset({1}))
    refused = deployment.drop((0, 1))
    assert refused.verdict is Verdict.BAD_REQUEST
    assert "groups: replicas 0 and 1 cannot be merged" in refused.message
    assert not any(deployment.phases(replica) for replica in range(3))
    assert deployment.drop((0, 2)).verdict is Verdict.DONE
    assert deployment.coordinator.plan is not None
    assert deployment.coordinator.plan.groups == ((0, 2), (1,))


def test_a_model_of_which_a_drop_gains_nothing_is_named_at_start(caplog: pytest.LogCaptureFixture) -> None:
    for layer_frames, said in ((1, 1), (2, 0)):
        caplog.clear()
        deployment = FakeDeployment(2)
        deployment.coordinator._deployment._model = "a tiny one"
        for replica in range(2):
            facts = replace(make_facts(replica), layer_frames=(layer_frames,) * 8, granule_frames=(2,) * 8)
            deployment.hello(replica, 0, facts)
        warnings = [each.message for each in caplog.records if each.levelname == "WARNING"]
        assert len(warnings) == said
        start = "KunServe: a tiny one: a drop would gain nothing: the parameters of a layer take 1 frames of 4096 bytes"
        assert all(each.startswith(start) for each in warnings)
