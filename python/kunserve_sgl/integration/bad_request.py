"""What launcher and schedulers raise for a request that makes no sense; every route answers it with 400."""

from __future__ import annotations


class BadRequestError(ValueError):
    """Says that a request makes no sense. The message names the field and what is accepted."""
