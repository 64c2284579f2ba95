"""How long messages are, and what they begin with: the first byte of one to an inbox says what the rest is about."""

from __future__ import annotations

# Of a message beside its arrays: numbers, names and reasons, and what libzmq puts around it.
BESIDE_BYTES = 1 << 20
# A report about very many requests has a tenth of it, and so has a plan of very many replicas.
MOST_CONTROL_BYTES = 64 << 20

# Batches of the group, or what the coordinator says.
WORK, CONTROL = b"w", b"c"


def control_message(payload: bytes) -> bytes:
    """Returns the message that carries what the coordinator says to an inbox."""
    return CONTROL + payload
