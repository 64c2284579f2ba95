"""Attaches KunServe to SGLang in each process. Imports nothing: children import this before the patches are in."""
