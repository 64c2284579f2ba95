"""Attention on a CPU, over paged KV. Knows torch and numba, nothing of SGLang."""
