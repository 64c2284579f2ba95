"""The CPU attention kernel: numba code that walks paged keys and values in place, without gathering or padding.

What a row computes depends only on its query, its visible keys and values, and their positions. It does not depend
on the other rows of the call, on how a prompt was cut into chunks, or on how many threads run: every row goes through
the same instructions, over blocks of keys that start at multiples of `BLOCK_TOKENS`. Batches of any make-up therefore
give bitwise equal answers, as long as the values in the cache are finite.

Method: softmax over blocks with a running maximum and sum (Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax"; Dao et al. 2022, "FlashAttention"), float32 throughout.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import overload

from kunserve_sgl.cpu_attention.compiling import compiled_once

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 64
"""Keys per softmax step. Part of the arithmetic: changing it changes the last bits of results."""
TILE_ROWS = 32
"""Rows (query token x query head of one KV head) that share one copy of a block; even. Does not change results.
Rows are computed in pairs, an odd last one with a row that sees nothing, so that all take the same instructions."""

# Columns of the request table.
QUERY_START, QUERY_COUNT, QUERY_POSITION, KV_END, TABLE_OFFSET = range(5)
REQUEST_COLUMNS = 5

NO_FAULT = -1
"""What the kernel returns when every slot was inside the buffer."""

# Not `nnan` or `ninf`: masked scores are -inf, and a NaN in the cache must reach the output.
_FASTMATH = {"contract", "reassoc", "nsz"}
_UNROLL = 4
_F0 = np.float32(0.0)
_F1 = np.float32(1.0)
_NEG_INF = np.float32(-np.inf)
_NEVER = 1 << 62  # begin of a row that sees nothing

# exp(x) = 2^n * p(r): range reduction and minimax polynomial of Cephes expf (S. Moshier, netlib). Relative error below
# 3e-7 on [-87, 0]; written out because calls to the C library would keep the loop from being vectorised.
_EXP_MIN = np.float32(-87.0)
_LOG2_E = np.float32(1.44269504)
_HALF = np.float32(0.5)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_EXP_P0 = np.float32(1.9875691500e-4)
_EXP_P1 = np.float32(1.3981999507e-3)
_EXP_P2 = np.float32(8.3334519073e-3)
_EXP_P3 = np.float32(4.1665795894e-2)
_EXP_P4 = np.float32(1.6666665459e-1)
_EXP_P5 = np.float32(5.0000001201e-1)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _inlined(function: _Function) -> _Function:
    """Lets `function` be compiled into its callers. LLVM would keep loops around a call scalar, which costs a third of
    the speed."""
    return cast(_Function, numba.njit(forceinline=True, fastmath=_FASTMATH, error_model="numpy")(function))


def compiled(function: _Function) -> _Function:
    """Lets `function` be compiled at the first call per combination of types and kept on disk, beside this file or,
    where that is not writable, in the user's cache directory."""
    options = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy"}
    try:
        return cast(_Function, compiled_once(numba.njit(cache=True, **options)(function)))
    except RuntimeError as error:  # numba found no writable directory
        logger.warning("every process compiles the attention kernel anew (%s); set NUMBA_CACHE_DIR", error)
        return cast(_Function, numba.njit(**options)(function))


