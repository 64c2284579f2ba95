"""A program in SGLang's frontend language, run against each server named by its URL; prints the results as JSON.

It runs in a process of its own, because the calls of the frontend's client have no deadline.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import sglang as sgl


@sgl.function  # type: ignore[untyped-decorator]
def report(s: Any, topic: str) -> None:
    """Generates, chooses, and asks three forks whose answers it puts together."""
    s += f"A report about {topic}. "
    s += sgl.gen("opening", max_tokens=16, temperature=0)
    s += " It is " + sgl.select("size", choices=["small", "very large", "old"], temperature=0)
    parts = s.fork(3)
    for number, part in enumerate(parts):
        part += f". Part {number}:" + sgl.gen("part", max_tokens=12, temperature=0, stop=["."])
    for part in parts:
        s += part["part"]
    s += " The year is " + sgl.gen("year", regex=r"(19|20)\d\d", max_tokens=8, temperature=0)


def run(url: str) -> list[dict[str, Any]]:
    """The variables and the text of the program for three topics: two at once, then one streamed."""
    backend = sgl.RuntimeEndpoint(url)
    states = report.run_batch([{"topic": "the sea"}, {"topic": "a city"}], backend=backend, num_threads=2)
    streamed = report.run(topic="animals", backend=backend, stream=True)
    text = "".join(streamed.text_iter())
    assert text == streamed.text(), "the streamed text is not the text of the state"
    return [
        {"text": state.text(), **{name: state[name] for name in ("opening", "size", "year")}}
        for state in [*states, streamed]
    ]


if __name__ == "__main__":
    print(json.dumps([run(url) for url in sys.argv[1:]]))
