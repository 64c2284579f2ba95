"""The Triton kernel for parts of attention: of each query over those slots of a part that it sees.

It is the one of SGLang's kernels (`extend_attention.py`, 0.5.17) that walks slots, but for two things: what a query
sees is given as a range of the part's slots, and the log-sum-exp is given back. So it needs neither to know where
positions are missing, nor a mask. Method: softmax over blocks with a running maximum and sum (Dao et al. 2022,
"FlashAttention"), in float32; the log-sum-exp is a natural logarithm. Untried on CUDA; tests interpret it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from kunserve_sgl.cpu_attention import attention_kernel as columns
from kunserve_sgl.cpu_attention.paged_attention import AttentionPlan
from kunserve_sgl.cuda_attention import MOST_HEAD_DIM
from kunserve_sgl.exchange.device_copies import on_device

_MOST_ROWS = 64
_LEAST_ROWS = 16  # of what `tl.dot` takes
_BLOCK_ENTRIES = 64
_BLOCK_COLUMNS = 5


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,  # (rows, heads, HEAD)
    key,  # (slots, kv heads, HEAD)
    value,  # (slots, kv heads, V_HEAD)
    output,  # float32 (rows, heads, V_HEAD)
    lse,  # float32 (rows, heads)
    slots,  # int64 (entries,)
    visible,  # int64 (rows, 2)
    blocks,  # int64 (blocks, 5)
    scale,
    stride_query,
    stride_query_head,
    stride_key,
    stride_key_head,
    stride_value,
    stride_value_head,
    heads,
    group,
    CAP: tl.constexpr,
    HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    DIMS: tl.constexpr,
    V_DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = blocks + 5 * tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // group
    first, stop, offset = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    begin, end = tl.load(block + 3), tl.load(block + 4)
    rows = first + tl.arange(0, ROWS)
    is_row = rows < stop
    seen_from = tl.load(visible + 2 * rows, mask=is_row, other=0)
    seen_to = tl.load(visible + 2 * rows + 1, mask=is_row, other=0)
    dims, v_dims = tl.arange(0, DIMS), tl.arange(0, V_DIMS)
    q = tl.load(
        query + rows[:, None] * stride_query + head * stride_query_head + dims[None, :],
        mask=is_row[:, None] & (dims < HEAD)[None, :],
        other=0.0,
    )
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, V_DIMS], tl.float32)
    for start in range(begin, end, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        is_entry = entries < end
        slot = tl.load(slots + offset + entries, mask=is_entry, other=0)
        k = tl.load(
            key + slot[None, :] * stride_key + kv_head * stride_key_head + dims[:, None],
            mask=is_entry[None, :] & (dims < HEAD)[:, None],
            other=0.0,
        )
        scores = tl.dot(q.to(k.dtype), k, input_precision=PRECISION) * scale
        if CAP > 0:
            scores = CAP * (2 * tl.sigmoid(2 * (scores / CAP)) - 1)
        is_seen = (entries[None, :] >= seen_from[:, None]) & (entries[None, :] < seen_to[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        shrink = tl.exp(largest - base)
        weights = tl.exp(scores - base[:, None])
        v = tl.load(
            value + slot[:, None] * stride_value + kv_head * stride_value_head + v_dims[None, :],
            mask=is_entry[:, None] & (v_dims < V_HEAD)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = new_largest
    is_any = total > 0
    divisor = tl.where(is_any, total, 1.0)
    places = rows * heads + head
    tl.store(lse + places, tl.where(is_any, largest + tl.log(divisor), float("-inf")), mask=is_row)
    tl.store(
        output + places[:, None] * V_HEAD + v_dims[None, :],
        sums / divisor[:, None],
        mask=is_row[:, None] & (v_dims < V_HEAD)[None, :],
    )


@dataclass(frozen=True, slots=True)
class PartTables:
    """Is a part as the kernel takes it, on its device. `slots`: int64 (entries,); `visible`: int64 (rows, 2), what each
    query sees of its request's slots; `blocks`: int64 (blocks, 5), first row, one past the last, where the request's
    slots begin, and the first and one past the last of them that any of these rows sees."""

    slots: torch.Tensor
    visible: torch.Tensor
    blocks: torch.Tensor
    block_rows: int
    rows: int


def tables_of(plan: AttentionPlan, device: torch.device) -> PartTables:
    """Makes the tables of a plan of `plan_part`."""
    counts = plan.requests[:, columns.QUERY_COUNT]
    most = int(counts.max(initial=1))
    block_rows = next(rows for rows in (_LEAST_ROWS, 32, _MOST_ROWS) if rows >= most or rows == _MOST_ROWS)
    per_request = -(-counts // block_rows)
    owners = np.repeat(np.arange(len(counts)), per_request)
    numbers = np.arange(len(owners)) - np.repeat(np.cumsum(per_request) - per_request, per_request)
    starts = plan.requests[owners, columns.QUERY_START]
    blocks = np.empty((len(owners), _BLOCK_COLUMNS), np.int64)
    blocks[:, 0] = starts + numbers * block_rows
    blocks[:, 1] = np.minimum(blocks[:, 0] + block_rows, starts + counts[owners])
    blocks[:, 2] = plan.requests[owners, columns.TABLE_OFFSET]
    if len(owners):  # what is seen moves on from query to query
        blocks[:, 3] = plan.visible[blocks[:, 0], 0]
        blocks[:, 4] = plan.visible[blocks[:, 1] - 1, 1]
    slots, visible, on_blocks = on_device(device, plan.table, plan.visible, blocks)
    return PartTables(slots, visible, on_blocks, block_rows, plan.query_tokens)


def attend(
    tables: PartTables,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    logit_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * query . key) @ value per request and head, over what each query sees; gives it to the current
    stream.

    Args:
        query: (rows, heads, head_dim) of the type of `key`, head_dim up to MOST_HEAD_DIM.
        key: bfloat16, float16 or float32 (slots, kv_heads, head_dim). heads is a multiple of kv_heads. Only the slots
            of the part are read; slot 0 has to be backed by memory.
        value: the same type (slots, kv_heads, v_head_dim).
        logit_cap: if positive, scores become logit_cap * tanh(score / logit_cap).

    Returns:
        output, float32 (rows, heads, v_head_dim), and the natural logarithm of the sum of exponentiated scores, float32
        (rows, heads). A query that sees nothing has output 0 and LSE -inf.

    Raises:
        ValueError: the tensors do not fit together, or to the part.
    """
    rows, heads, head_dim = query.shape
    kv_heads, v_head_dim = value.shape[1:]
    fits = rows == tables.rows and key.shape == (*value.shape[:2], head_dim) and heads % kv_heads == 0
    if not fits or max(head_dim, v_head_dim) > MOST_HEAD_DIM or not query.dtype == key.dtype == value.dtype:
        found = ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in (query, key, value))
        raise ValueError(f"a part of {tables.rows} queries, heads of {MOST_HEAD_DIM} at most, of one type; got {found}")
    if query.stride(2) != 1 or key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("query, key and value must be contiguous in their last dimension")
    output = torch.empty(rows, heads, v_head_dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=query.device)
    if not len(tables.blocks):
        return output, lse
    dims, v_dims = (max(_LEAST_ROWS, triton.next_power_of_2(dim)) for dim in (head_dim, v_head_dim))
    _attend[(len(tables.blocks), heads)](
        *(query, key, value, output, lse, tables.slots, tables.visible, tables.blocks, scale),
        *(query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        *(heads, heads // kv_heads),
        CAP=logit_cap,
        HEAD=head_dim,
        V_HEAD=v_head_dim,
        DIMS=dims,
        V_DIMS=v_dims,
        ROWS=tables.block_rows,
        ENTRIES=_BLOCK_ENTRIES if dims <= 128 else _BLOCK_ENTRIES // 2,
        # Products of float32 are those of float32, and not of the shorter type that tensor cores would take for it.
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4 if dims <= 64 else 8,
        num_stages=1,
    )
    return output, lse
