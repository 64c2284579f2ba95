"""Batches between the replicas of a group: orders, answers, activations. Knows nothing of SGLang."""
