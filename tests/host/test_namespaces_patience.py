"""A network that is away for longer than a batch may take, and not long enough for Ray to notice."""

from __future__ import annotations

from pathlib import Path

import pytest
from _namespaces import LONG_QUESTIONS, TwoMachines, attending, on_two_machines, served_on_both
from _questions import ask_all
from _servers import LLAMA, START_DEADLINE_S

from kunserve_sgl.tiny_model import write_tiny_model
from waiting import wait_until

pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")

pytestmark = [pytest.mark.server, pytest.mark.long]


def test_who_is_left_serves_on_before_anybody_knows_whether_the_other_has_ended(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_tiny_model(LLAMA, model)
    spec = on_two_machines("--kunserve-order-timeout", "5")
    with (
        TwoMachines(tmp_path, model, patience=1000) as machines,
        served_on_both(machines, model, spec) as served,
    ):
        server = served.server
        expected = server.answers_to(LONG_QUESTIONS)
        served.drop({"groups": [[0, 1]]})
        with attending(served) as answers:
            machines.cable.set(loss=1.0)
            wait_until(lambda: "normal" in server.states(), "the one that is left has recovered")
            assert ask_all(served.endpoint, served.questions) == served.expected
            assert sum(server.restarts()) == 0
            machines.cable.set()
        assert [answer.result() for answer in answers] == expected
        wait_until(lambda: server.states() == ["normal", "normal"], "the other one is back", START_DEADLINE_S)
        assert sum(server.restarts()) == 1
        served.check_answers_of_all()
        served.check_merging()
