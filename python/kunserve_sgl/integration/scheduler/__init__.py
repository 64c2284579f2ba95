"""Runs in the schedulers: SGLang's scheduler with the memory manager."""
