"""The first frame of a message to an inbox says what the second is about."""

from __future__ import annotations

# Batches of the group, or what the coordinator says.
WORK, CONTROL = b"w", b"c"


def control_message(payload: bytes) -> list[bytes]:
    """Returns the frames that carry a coordinator's message to an inbox."""
    return [CONTROL, payload]
