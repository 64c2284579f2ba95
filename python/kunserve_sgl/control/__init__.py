"""Transitions between plans: messages, the coordinator that orders them."""
