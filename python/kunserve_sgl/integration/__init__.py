"""All contact of KunServe with SGLang; no other package imports `sglang`."""
