"""What replicas on other machines have counted: written to where SGLang's /metrics reads what those here have."""

from __future__ import annotations

import logging
import os
import re
import struct
from pathlib import Path

from kunserve_sgl.integration.messages import MetricsTold

logger = logging.getLogger(__name__)

# Which start of it, and which of its processes; no underscore: prometheus_client divides names there.
_WHO = re.compile(r"replica\d+\.\d+\.\d+")
_KIND = re.compile(r"counter|histogram|summary|gauge_[a-z]+")
_NOT_A_FILE = (ValueError, RuntimeError, struct.error)  # what prometheus_client raises where it cannot read one


def on_told(message: MetricsTold) -> None:
    """Takes in what one has sent. A file that is none is left out: it would make every call of /metrics fail."""
    from prometheus_client.mmap_dict import MmapedDict  # decides when imported where metrics go: not before a fork

    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if directory is None or not _WHO.fullmatch(message.who):
        logger.error("KunServe: ignored the metrics of %s: there is no place for them", message.who)
        return
    for kind, content in message.files.items():
        if not _KIND.fullmatch(kind):
            logger.error("KunServe: ignored metrics of %s: no kind of them is called %s", message.who, kind)
            continue
        written = Path(directory, f"{kind}_{message.who}.new")
        try:
            written.write_bytes(content)
            for _ in MmapedDict.read_all_values_from_file(str(written)):  # type: ignore[no-untyped-call]
                pass
            written.rename(written.with_name(f"{kind}_{message.who}.db"))
        except (OSError, *_NOT_A_FILE) as error:
            written.unlink(missing_ok=True)
            logger.error("KunServe: ignored metrics of %s: %s", message.who, error)
