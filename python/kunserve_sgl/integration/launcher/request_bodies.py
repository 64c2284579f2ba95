"""The JSON bodies of the HTTP routes: read up to a size, and parsed strictly. What is wrong is a ValueError that names
the field and what is accepted.

The type of content that a client announces is not looked at: `curl -d` announces a form.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request

MAX_BODY_BYTES = 1_000_000
BODY_DEADLINE_S = 30.0
_MAX_SHOWN_CHARACTERS = 100
# What every JSON parser reads as the same integer; far beyond any count of frames or tokens.
_MAX_INTEGER = 2**53
_MAX_LAYERS = 10_000
_MAX_DIGITS = len(str(_MAX_INTEGER))

_RESIZE = 'accepted: {"replica": integer, "frames": integer}'
_DROP = (
    'accepted: {"groups": [[replica, replica, ...], ...], "layers": [replica for each layer] or {"replica": [replica '
    'for each layer], ...}, "tokens": integer}; layers and tokens are optional, and exclude each other'
)
_DROP_FIELDS = {"groups", "layers", "tokens"}
_RESTORE_FIELDS = {"groups", "layers", "tokens", "force"}
_CHECK = "accepted: {}, or nothing"
_RESTORE = (
    'accepted: {"groups": [[replica, replica, ...], ...], "layers": {"replica": [layer, ...], ...}, "tokens": integer, '
    '"force": boolean}, or nothing for all; layers and tokens exclude each other'
)
_LEND_FIELDS = {"from", "to", "tokens"}
_LEND = 'accepted: {"from": replica, "to": replica, "tokens": integer}'


class BodyTooLargeError(ValueError):
    """Says that the body has more bytes than any that makes sense."""


async def read_body(request: Request) -> bytes:
    """Returns the body. It reads no further where it is too large, and not at all where the header says so. Raises
    BodyTooLargeError."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > _MAX_DIGITS or int(announced) > MAX_BODY_BYTES):
        raise BodyTooLargeError(f"the body is too large; accepted: {MAX_BODY_BYTES} bytes or fewer")
    try:
        return await asyncio.wait_for(_read_chunks(request), BODY_DEADLINE_S)
    except asyncio.TimeoutError:
        raise ValueError(f"the body was not there within {BODY_DEADLINE_S:g} s") from None
    except ClientDisconnect:
        raise ValueError("the client has left before its body was there") from None


