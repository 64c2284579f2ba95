"""Attention of a whole batch on the CPU over paged keys and values, all of them or those that lie at one home.

Knows torch and numba, nothing of SGLang. A result depends only on the request itself; see `attention_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kunserve_sgl.cpu_attention import attention_kernel as kernel
from kunserve_sgl.errors import InvariantError

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)
NO_WINDOW = -1

_BY_POSITION = np.empty((0, 2), np.int64)  # what each query sees follows from the request table

_POSITION_BITS = 40
_MOST_POSITION = (1 << _POSITION_BITS) // 4  # a query's is less than twice that, so it never meets another request

_MOST_BEGUN = 64  # sets of rows of which a planner knows something: a few replicas' batches, and pieces of them

# A second thread pays from here on: handing work to it costs tens of microseconds, this much work takes hundreds.
_MULTIPLY_ADDS_PER_THREAD = 1 << 21


@dataclass(frozen=True)
class AttentionPlan:
    """Says what every layer of one forward batch has in common: which queries see which slots. It is made once per
    batch.

    `requests` is the kernel's request table, int64 (requests, kernel.REQUEST_COLUMNS). `table` holds slots, int32 or
    int64 (entries,); it is a view, read by every layer, so its rows must not change before the last one has run.
    """

    requests: npt.NDArray[np.int64]
    table: npt.NDArray[Any]
    query_tokens: int
    visible_pairs: int
    """Sum over query tokens of the keys they see without a sliding window: the work of one query head."""
    visible: npt.NDArray[np.int64] = field(default_factory=lambda: _BY_POSITION)
    """Of a part, see `plan_part`: what each query token sees, int64 (query_tokens, 2)."""
    window: int | None = None
    """Of a part: the sliding window that `visible` was made for."""

    def bidirectional(self) -> AttentionPlan:
        """Returns this plan without the causal rule: every query sees all keys of its request."""
        requests = self.requests.copy()
        requests[:, kernel.QUERY_POSITION] = requests[:, kernel.KV_END]
        return _plan(requests, self.table)


def plan_attention(
    table: torch.Tensor,
    rows: torch.Tensor,
    query_counts: torch.Tensor,
    kv_ends: torch.Tensor,
) -> AttentionPlan:
    """Plans one batch. The queries of all requests lie behind one another, in the order of `rows`. Those of each are at
    the last of its positions, and see none behind their own.

    Args:
        table: int32 or int64 (rows, positions), slot per position, as SGLang's req_to_token; not copied.
        rows: integers (requests,), each request's row of `table`.
        query_counts: integers (requests,), query tokens per request; 0 is allowed.
        kv_ends: integers (requests,), one past the last position to attend to.

    Raises:
        ValueError: shapes or dtypes are not these, or a range lies outside the table.
    """
    if table.dim() != 2 or table.dtype not in (torch.int32, torch.int64) or table.stride(1) != 1:
        raise ValueError(f"table must be int32 or int64 (rows, positions), got {table.dtype} {tuple(table.shape)}")
    counts = _integers("query_counts", query_counts, len(rows))
    ends = _integers("kv_ends", kv_ends, len(rows))
    row_indices = _integers("rows", rows, len(rows))
    requests = np.zeros((len(rows), kernel.REQUEST_COLUMNS), np.int64)
    requests[:, kernel.QUERY_START] = np.cumsum(counts) - counts
    requests[:, kernel.QUERY_COUNT] = counts
    requests[:, kernel.KV_END] = ends
    requests[:, kernel.TABLE_OFFSET] = row_indices * table.stride(0)
    requests[:, kernel.QUERY_POSITION] = ends - counts
    for name, numbers, limit in (
        ("query_counts", counts, None),
        ("rows", row_indices, table.shape[0] - 1),
        ("kv_ends", ends, table.shape[1]),
    ):
        _require_within(name, numbers, limit)
    return _plan(requests, _flat(table))


class DecodePlanner:
    """Plans decode steps over one table, as `plan_attention` does with one query token of each request: the last of
    [0, kv_end). Such steps are planned over and over, most of them for the rows of the step before."""

    def __init__(self, table: torch.Tensor) -> None:
        """`table` is as for `plan_attention`."""
        self._rows, self._width = table.shape
        self._stride = table.stride(0)
        self._table = _flat(table)
        self._begun: dict[bytes, npt.NDArray[np.int64]] = {}  # request tables but for what changes, by rows

    def plan(self, rows: torch.Tensor, kv_ends: torch.Tensor) -> AttentionPlan:
        """Plans a step. Raises ValueError as `plan_attention`."""
        count = len(rows)
        ends, row_indices = _integers("kv_ends", kv_ends, count), _integers("rows", rows, count)
        key = row_indices.tobytes()
        begun = self._begun.get(key)
        if begun is None:
            begun = self._begin(key, row_indices)
        each = ends.tolist()  # for a few requests a fraction of what numpy's reductions take
        if count and (min(each) < 0 or max(each) > self._width):
            _require_within("kv_ends", ends, self._width)
        requests = begun.copy()
        requests[:, kernel.KV_END] = ends
        requests[:, kernel.QUERY_POSITION] = ends - 1
        return AttentionPlan(requests, self._table, count, sum(each))

    def _begin(self, key: bytes, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        _require_within("rows", rows, self._rows - 1)
        begun = np.zeros((len(rows), kernel.REQUEST_COLUMNS), np.int64)
        begun[:, kernel.QUERY_START] = np.arange(len(rows))
        begun[:, kernel.QUERY_COUNT] = 1
        begun[:, kernel.TABLE_OFFSET] = rows * self._stride
        if len(self._begun) >= _MOST_BEGUN:
            self._begun.clear()
        self._begun[key] = begun
        return begun


def plan_part(
    slots: npt.NDArray[np.integer[Any]],
    positions: npt.NDArray[np.integer[Any]],
    slot_counts: npt.NDArray[np.integer[Any]],
    query_counts: npt.NDArray[np.integer[Any]],
    first_positions: npt.NDArray[np.integer[Any]],
    *,
    sliding_window: int = NO_WINDOW,
) -> AttentionPlan:
    """Plans partial attention: of each request only over some of its slots, which may leave out any positions.

    A query sees of these slots what it would see of them all: no position behind its own, and none before its window.
    So requests that extend need no other rule than those that decode, wherever the slots of their new tokens are. What
    comes out for a query depends only on the slots of the part that it sees, not on how a prompt was cut into chunks.
    `attend` runs the plan; with `output_dtype` float32 its results are what `merging.MergePlan` takes of each part.

    Args:
        slots: integers (entries,), request by request, and in each by ascending position.
        positions: integers (entries,), the position of each slot in its request.
        slot_counts: integers (requests,), entries per request; 0 is allowed, and gives output 0 and LSE -inf.
        query_counts: integers (requests,), query tokens per request; 0 is allowed.
        first_positions: integers (requests,), the position of each request's first query; the others follow it.
        sliding_window: that of the layers that use this plan; `attend` refuses another one.

    Raises:
        ValueError: the arrays do not fit together, or positions do not ascend.
    """
    shapes = [array.shape for array in (slots, positions, slot_counts, query_counts, first_positions)]
    requests, entries = len(slot_counts), len(slots)
    if shapes != [(entries,), (entries,), (requests,), (requests,), (requests,)]:
        raise ValueError(f"slots, positions, slot_counts, query_counts, first_positions do not fit together: {shapes}")
    counts, slots_of_each, firsts = (array.astype(np.int64) for array in (query_counts, slot_counts, first_positions))
    for name, numbers in (("query_counts", counts), ("slot_counts", slots_of_each), ("first_positions", firsts)):
        _require_within(name, numbers, _MOST_POSITION)
    _require_within("positions", positions, _MOST_POSITION)
    if int(slots_of_each.sum()) != entries:
        raise ValueError(f"slot_counts are {int(slots_of_each.sum())} entries, got {entries}")
    offsets = np.cumsum(slots_of_each) - slots_of_each
    starts = np.cumsum(counts) - counts
    # Request and position in one number, so that one search finds the range of each query in its request.
    keys = np.repeat(np.arange(requests) << _POSITION_BITS, slots_of_each) + positions
    if entries > 1 and not (keys[1:] > keys[:-1]).all():
        raise ValueError("positions must ascend in each request")
    first_keys = (np.arange(requests) << _POSITION_BITS) + firsts - starts
    query_keys = np.repeat(first_keys, counts) + np.arange(int(counts.sum()))
    own_offsets = np.repeat(offsets, counts)
    visible = np.empty((len(query_keys), 2), np.int64)
    visible[:, 1] = np.searchsorted(keys, query_keys, side="right") - own_offsets
    window = 2 * _MOST_POSITION if sliding_window < 0 else min(sliding_window, 2 * _MOST_POSITION)
    visible[:, 0] = np.searchsorted(keys, query_keys - window) - own_offsets
    table = np.zeros((requests, kernel.REQUEST_COLUMNS), np.int64)
    table[:, kernel.QUERY_START] = starts
    table[:, kernel.QUERY_COUNT] = counts
    table[:, kernel.KV_END] = slots_of_each
    table[:, kernel.TABLE_OFFSET] = offsets
    # Copied, as the kernel is compiled anew for a table that it may not write to, such as the bytes of a message.
    return AttentionPlan(
        table,
        np.array(slots, np.int32 if slots.dtype.itemsize <= 4 else np.int64),
        len(query_keys),
        int((visible[:, 1] - visible[:, 0]).sum()),
        visible,
        sliding_window,
    )


def _require_within(name: str, numbers: npt.NDArray[np.integer[Any]], limit: int | None) -> None:
    # The methods of arrays do the same at twice the price.
    if len(numbers) and (np.minimum.reduce(numbers) < 0 or (limit is not None and np.maximum.reduce(numbers) > limit)):
        raise ValueError(f"{name} must lie in [0, {'inf' if limit is None else limit}], got {numbers.tolist()}")


def _plan(requests: npt.NDArray[np.int64], table: npt.NDArray[Any]) -> AttentionPlan:
    counts = requests[:, kernel.QUERY_COUNT]
    visible_last = np.minimum(requests[:, kernel.KV_END], requests[:, kernel.QUERY_POSITION] + counts)
    visible_first = np.minimum(requests[:, kernel.KV_END], requests[:, kernel.QUERY_POSITION] + 1)
    pairs = (np.maximum(visible_first, 0) + np.maximum(visible_last, 0)) * counts // 2
    return AttentionPlan(requests, table, int(counts.sum()), int(pairs.sum()))


class PagedAttention:
    """Runs the kernel on as many threads as torch uses, from one thread at a time. `close` ends the threads."""

    def __init__(self) -> None:
        self._workers: ThreadPoolExecutor | None = None
        self._worker_count = 0

    def close(self) -> None:
        """Ends the worker threads; the next call that needs them starts new ones."""
        if self._workers is not None:
            self._workers.shutdown()
        self._workers = None
        self._worker_count = 0

    def warm_up(
        self,
        query_dtype: torch.dtype,
        cache_dtype: torch.dtype,
        *,
        table_dtype: torch.dtype = torch.int32,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        """Compiles the kernel for these types, or loads it from the disk cache, so that no request waits for it."""
        query = torch.zeros(1, 1, 1, dtype=query_dtype)
        cache = torch.zeros(1, 1, 1, dtype=cache_dtype)
        row, count, kv_end = (torch.tensor([number]) for number in (0, 1, 1))
        plan = plan_attention(torch.zeros(1, 1, dtype=table_dtype), row, count, kv_end)
        self.attend(plan, query, cache, cache, scale=1.0, output_dtype=output_dtype)

    def attend(
        self,
        plan: AttentionPlan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        logit_cap: float = 0.0,
        sliding_window: int = NO_WINDOW,
        output_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """softmax(scale * query . key) @ value per request and head, over the slots of the plan.

        Args:
            query: float32 or bfloat16 (tokens, q_heads, head_dim).
            key: float32 or bfloat16 (slots, kv_heads, head_dim). q_heads is a multiple of kv_heads. Only the slots of
                the plan are read: the rest need not be backed by memory.
            value: same dtype (slots, kv_heads, v_head_dim); may share memory with `key` (latent attention).
            logit_cap: if positive, scores become logit_cap * tanh(score / logit_cap).
            sliding_window: if not negative, a query at position p sees no position before p - sliding_window.
            output_dtype: default that of `query`. float32 for partial results that will be merged.

        Returns:
            output (tokens, q_heads, v_head_dim), and the natural logarithm of the sum of exponentiated scores,
            float32 (tokens, q_heads). A token that sees nothing has output 0 and LSE -inf.

        Raises:
            ValueError: a shape, dtype or memory layout is not supported.
            InvariantError: the plan is for another number of tokens or another window, or names a slot outside the
                buffer.
        """
        _check(query, key, value)
        tokens, q_heads, head_dim = query.shape
        slots, kv_heads, v_head_dim = value.shape
        if tokens != plan.query_tokens:
            raise InvariantError(f"attention was planned for {plan.query_tokens} query tokens, got {tokens}")
        if plan.window not in (None, sliding_window):
            raise InvariantError(f"attention was planned for sliding window {plan.window}, got {sliding_window}")
        output = torch.empty((tokens, q_heads, v_head_dim), dtype=output_dtype or query.dtype)
        lse = torch.empty((tokens, q_heads), dtype=torch.float32)
        arguments = (
            *(plan.requests, plan.table, plan.visible),
            *(_flat(query), query.stride(0), query.stride(1)),
            *(_flat(key), key.stride(0), key.stride(1)),
            *(_flat(value), value.stride(0), value.stride(1)),
            *(slots, _flat(output), _flat(lse)),
            *(q_heads, kv_heads, head_dim, v_head_dim),
            *(np.float32(scale), np.float32(logit_cap), sliding_window),
        )
        threads = self._threads(plan.visible_pairs * q_heads * (head_dim + v_head_dim))
        for fault in self._run(threads, arguments):
            if fault != kernel.NO_FAULT:
                request, position = divmod(fault, 1 << 32)
                slot = plan.table[plan.requests[request, kernel.TABLE_OFFSET] + position]
                raise InvariantError(f"request {request}, position {position}: slot {slot} is not in [0, {slots})")
        return output, lse

    def _threads(self, multiply_adds: int) -> int:
        return max(1, min(torch.get_num_threads(), multiply_adds // _MULTIPLY_ADDS_PER_THREAD))

    def _run(self, threads: int, arguments: tuple[Any, ...]) -> Sequence[int]:
        # Not numba's own threads: its layers do not survive a fork or bring a second OpenMP beside torch's.
        if threads == 1:
            return [kernel.attend(0, 1, *arguments)]
        if self._worker_count < threads - 1:
            self.close()
            self._workers = ThreadPoolExecutor(threads - 1, thread_name_prefix="host-attention")
            self._worker_count = threads - 1
        assert self._workers is not None
        others = [self._workers.submit(kernel.attend, part, threads, *arguments) for part in range(1, threads)]
        return [kernel.attend(0, threads, *arguments), *(other.result() for other in others)]


def _flat(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Views all memory from the first to the last element as a one-dimensional array, bfloat16 as uint16. Nothing is
    copied."""
    if tensor.is_contiguous():
        flat = tensor.detach().view(-1)
    elif tensor.numel() == 0:
        flat = tensor.detach().as_strided((0,), (1,))
    else:
        extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.detach().as_strided((extent,), (1,))
    array: npt.NDArray[Any] = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
    return array


def _integers(name: str, tensor: torch.Tensor, length: int) -> npt.NDArray[np.int64]:
    if tensor.shape != (length,) or tensor.is_floating_point() or not tensor.is_cpu:
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must be integers ({length},) on the CPU, got {found}")
    numbers: npt.NDArray[np.int64] = tensor.numpy()
    return numbers if tensor.dtype is torch.int64 else numbers.astype(np.int64)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3 or tensor.dtype not in SUPPORTED_DTYPES or tensor.device.type != "cpu":
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must be float32 or bfloat16 (n, heads, dim) on the CPU, got {found}")
        if tensor.shape[2] > 1 and tensor.stride(2) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
    if key.shape[:2] != value.shape[:2] or key.dtype != value.dtype:
        found = f"key {key.dtype} {tuple(key.shape)}, value {value.dtype} {tuple(value.shape)}"
        raise ValueError(f"key and value must have the same dtype, slots and heads, got {found}")
    if query.shape[2] != key.shape[2] or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}: head_dim or head counts")
