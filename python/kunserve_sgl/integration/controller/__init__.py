"""Runs in the data-parallel controller: who gets a request, and the coordinator."""
