"""What cannot work is refused by the command itself: exit code 2, one message, nothing started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from preloaded import Preloaded

pytestmark = pytest.mark.server

DEADLINE_S = 900
OLMO = {
    **{"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "vocab_size": 2048, "hidden_size": 256},
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
}


def test_refused_starts_end_at_once_with_one_message(tiny_model: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLMO))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        # The arguments, and what the message says: what is refused, and what is accepted.
        cases = [
            (
                ["--model-path", str(tiny_model), "--schedule-policy", "priority"],
                ["--schedule-policy", "accepted: lpm"],
            ),
            (["--model-path", str(tmp_path)], ["model architecture Olmo2ForCausalLM", "Accepted are"]),
            (["--model-path", str(tiny_model), "--dtype", "float32"], [f"--port {port}", "a port that is free"]),
        ]
        command = [sys.executable, "-m", "kunserve_sgl.launch_server", "--dp-size", "2", "--port", port]
        started: list[Any] = []
        logs = [tmp_path / str(number) for number in range(len(cases))]
        try:
            for (flags, _), path in zip(cases, logs, strict=True):
                # The last one as users do; the others have only imported less.
                popen = subprocess.Popen if path is logs[-1] else preloaded.popen
                with path.open("wb") as log:
                    process = popen(
                        [*command, *flags],
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                started.append(process)
            statuses = [process.wait(DEADLINE_S) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
    said = [path.read_text() for path in logs]
    assert statuses == [2, 2, 2], said
    for (_, parts), text in zip(cases, said, strict=True):
        assert text.count("python -m kunserve_sgl.launch_server: error: ") == 1
        message = text.partition("error: ")[2]
        for part in parts:
            assert part in message
        assert message.endswith("(--help lists all flags)\n")
        assert "Traceback" not in text
        assert "Launch DP" not in text
