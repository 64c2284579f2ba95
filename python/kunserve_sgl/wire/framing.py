"""The first byte of a message to an inbox says what the rest is about."""

from __future__ import annotations

# Batches of the group, or what the coordinator says.
WORK, CONTROL = b"w", b"c"


def control_message(payload: bytes) -> bytes:
    """Returns the message that carries what the coordinator says to an inbox."""
    return CONTROL + payload
