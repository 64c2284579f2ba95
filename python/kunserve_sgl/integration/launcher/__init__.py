"""Runs in the launcher: the command line, the HTTP routes, what requests may say, and the end of the server."""
