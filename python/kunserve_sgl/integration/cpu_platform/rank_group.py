"""SGLang's groups of ranks on a CPU: small tensors and requests go by sockets between the ranks, the rest by gloo."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.utils import common
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from kunserve_sgl.integration.cpu_platform.rank_sockets import MOST_BYTES, RankSockets, connect


def install() -> None:
    """Replaces the class of groups, and how requests are broadcast to all ranks, in this process. Idempotent."""
    parallel_state.GroupCoordinator = CpuGroup
    common.dist = _Distributed()


class CpuGroup(parallel_state.GroupCoordinator):  # type: ignore[misc]
    """The ranks of one replica, which are on one machine."""

    @cached_property
    def sockets(self) -> RankSockets:
        """Connects the ranks when they use it first, all at once."""
        timeout = parallel_state._MODEL_PARALLEL_GROUP_TIMEOUT or default_pg_timeout
        return connect(self.rank_in_group, self._share, timeout.total_seconds())

    def _share(self, text: str) -> list[str]:
        texts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(texts, text, group=self.cpu_group)
        return texts

    def takes(self, tensor: torch.Tensor) -> bool:
        """Tells whether a tensor goes by the sockets; the same at all ranks, as its shape is."""
        return self.world_size > 1 and tensor.is_cpu and tensor.nbytes * (self.world_size - 1) <= MOST_BYTES

    @override
    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        if not self.takes(input_):
            return super().all_reduce(input_)  # type: ignore[no-any-return]
        self.sockets.all_reduce(input_)
        return input_

    @override
    def all_gather(
        self, input_: torch.Tensor, dim: int = -1, output_tensor_list: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        if output_tensor_list is not None or not self.takes(input_):
            return super().all_gather(input_, dim, output_tensor_list)  # type: ignore[no-any-return]
        return torch.cat(self.sockets.all_gather(input_), dim)


class _Distributed:
    """torch.distributed, as SGLang's helpers see it, but that the ranks of a replica broadcast by their sockets."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    def broadcast(self, tensor: torch.Tensor, src: int, group: Any = None) -> None:
        ranks = parallel_state._TP
        if isinstance(ranks, CpuGroup) and group is ranks.cpu_group and ranks.takes(tensor):
            ranks.sockets.broadcast(tensor, ranks.ranks.index(src))
        else:
            torch.distributed.broadcast(tensor, src=src, group=group)
