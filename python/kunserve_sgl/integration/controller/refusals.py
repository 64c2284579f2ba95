"""What the controller answers where a request or a call cannot be passed on, and which failures it outlives.

A request that is refused has changed nothing: the client gets the error, and the controller goes on. Where the
coordinator itself fails, who keeps which layers is not known for sure any more, and the deployment ends.
"""

from __future__ import annotations

from http import HTTPStatus

from sglang.srt.managers.io_struct import AbortReq

from kunserve_sgl.control.answers import Verdict
from kunserve_sgl.errors import ConfigurationError, TransientError

# After these nothing has been changed, by what they mean; the coordinator goes on after no other.
SURVIVABLE = (ConfigurationError, TransientError)
# What says that the one who asked is wrong, or that it is not possible now; anything else is our failure.
ANSWERABLE = (*SURVIVABLE, ValueError)


def status_of(error: Exception) -> HTTPStatus:
    """Returns what the client of a request is told: SGLang raises ValueError where a value is wrong."""
    if isinstance(error, TransientError):
        return HTTPStatus.SERVICE_UNAVAILABLE
    if isinstance(error, ANSWERABLE):
        return HTTPStatus.BAD_REQUEST
    return HTTPStatus.INTERNAL_SERVER_ERROR


def refusal(name: str, error: Exception) -> AbortReq:
    """Answers the request of that name."""
    text = str(error) if isinstance(error, ANSWERABLE) else f"{type(error).__name__}: {error}"
    return AbortReq(rid=name, finished_reason={"type": "abort", "status_code": int(status_of(error)), "message": text})


def verdict_of(error: Exception) -> Verdict:
    """Returns how a command has ended that failed with `error`."""
    if isinstance(error, TransientError):
        return Verdict.CONFLICT
    return Verdict.BAD_REQUEST if isinstance(error, SURVIVABLE) else Verdict.FAILED
