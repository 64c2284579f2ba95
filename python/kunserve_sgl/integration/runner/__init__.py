"""Runs in the schedulers, below the batch: the model, its layers, and the KV pools over elastic memory."""