def _compiled_as(function: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Marks what compiled code uses for `function`: it takes argument types and returns the code for them."""
    return cast(Callable[[_Function], _Function], overload(function, jit_options={"forceinline": True}))


def _widen(stored: Any) -> np.float32:
    """Returns the float32 of a stored element: float32 itself, or the bits of a bfloat16 held in an uint16."""
    raise NotImplementedError("for compiled code")


@_compiled_as(_widen)
def _widen_overload(stored: Any) -> Any:
    def of_float32(stored: Any) -> Any:
        return stored

    def of_bfloat16(stored: Any) -> Any:
        return np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)

    return {types.float32: of_float32, types.uint16: of_bfloat16}.get(stored)


def _narrow(value: np.float32, like: npt.NDArray[Any]) -> Any:
    """Converts `value` to an element of `like`; bfloat16 rounds to nearest even, and a NaN stays one."""
    raise NotImplementedError("for compiled code")


@_compiled_as(_narrow)
def _narrow_overload(value: Any, like: Any) -> Any:
    def to_float32(value: Any, like: Any) -> Any:
        return value

    def to_bfloat16(value: Any, like: Any) -> Any:
        bits = np.uint32(np.float32(value).view(np.uint32))
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return np.uint16(rounded) if value == value else np.uint16(0x7FC0)

    return {types.float32: to_float32, types.uint16: to_bfloat16}.get(like.dtype)


@_inlined
def _exp(x: Any) -> Any:
    """Computes exp(x) for x <= 0. Below -87 the result is exp(-87), 1.6e-38: nothing beside the maximum's 1."""
    x = _EXP_MIN if x < _EXP_MIN else x
    n = np.int32(x * _LOG2_E - _HALF)
    r = x - np.float32(n) * _LN2_HIGH - np.float32(n) * _LN2_LOW
    p = ((((_EXP_P0 * r + _EXP_P1) * r + _EXP_P2) * r + _EXP_P3) * r + _EXP_P4) * r + _EXP_P5
    p = p * r * r + r + _F1
    return p * np.uint32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@_inlined
def _load_block(
    target: Any, stored: Any, table: Any, slot_stride: int, offset: int, first: int, last: int, width: int
) -> None:
    """Loads rows [first, last) of a block from their slots; `table` starts at the block. Rows up to the next multiple
    of _UNROLL on both sides become zero: nobody sees them, but 0 * NaN would be seen."""
    for t in range(first // _UNROLL * _UNROLL, first):
        for d in range(width):
            target[t, d] = _F0
    for t in range(last, (last + _UNROLL - 1) // _UNROLL * _UNROLL):
        for d in range(width):
            target[t, d] = _F0
    for t in range(first, last):
        start = np.int64(table[t]) * slot_stride + offset
        source = stored[start : start + width]
        for d in range(width):
            target[t, d] = _widen(source[d])


@_inlined
def _score_pair(
    query_a: Any, query_b: Any, keys: Any, scores_a: Any, scores_b: Any, begin: int, end: int, width: int
) -> None:
    """Sets scores[t] = query . keys[t] for two rows, for t of [begin, end) and its neighbours up to multiples of
    _UNROLL."""
    for t in range(begin // _UNROLL * _UNROLL, end, _UNROLL):
        k0 = keys[t]
        k1 = keys[t + 1]
        k2 = keys[t + 2]
        k3 = keys[t + 3]
        a0 = _F0
        a1 = _F0
        a2 = _F0
        a3 = _F0
        b0 = _F0
        b1 = _F0
        b2 = _F0
        b3 = _F0
        for d in range(width):
            a = query_a[d]
            b = query_b[d]
            a0 += a * k0[d]
            a1 += a * k1[d]
            a2 += a * k2[d]
            a3 += a * k3[d]
            b0 += b * k0[d]
            b1 += b * k1[d]
            b2 += b * k2[d]
            b3 += b * k3[d]
        scores_a[t] = a0
        scores_a[t + 1] = a1
        scores_a[t + 2] = a2
        scores_a[t + 3] = a3
        scores_b[t] = b0
        scores_b[t + 1] = b1
        scores_b[t + 2] = b2
        scores_b[t + 3] = b3


@_inlined
def _fill_outside(scores: Any, begin: int, end: int, number: Any) -> None:
    for t in range(begin):
        scores[t] = number
    for t in range(end, BLOCK_TOKENS):
        scores[t] = number


@_inlined
def _accumulate_pair(
    sums_a: Any, sums_b: Any, weights_a: Any, weights_b: Any, values: Any, begin: int, end: int, width: int
) -> None:
    """Adds weights[t] * values[t] to the sums of two rows, over the same t as in _score_pair."""
    for t in range(begin // _UNROLL * _UNROLL, end, _UNROLL):
        v0 = values[t]
        v1 = values[t + 1]
        v2 = values[t + 2]
        v3 = values[t + 3]
        a0 = weights_a[t]
        a1 = weights_a[t + 1]
        a2 = weights_a[t + 2]
        a3 = weights_a[t + 3]
        b0 = weights_b[t]
        b1 = weights_b[t + 1]
        b2 = weights_b[t + 2]
        b3 = weights_b[t + 3]
        for d in range(width):
            sums_a[d] += a0 * v0[d] + a1 * v1[d] + a2 * v2[d] + a3 * v3[d]
            sums_b[d] += b0 * v0[d] + b1 * v1[d] + b2 * v2[d] + b3 * v3[d]


@compiled
def attend(
    first_item: int,
    item_step: int,
    requests: npt.NDArray[np.int64],
    table: npt.NDArray[Any],
    visible: npt.NDArray[np.int64],
    query: npt.NDArray[Any],
    query_token_stride: int,
    query_head_stride: int,
    key: npt.NDArray[Any],
    key_slot_stride: int,
    key_head_stride: int,
    value: npt.NDArray[Any],
    value_slot_stride: int,
    value_head_stride: int,
    slots: int,
    output: npt.NDArray[Any],
    lse: npt.NDArray[np.float32],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    scale: np.float32,
    logit_cap: np.float32,
    window: int,
) -> int:
    """Computes items first_item, first_item + item_step, ...; an item is one tile of rows of a KV head of a request.

    Arrays are one-dimensional, strides count elements, all offsets are 64-bit. Query token a of a request sees
    the positions p of [0, KV_END) with p <= QUERY_POSITION + a and, if `window` >= 0, p >= QUERY_POSITION + a -
    window. The slot of position p is table[TABLE_OFFSET + p]. A row that sees nothing gets output 0 and lse -inf.
    Unless `visible` is empty, query token t of the call sees [visible[t, 0], visible[t, 1]) instead, which lies in
    [0, KV_END); QUERY_POSITION and `window` are not used then.

    Returns NO_FAULT, or request << 32 | position of a slot outside [0, slots), before anything was read there.
    """
    group = q_heads // kv_heads
    queries = np.empty((TILE_ROWS, head_dim), np.float32)
    sums = np.empty((TILE_ROWS, v_head_dim), np.float32)
    keys = np.empty((BLOCK_TOKENS, head_dim), np.float32)
    values = np.empty((BLOCK_TOKENS, v_head_dim), np.float32)
    weights = np.empty((TILE_ROWS, BLOCK_TOKENS), np.float32)
    maxima = np.empty(TILE_ROWS, np.float32)
    totals = np.empty(TILE_ROWS, np.float32)
    row_begin = np.empty(TILE_ROWS, np.int64)
    row_end = np.empty(TILE_ROWS, np.int64)

    item = -1
    for request in range(requests.shape[0]):
        query_start = requests[request, QUERY_START]
        row_count = requests[request, QUERY_COUNT] * group
        for kv_head in range(kv_heads):
            for tile in range(0, row_count, TILE_ROWS):
                item += 1
                if item < first_item or (item - first_item) % item_step != 0:
                    continue
                rows = min(np.int64(TILE_ROWS), row_count - tile)
                tile_begin = requests[request, KV_END]
                tile_end = np.int64(0)  # stays there if no row of the tile sees anything
                for row in range(rows):
                    token = (tile + row) // group
                    head = kv_head * group + (tile + row) % group
                    if visible.shape[0] > 0:
                        begin = visible[query_start + token, 0]
                        end = visible[query_start + token, 1]
                    else:
                        position = requests[request, QUERY_POSITION] + token
                        begin = np.int64(0)
                        if window >= 0:
                            begin = max(begin, position - window)
                        end = min(requests[request, KV_END], position + 1)
                    row_begin[row] = begin
                    row_end[row] = end
                    if begin < end:
                        tile_begin = min(tile_begin, begin)
                        tile_end = max(tile_end, end)
                    start = (query_start + token) * query_token_stride + head * query_head_stride
                    source = query[start : start + head_dim]
                    for d in range(head_dim):
                        queries[row, d] = _widen(source[d]) * scale
                    for d in range(v_head_dim):
                        sums[row, d] = _F0
                    maxima[row] = _NEG_INF
                    totals[row] = _F0
                if rows % 2:
                    row_begin[rows] = _NEVER
                    row_end[rows] = 0
                    for d in range(head_dim):
                        queries[rows, d] = _F0
                    for d in range(v_head_dim):
                        sums[rows, d] = _F0
                    rows += 1

                for block in range(tile_begin // BLOCK_TOKENS * BLOCK_TOKENS, tile_end, BLOCK_TOKENS):
                    first = max(block, tile_begin) - block
                    last = min(np.int64(BLOCK_TOKENS), tile_end - block)
                    block_table = table[requests[request, TABLE_OFFSET] + block :]
                    for t in range(first, last):
                        if block_table[t] < 0 or block_table[t] >= slots:
                            return (request << 32) | (block + t)

                    _load_block(
                        keys, key, block_table, key_slot_stride, kv_head * key_head_stride, first, last, head_dim
                    )
                    for a in range(0, rows, 2):
                        b = a + 1
                        begin = max(np.int64(0), min(row_begin[a], row_begin[b]) - block)
                        end = min(np.int64(BLOCK_TOKENS), max(row_end[a], row_end[b]) - block)
                        if begin < end:
                            _score_pair(queries[a], queries[b], keys, weights[a], weights[b], begin, end, head_dim)
                    for row in range(rows):
                        begin = max(np.int64(0), row_begin[row] - block)
                        end = min(np.int64(BLOCK_TOKENS), row_end[row] - block)
                        scores = weights[row]
                        if begin >= end:
                            _fill_outside(scores, 0, 0, _F0)  # the other row of the pair may see this block
                            continue
                        if logit_cap > _F0:
                            for t in range(begin, end):
                                scores[t] = logit_cap * np.float32(math.tanh(scores[t] / logit_cap))
                        _fill_outside(scores, begin, end, _NEG_INF)
                        maximum = maxima[row]
                        for t in range(BLOCK_TOKENS):
                            maximum = max(maximum, scores[t])
                        if maximum > maxima[row]:
                            shrink = _exp(maxima[row] - maximum)
                            totals[row] *= shrink
                            for d in range(v_head_dim):
                                sums[row, d] *= shrink
                            maxima[row] = maximum
                        for t in range(BLOCK_TOKENS):
                            scores[t] = _exp(scores[t] - maximum)
                        _fill_outside(scores, begin, end, _F0)
                        total = _F0
                        for t in range(BLOCK_TOKENS):
                            total += scores[t]
                        totals[row] += total

                    _load_block(
                        values,
                        value,
                        block_table,
                        value_slot_stride,
                        kv_head * value_head_stride,
                        first,
                        last,
                        v_head_dim,
                    )
                    for a in range(0, rows, 2):
                        b = a + 1
                        begin = max(np.int64(0), min(row_begin[a], row_begin[b]) - block)
                        end = min(np.int64(BLOCK_TOKENS), max(row_end[a], row_end[b]) - block)
                        if begin < end:
                            _accumulate_pair(sums[a], sums[b], weights[a], weights[b], values, begin, end, v_head_dim)

                for row in range(min(np.int64(TILE_ROWS), row_count - tile)):
                    token = query_start + (tile + row) // group
                    head = kv_head * group + (tile + row) % group
                    start = (token * q_heads + head) * v_head_dim
                    target = output[start : start + v_head_dim]
                    if row_begin[row] >= row_end[row]:
                        for d in range(v_head_dim):
                            target[d] = _narrow(_F0, output)
                        lse[token * q_heads + head] = _NEG_INF
                    else:
                        share = _F1 / totals[row]
                        for d in range(v_head_dim):
                            target[d] = _narrow(sums[row, d] * share, output)
                        lse[token * q_heads + head] = maxima[row] + np.float32(math.log(totals[row]))
    return NO_FAULT
