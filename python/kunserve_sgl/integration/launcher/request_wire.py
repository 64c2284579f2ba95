"""Whether a request can be read by those it is sent to. What cannot be read ends the controller, and all replicas.

SGLang builds its messages without checking types, and checks them where they are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Optional

import msgspec
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import SessionParams, TokenizedEmbeddingReqInput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from kunserve_sgl.integration.bad_request import BadRequestError
from kunserve_sgl.integration.launcher.request_bodies import shown

# Long, and known to be right; or wrapped in bytes before they are sent.
_LEFT_OUT = ("input_ids", "input_embeds", "mm_inputs", "mm_data_mooncake", "time_stats")
# SGLang moves what the client wrote into other fields.
_CLIENT_NAMES = {"stop_strs": "stop", "stop_regex_strs": "stop_regex"}
_PLACE = re.compile(r" - at `[^$`]*\$((?:\[(?:\d+|\.\.\.)\])*)[^`]*`$")
_INDEX = re.compile(r"\[(\d+)\]")

_encoder = msgspec.msgpack.Encoder(enc_hook=io_struct.enc_hook)
_decoders = {
    kind: (
        msgspec.msgpack.Decoder(kind, dec_hook=io_struct.dec_hook),
        {name: None for name in _LEFT_OUT if name in kind.__struct_fields__},
    )
    for kind in (TokenizedGenerateReqInput, TokenizedEmbeddingReqInput)
}
_STRUCTS = {"sampling_params": SamplingParams, "session_params": SessionParams}
# Fields of SamplingParams that SGLang fills in. `is_normalized` turns its own checks off.
_NOT_THE_CLIENTS = {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"}
# What clients may write, where it is more than what is sent.
_WIDER: dict[str, Any] = {"stop_token_ids": list[int | None], "logit_bias": dict[str | int, float]}
_Sampling = msgspec.defstruct(
    "_Sampling",
    [
        (each.name, Optional[_WIDER.get(each.name, each.type)], None)  # noqa: UP045, the types are not all classes
        for each in msgspec.structs.fields(SamplingParams)
        if each.name not in _NOT_THE_CLIENTS
    ],
    forbid_unknown_fields=True,
)
_FIELD = re.compile(r" - at `\$\.(\w+)([^`]*)`$")


def check_sampling_types(sampling_params: Mapping[str, Any]) -> None:
    """Checks what a client wrote there, before SGLang computes with it."""
    try:
        msgspec.convert(sampling_params, _Sampling)
    except msgspec.ValidationError as error:
        reason = str(error)
    else:
        return
    place = _FIELD.search(reason)
    if place is None:
        accepted = ", ".join(sorted(_Sampling.__struct_fields__))
        raise BadRequestError(f"sampling_params: {reason}; accepted are {accepted}")
    value = shown(sampling_params[place[1]])
    raise BadRequestError(f"sampling_params.{place[1]}{place[2]}: {reason[: place.start()]}, in {value}")


def check_readable(request: Any) -> None:
    """Checks that `request`, SGLang's tokenized request, can be read: it is written and read once, without the long
    parts."""
    decoder, without = _decoders[type(request)]
    bare = msgspec.structs.replace(request, **without)
    try:
        written = _encoder.encode(bare)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRequestError(f"{_unwritable(bare)}: {error}") from None
    try:
        decoder.decode(written)
    except msgspec.ValidationError as error:
        raise BadRequestError(_explain(type(request), str(error))) from None


def _unwritable(struct: Any, prefix: str = "") -> str:
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, msgspec.Struct):
            if (found := _unwritable(value, f"{name}.")) != "":
                return found
            continue
        try:
            _encoder.encode(value)
        except (TypeError, ValueError, OverflowError):
            return f"{prefix}{_CLIENT_NAMES.get(name, name)}: {shown(value)}"
    return ""


def _explain(kind: Any, message: str) -> str:
    """Names a field as the client knows it; msgspec names it by its position."""
    place = _PLACE.search(message)
    if place is None:
        return message
    fields, names = ("", *kind.__struct_fields__), []  # the message's tag comes first
    for index in _INDEX.findall(place[1]):
        if int(index) >= len(fields):
            break
        name = fields[int(index)]
        names.append(_CLIENT_NAMES.get(name, name))
        if (inner := _STRUCTS.get(name)) is None:
            break
        fields = inner.__struct_fields__
    reason = message[: place.start()]
    return f"{'.'.join(names)}: {reason}" if names else reason
