"""What every KunServe socket has in common: how messages are framed, who may connect, and what is ignored."""
