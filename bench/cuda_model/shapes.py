"""What models at real size take of a GPU, in frames: the sizes of their weights, and the memory that is left for KV."""

from __future__ import annotations

from dataclasses import dataclass

FRAME_BYTES = 2 << 20
GPU_BYTES = 80 * 10**9
STATIC_FRACTION = 0.9  # --mem-fraction-static
DTYPE_BYTES = 2  # bfloat16
# Of SGLang: request rows per replica, where --max-running-requests is not given.
LEAST_ROWS, MOST_ROWS, ROWS_PER_CONTEXT = 2048, 4096, 512


@dataclass(frozen=True)
class Shape:
    """One model on `tp` GPUs per replica, from its published configuration."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocabulary: int
    context: int
    tp: int = 1

    @property
    def weight_bytes(self) -> list[int]:
        """Of one layer, per rank: QKV, output, gate and up, down, and two norms."""
        attention = (self.heads + 2 * self.kv_heads) * self.head_size * self.hidden
        parts = [
            attention,
            self.heads * self.head_size * self.hidden,
            2 * self.intermediate * self.hidden,
            self.intermediate * self.hidden,
        ]
        return [part // self.tp * DTYPE_BYTES for part in parts] + [self.hidden * DTYPE_BYTES] * 2

    @property
    def row_bytes(self) -> int:
        """Of K, or of V, of one token in one layer, per rank."""
        return self.kv_heads // self.tp * self.head_size * DTYPE_BYTES

    @property
    def base_tokens(self) -> int:
        """What fits beside the weights; activations and graphs have the memory that is not static."""
        embeddings = 2 * self.vocabulary * self.hidden * DTYPE_BYTES // self.tp
        left = int(STATIC_FRACTION * GPU_BYTES) - self.layers * sum(self.weight_bytes) - embeddings
        return left // (2 * self.layers * self.row_bytes)

    @property
    def rows(self) -> int:
        return max(LEAST_ROWS, min(MOST_ROWS, self.base_tokens // self.context * ROWS_PER_CONTEXT))


SHAPES = (
    Shape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 32, 128256, 131072),
    Shape("Qwen2.5-14B", 5120, 13824, 40, 8, 128, 48, 152064, 32768),
    Shape("Qwen2.5-72B TP 4", 8192, 29568, 64, 8, 128, 80, 152064, 32768, tp=4),
)
