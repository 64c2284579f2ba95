"""The launcher's start: what it says when a child has ended before it was ready."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.engine import Engine

from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.attach.last_words import StartFailedError
from kunserve_sgl.integration.attach.patches import AttachmentError
from kunserve_sgl.integration.launcher import ending
from kunserve_sgl.integration.launcher.engine import KunserveEngine


@dataclasses.dataclass
class Result:
    """What SGLang returns of the schedulers that it starts."""

    wait_for_ready: Callable[[], None]
    scheduler_infos: list[dict[str, Any]]


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The controller's process, by SGLang's functions that start it and the detokenizer."""
    process = SimpleNamespace(exitcode=None)
    detokenizer = SimpleNamespace(exitcode=None)

    def wait() -> None:
        if process.exitcode is not None:
            raise RuntimeError("Rank 0 scheduler died")

    def start(cls: Any, server_args: Any, *args: Any) -> Any:
        return Result(wait, [{}]), [process]

    monkeypatch.setattr(Engine, "_launch_scheduler_processes", classmethod(start))
    monkeypatch.setattr(
        Engine, "_launch_detokenizer_subprocesses", classmethod(lambda cls, **_: ([detokenizer], ["detokenizer"]))
    )
    before = signal.getsignal(signal.SIGQUIT)
    yield SimpleNamespace(process=process, detokenizer=detokenizer)
    signal.signal(signal.SIGQUIT, before)


def test_a_child_that_ends_during_the_start_is_the_reason(
    controller: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = SimpleNamespace(kunserve_directory=str(tmp_path), dp_size=2)
    result, _ = KunserveEngine._launch_scheduler_processes(arguments, "ports", "function")
    KunserveEngine._launch_detokenizer_subprocesses(server_args=arguments)
    with pytest.raises(AttachmentError):
        result.wait_for_ready()  # ready, but not with our scheduler
    controller.process.exitcode = -9
    with pytest.raises(StartFailedError, match=r"^data-parallel controller ended with exit code -9$"):
        result.wait_for_ready()
    reasons: list[str] = []
    monkeypatch.setattr(ending, "end_now", reasons.append)
    controller.process.exitcode, controller.detokenizer.exitcode = None, 1
    signal.raise_signal(signal.SIGQUIT)
    monkeypatch.setattr(last_words, "_mine", None)
    last_words.sign_up(str(tmp_path), last_words.scheduler_name(1, 0))
    last_words.leave(MemoryError("no room"))
    signal.raise_signal(signal.SIGQUIT)
    assert reasons == [
        "the server has not started: detokenizer ended with exit code 1",
        "the server has not started: replica 1 rank 0: MemoryError: no room",
    ]
