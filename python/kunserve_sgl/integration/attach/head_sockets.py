"""SGLang's sockets between the head, which is tokenizer manager, detokenizer and controller, and the schedulers.

SGLang makes them as Unix sockets with random names, and takes what comes for what its own processes have sent. With
`--kunserve-control network` schedulers may be on other machines. Then those to which they connect are ports of the
head's address that the system picks, and only who has keys of the deployment can connect (`wire/curve.py`). Tokenizer
manager and detokenizer bind theirs and tell where in the head's directory; the controller waits for that, binds one
for each replica that no other can connect to, and tells the schedulers all of it when it starts them. What stays on
the head are Unix sockets as ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import zmq

from kunserve_sgl.control.addresses import (
    address_on_head,
    curve_of,
    head_bind_address,
    nobodys_address,
    publish_on_head,
)
from kunserve_sgl.errors import TransientError
from kunserve_sgl.wire.curve import Curve, Name
from kunserve_sgl.wire.rejections import COORDINATOR

_TOKENIZER, _DETOKENIZER = "tokenizer", "detokenizer"
# For the controller to find its cluster, and for the others to start; who fails ends the server before.
_START_DEADLINE_S = 600.0
_POLL_S = 0.05
# A send waits where a connection has been refused, and nowhere else: these sockets have no limit of messages.
_SEND_DEADLINE_MS = 30_000
_T = TypeVar("_T")


def make_socket(
    curve: Curve | None, context: Any, kind: int, endpoint: str, bind: bool = True, only: Name | None = None
) -> Any:
    """Makes a socket as SGLang's get_zmq_socket does, and where it is one of TCP with the keys of this process: a bound
    one takes only who is known, or `only` one, another one talks to the head only."""
    from sglang.srt.utils.network import config_socket, get_zmq_socket

    if curve is None or not endpoint.startswith("tcp://"):
        return get_zmq_socket(context, kind, endpoint, bind)
    socket = context.socket(kind)
    config_socket(socket, kind)
    if bind:
        curve.listen(socket, only)
        socket.bind(endpoint)
    else:
        socket.setsockopt(zmq.SNDTIMEO, _SEND_DEADLINE_MS)
        curve.call(socket, COORDINATOR)
        socket.connect(endpoint)
    return socket


@contextlib.contextmanager
def tokenizer_ports(options: Any, module: Any, port_args: Any, made: Callable[[], Any]) -> Iterator[Any]:
    """Yields the ports with which the tokenizer manager makes its sockets, in SGLang's `module`, while this lasts;
    `made` returns then what it has bound. Raises TransientError where the controller is not there in time."""
    if not options.is_on_network:
        yield port_args
        return
    bind_address = await_head(lambda: head_bind_address(options))
    with _keys_for(module, curve_of(options, COORDINATOR)):
        yield dataclasses.replace(port_args, tokenizer_ipc_name=bind_address)
    publish_on_head(options, _TOKENIZER, made().getsockopt_string(zmq.LAST_ENDPOINT))


@contextlib.contextmanager
def detokenizer_ports(options: Any, module: Any, port_args: Any, made: Callable[[], Any]) -> Iterator[Any]:
    """Is the same for the detokenizer, which sends to the tokenizer manager. Raises TransientError where that is not
    there in time."""
    if not options.is_on_network:
        yield port_args
        return
    bind_address = await_head(lambda: head_bind_address(options))
    tokenizer = await_head(lambda: address_on_head(options, _TOKENIZER))
    with _keys_for(module, curve_of(options, COORDINATOR)):
        yield dataclasses.replace(port_args, detokenizer_ipc_name=bind_address, tokenizer_ipc_name=tokenizer)
    publish_on_head(options, _DETOKENIZER, made().getsockopt_string(zmq.LAST_ENDPOINT))


def enter_head(options: Any, port_args: Any) -> None:
    """Enters in the controller's ports where the other processes of the head listen, when they do. Raises
    TransientError where they do not in time."""
    port_args.tokenizer_ipc_name = await_head(lambda: address_on_head(options, _TOKENIZER))
    port_args.detokenizer_ipc_name = await_head(lambda: address_on_head(options, _DETOKENIZER))


@contextlib.contextmanager
def scheduler_ports(options: Any, module: Any, port_args: Any, me: Name) -> Iterator[Any]:
    """Yields the ports with which the scheduler `me` makes its sockets, in SGLang's `module`, while this lasts. At two
    of them nobody listens on a server of HTTP; a user of another machine must not either."""
    if not options.is_on_network:
        yield port_args
        return
    unused = {name: nobodys_address(options, name) for name in ("rpc_ipc_name", "metrics_ipc_name")}
    with _keys_for(module, curve_of(options, me)):
        yield dataclasses.replace(port_args, **unused)


def await_head(read: Callable[[], _T]) -> _T:
    """Returns what `read` returns, when it does not raise TransientError any more. Raises that past a deadline."""
    ends_at_s = time.monotonic() + _START_DEADLINE_S
    while True:
        try:
            return read()
        except TransientError as error:
            if time.monotonic() >= ends_at_s:
                raise TransientError(f"{error}, for {_START_DEADLINE_S:.0f} s") from error
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _keys_for(module: Any, curve: Curve | None) -> Iterator[None]:
    """Lets `module` of SGLang make its sockets by `make_socket`."""

    def get_zmq_socket(context: Any, kind: int, endpoint: str, bind: bool = True) -> Any:
        return make_socket(curve, context, kind, endpoint, bind)

    upstream, module.get_zmq_socket = module.get_zmq_socket, get_zmq_socket
    try:
        yield
    finally:
        module.get_zmq_socket = upstream
