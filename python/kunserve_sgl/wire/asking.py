"""The socket of who asks one rank for answers."""

from __future__ import annotations

import zmq

from kunserve_sgl.wire.curve import Curve, Name

# Why nothing can be sent, which raises zmq.Again: a connection that is refused is not tried again.
NOBODY_TO_ASK = "who listens at its address does not talk to this rank"


def connect_asker(address: str, whom: Name, curve: Curve | None, most_bytes: int) -> zmq.Socket[bytes]:
    """Returns a DEALER socket to `whom`, who listens at `address`: over TCP with the keys of this process. It keeps all
    that is sent until somebody listens, and waits for nobody. No frame of an answer has more than `most_bytes`."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance() if curve is None else curve.context
    socket = context.socket(zmq.DEALER)
    for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 0), (zmq.SNDHWM, 0), (zmq.MAXMSGSIZE, most_bytes)):
        socket.setsockopt(option, value)
    if curve is not None:
        curve.call(socket, whom)
    socket.connect(address)
    return socket
