"""The JSON bodies of the HTTP routes: parsed strictly. What is wrong is a ValueError that names the field and what is
accepted."""

from __future__ import annotations

import json
from typing import Any

_RESIZE = 'accepted: {"replica": integer, "frames": integer}'
_DROP = (
    'accepted: {"groups": [[replica, replica, ...], ...], "layers": [replica for each layer] or {"replica": [replica '
    'for each layer], ...}, "tokens": integer}; layers and tokens are optional, and exclude each other'
)
_RESTORE = 'accepted: {"groups": [[replica, replica, ...], ...]}, or nothing for all'


def parse_resize(body: bytes, replicas: int) -> tuple[int, int]:
    """(replica, frames)."""
    fields = _fields(body, {"replica", "frames"}, _RESIZE)
    for name in ("replica", "frames"):
        if name not in fields:
            raise ValueError(f"{name} is missing; {_RESIZE}")
        if type(fields[name]) is not int:
            raise ValueError(f"{name}: {fields[name]!r} is not an integer; {_RESIZE}")
    if not 0 <= fields["replica"] < replicas:
        raise ValueError(f"replica: {fields['replica']} does not exist; accepted: 0 to {replicas - 1}")
    return fields["replica"], fields["frames"]


def parse_drop(body: bytes) -> dict[str, Any]:
    """The fields `groups`, `layers` and `tokens` of a CoordinatorCall. Which replicas and layers there are is for the
    coordinator to check."""
    fields = _fields(body, {"groups", "layers", "tokens"}, _DROP)
    if "groups" not in fields:
        raise ValueError(f"groups is missing; {_DROP}")
    layers, tokens = fields.get("layers"), fields.get("tokens")
    if layers is not None and tokens is not None:
        raise ValueError(f"layers and tokens are both given; {_DROP}")
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise ValueError(f"tokens: {tokens!r}; accepted: an integer, 1 or more")
    return {"groups": _groups(fields["groups"], _DROP), "layers": _layers(layers), "tokens": tokens}


def parse_restore(body: bytes) -> dict[str, Any]:
    """The field `groups` of a CoordinatorCall, None for all."""
    fields = _fields(body or b"{}", {"groups"}, _RESTORE)
    groups = fields.get("groups")
    return {"groups": None if groups is None else _groups(groups, _RESTORE)}


def _fields(body: bytes, known: set[str], shape: str) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the body is not JSON ({error}); {shape}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"the body is not an object; {shape}")
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown fields {', '.join(unknown)}; {shape}")
    return fields


def _groups(value: Any, shape: str) -> list[list[int]]:
    if not isinstance(value, list) or not value or not all(_is_list_of_int(group) for group in value):
        raise ValueError(f"groups: {value!r} is not a list of lists of replicas; {shape}")
    return value


def _layers(value: Any) -> list[int] | dict[int, list[int]] | None:
    if value is None:
        return None
    if isinstance(value, dict):
        for replica, hosts in value.items():
            if not (replica.isascii() and replica.isdigit() and _is_list_of_int(hosts)):
                raise ValueError(f"layers: {replica!r}: {hosts!r} is not a replica and a list of its hosts; {_DROP}")
        return {int(replica): hosts for replica, hosts in value.items()}
    if not _is_list_of_int(value):
        raise ValueError(f"layers: {value!r} is not a list of replicas, nor an object of such lists; {_DROP}")
    hosts_of_all: list[int] = value
    return hosts_of_all


def _is_list_of_int(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)
