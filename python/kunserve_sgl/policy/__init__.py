"""Decisions without side effects: a snapshot in, a plan out. No torch, no clock, no I/O."""