async def _read_chunks(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLargeError(f"the body is too large; accepted: {MAX_BODY_BYTES} bytes or fewer")
    return bytes(body)


def parse_resize(body: bytes, replicas: int) -> tuple[int, int]:
    """Returns replica and number of frames. Raises ValueError."""
    fields = _fields(body, {"replica", "frames"}, _RESIZE)
    for name in ("replica", "frames"):
        if name not in fields:
            raise ValueError(f"{name} is missing; {_RESIZE}")
        if type(fields[name]) is not int:
            raise ValueError(f"{name}: {shown(fields[name])} is not an integer; {_RESIZE}")
    if not 0 <= fields["replica"] < replicas:
        raise ValueError(f"replica: {fields['replica']} does not exist; accepted: 0 to {replicas - 1}")
    return fields["replica"], fields["frames"]


def parse_drop(body: bytes, replicas: int) -> dict[str, Any]:
    """Returns the fields `groups`, `layers` and `tokens` of a CoordinatorCall. Raises ValueError. What depends on the
    plan is for the coordinator to check: how many layers there are, and which replica may host them."""
    return _drop_fields(_fields(body, _DROP_FIELDS, _DROP), replicas)


def _drop_fields(fields: dict[str, Any], replicas: int) -> dict[str, Any]:
    if "groups" not in fields:
        raise ValueError(f"groups is missing; {_DROP}")
    layers, tokens = _layers_or_tokens(fields, _DROP)
    groups = _groups(fields["groups"], replicas, _DROP)
    return {"groups": groups, "layers": _layers(layers, replicas), "tokens": tokens}


def parse_restore(body: bytes, replicas: int) -> dict[str, Any]:
    """Returns the fields `groups`, None for all, `layers`, `tokens` and `force` of a CoordinatorCall. Raises
    ValueError. Which layers can come back is for the coordinator to check."""
    return _restore_fields(_fields(body or b"{}", _RESTORE_FIELDS, _RESTORE), replicas)


def parse_lend(body: bytes, replicas: int) -> dict[str, Any]:
    """Returns the fields `lender`, `borrower` and `tokens` of a CoordinatorCall. Raises ValueError."""
    return _lend_fields(_fields(body, _LEND_FIELDS, _LEND), replicas)


def _lend_fields(fields: dict[str, Any], replicas: int) -> dict[str, Any]:
    for name in ("from", "to", "tokens"):
        if name not in fields:
            raise ValueError(f"{name} is missing; {_LEND}")
        if type(fields[name]) is not int:
            raise ValueError(f"{name}: {shown(fields[name])} is not an integer; {_LEND}")
    for name in ("from", "to"):
        _require_replica(name, fields[name], replicas)
    if fields["from"] == fields["to"]:
        raise ValueError(f"from and to are both {fields['from']}; accepted: two replicas")
    if fields["tokens"] < 1:
        raise ValueError(f"tokens: {fields['tokens']}; accepted: an integer, 1 or more")
    return {"lender": fields["from"], "borrower": fields["to"], "tokens": fields["tokens"]}


def parse_plan(body: bytes, replicas: int) -> tuple[str, dict[str, Any]]:
    """Returns what it is about, by the field `action`: `drop`, `restore` or `lend`, and the fields as `parse_drop`,
    `parse_restore` or `parse_lend`. Raises ValueError."""
    fields = _fields(body, _DROP_FIELDS | _RESTORE_FIELDS | _LEND_FIELDS | {"action"}, _DROP)
    action = fields.pop("action", "drop")
    if not (isinstance(action, str) and action in _ACTIONS):
        raise ValueError(f"action: {shown(action)}; accepted: {' or '.join(_ACTIONS)}")
    known, shape, checked = _ACTIONS[action]
    _require_known(fields, known, shape)
    return action, checked(fields, replicas)


def _restore_fields(fields: dict[str, Any], replicas: int) -> dict[str, Any]:
    groups, force = fields.get("groups"), fields.get("force", False)
    layers, tokens = _layers_or_tokens(fields, _RESTORE)
    if type(force) is not bool:
        raise ValueError(f"force: {shown(force)}; accepted: true or false")
    if layers is not None and not (isinstance(layers, dict) and layers):
        raise ValueError(f"layers: {shown(layers)} is not an object of lists of layers; {_RESTORE}")
    return {
        "groups": None if groups is None else _groups(groups, replicas, _RESTORE),
        "layers": None if layers is None else _returning(layers, replicas),
        "tokens": tokens,
        "force": force,
    }


# What a dry run can be about: the fields, how they look, and what checks them.
_ACTIONS: dict[str, tuple[set[str], str, Callable[[dict[str, Any], int], dict[str, Any]]]] = {
    "drop": (_DROP_FIELDS, _DROP, _drop_fields),
    "restore": (_RESTORE_FIELDS, _RESTORE, _restore_fields),
    "lend": (_LEND_FIELDS, _LEND, _lend_fields),
}


def _layers_or_tokens(fields: dict[str, Any], shape: str) -> tuple[Any, int | None]:
    layers, tokens = fields.get("layers"), fields.get("tokens")
    if layers is not None and tokens is not None:
        raise ValueError(f"layers and tokens are both given; {shape}")
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise ValueError(f"tokens: {shown(tokens)}; accepted: an integer, 1 or more")
    return layers, tokens


def _returning(layers: dict[str, Any], replicas: int) -> dict[int, list[int]]:
    for replica, numbers in layers.items():
        if not (_is_replica_name(replica) and _is_list_of_int(numbers)):
            raise ValueError(
                f"layers: {shown(replica)}: {shown(numbers)} is not a replica and a list of its layers; {_RESTORE}"
            )
        _require_replica("layers", int(replica), replicas)
        if len(numbers) > _MAX_LAYERS or len(set(numbers)) < len(numbers):
            raise ValueError(f"layers: {shown(numbers)} of replica {replica}; accepted: each layer once")
    return {int(replica): numbers for replica, numbers in layers.items()}


def parse_check(body: bytes) -> None:
    """Raises ValueError where a body says anything: there is nothing to choose."""
    _fields(body or b"{}", set(), _CHECK)


class _LongNumber:
    """Stands for an integer that no field accepts, and that is not converted: that costs time, and fails beyond 4300
    digits."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __repr__(self) -> str:
        return self._digits[: _MAX_SHOWN_CHARACTERS + 1]


def _integer(digits: str) -> int | _LongNumber:
    short = len(digits.lstrip("-")) <= _MAX_DIGITS
    if short and abs(number := int(digits)) <= _MAX_INTEGER:
        return number
    return _LongNumber(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} is given twice")
    return fields


def _fields(body: bytes, known: set[str], shape: str) -> dict[str, Any]:
    try:
        fields = json.loads(body.decode(), parse_int=_integer, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"the body is nested too deeply; {shape}") from None
    except ValueError as error:
        raise ValueError(f"the body is not JSON ({error}); {shape}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"the body is not an object; {shape}")
    _require_known(fields, known, shape)
    return fields


def _require_known(fields: dict[str, Any], known: set[str], shape: str) -> None:
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown fields {_cut(', '.join(map(_name, unknown)))}; {shape}")


def _groups(value: Any, replicas: int, shape: str) -> list[list[int]]:
    if not isinstance(value, list) or not value or not all(_is_list_of_int(group) for group in value):
        raise ValueError(f"groups: {shown(value)} is not a list of lists of replicas; {shape}")
    named: set[int] = set()
    for group in value:
        if len(group) < 2:
            raise ValueError(f"groups: {shown(group)}; accepted: two or more replicas in each group")
        for replica in group:
            _require_replica("groups", replica, replicas)
            if replica in named:
                raise ValueError(f"groups: replica {replica} is named twice; accepted: each replica once")
            named.add(replica)
    return value


def _layers(value: Any, replicas: int) -> list[int] | dict[int, list[int]] | None:
    if value is None:
        return None
    if isinstance(value, dict):
        hosts_of: dict[int, list[int]] = {}
        for replica, hosts in value.items():
            if not (_is_replica_name(replica) and _is_list_of_int(hosts)):
                raise ValueError(
                    f"layers: {shown(replica)}: {shown(hosts)} is not a replica and a list of its hosts; {_DROP}"
                )
            _require_replica("layers", int(replica), replicas)
            hosts_of[int(replica)] = _hosts(hosts, replicas)
        return hosts_of
    if not _is_list_of_int(value):
        raise ValueError(f"layers: {shown(value)} is not a list of replicas, nor an object of such lists; {_DROP}")
    return _hosts(value, replicas)


def _hosts(hosts: list[int], replicas: int) -> list[int]:
    if len(hosts) > _MAX_LAYERS:
        raise ValueError(f"layers: {len(hosts)} hosts; accepted: one for each layer")
    for host in hosts:
        _require_replica("layers", host, replicas)
    return hosts


def _require_replica(field: str, replica: int, replicas: int) -> None:
    if not 0 <= replica < replicas:
        raise ValueError(f"{field}: there is no replica {replica}; accepted: 0 to {replicas - 1}")


def _is_list_of_int(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def _is_replica_name(name: str) -> bool:
    """Accepts one of the several ways to write a number, so that no replica is named twice."""
    return name.isascii() and name.isdigit() and len(name) <= _MAX_DIGITS and name == str(int(name))


def _name(field: str) -> str:
    """Writes a field's name plainly where it is plain."""
    return field if field.isascii() and field.isprintable() else ascii(field)


def shown(value: Any) -> str:
    """Returns what an error says of a value: plain characters, and not many of them."""
    return _cut(ascii(value))


def _cut(text: str) -> str:
    if len(text) <= _MAX_SHOWN_CHARACTERS:
        return text
    return f"{text[:_MAX_SHOWN_CHARACTERS]}... ({len(text)} characters)"
