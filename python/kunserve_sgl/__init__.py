"""KunServe for SGLang: parameter-centric memory management for LLM serving."""

__version__ = "0.1.0"
