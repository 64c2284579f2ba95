"""What is left of the machine's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from kunserve_sgl.host_memory import free_host_bytes


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000 * 1024),
        ({"memory.max": "max", "memory.current": "1", "memory.stat": "inactive_file 0"}, 8000 * 1024),
        ({"memory.max": "5000", "memory.current": "3000", "memory.stat": "anon 1\ninactive_file 500\n"}, 2500),
        (
            {
                "memory/memory.limit_in_bytes": "5000",
                "memory/memory.usage_in_bytes": "3000",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 700\n",
            },
            2700,
        ),
    ],
)
def test_what_is_free_is_what_the_control_group_allows(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}.items() | {
        (f"sys/fs/cgroup/{name}", text) for name, text in files.items()
    }:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_host_bytes(str(tmp_path)) == expected
