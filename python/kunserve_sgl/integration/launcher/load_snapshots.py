"""What replicas say of their load, for SGLang's /v1/loads and load balancing: where they share no memory with the head,
they send it, and it is written here to where SGLang reads it."""

from __future__ import annotations

import logging

import msgspec
from sglang.srt.managers.load_snapshot import ShmLoadSnapshotWriter, shm_path_for, snapshot_decoder

from kunserve_sgl.integration.messages import LoadSnapshotTold

logger = logging.getLogger(__name__)


class LoadSnapshots:
    """Writes for all replicas of one server."""

    def __init__(self, instance_id: str, replicas: int) -> None:
        """SGLang has named its file after `instance_id`."""
        self._path = shm_path_for(instance_id)
        self._replicas = replicas
        self._writers: dict[int, ShmLoadSnapshotWriter] = {}

    def on_told(self, message: LoadSnapshotTold) -> None:
        """Takes in what one has sent."""
        try:
            snapshot = snapshot_decoder.decode(message.snapshot)
            if snapshot.dp_rank not in self._writers:
                self._writers[snapshot.dp_rank] = ShmLoadSnapshotWriter(self._path, self._replicas, snapshot.dp_rank)
            self._writers[snapshot.dp_rank].write(snapshot)
        except (ValueError, msgspec.MsgspecError, OSError) as error:
            logger.error("KunServe: ignored the load of a replica: %s", error)
