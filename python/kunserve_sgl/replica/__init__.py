"""The runtime of one rank: it takes batches to other replicas, executes theirs, and carries out transitions.

What it needs of the serving engine it gets through the Protocols of `engine.py` and `layer_runner.py`; it imports
nothing of SGLang.
"""
