"""Device memory of one replica: virtual ranges, frames, the ledger, and the parameters that live in them.

Imports torch and what comes with it, the standard library and, for CUDA, `cuda.bindings`. Knows nothing of SGLang.
"""
