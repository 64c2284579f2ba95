"""The metric of messages that a process has ignored: of controller and schedulers alike."""

from __future__ import annotations

from collections.abc import Callable


def rejection_counter(model_name: str) -> Callable[[str], None]:
    """Registers the metric in this process, and returns a function to be told the kind of each message that is
    ignored."""
    from prometheus_client import Counter  # looks for a directory that SGLang has set by now

    text = "Control messages that made no sense, and were ignored."
    counter = Counter("kunserve:rejected_messages", text, ["model_name", "kind"])
    return lambda kind: counter.labels(model_name, kind).inc()
