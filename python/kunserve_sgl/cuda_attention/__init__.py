"""Attention on CUDA over the part of a batch's KV that lies at one home, and the merging of parts."""

MOST_HEAD_DIM = 256
"""A block of keys with more dimensions takes more than there is of what a block's threads share."""
