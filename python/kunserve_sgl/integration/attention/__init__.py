"""Attention to parts of batches in SGLang's pools, where their KV is divided over homes: on a CPU and on CUDA."""
