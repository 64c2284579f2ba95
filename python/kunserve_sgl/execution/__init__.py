"""How batches are computed: attention on the host. Knows torch and numba, nothing of SGLang."""
