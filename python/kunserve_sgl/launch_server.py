"""The command: `python -m kunserve_sgl.launch_server`, SGLang's server with KunServe.

Importing this module must stay cheap and free of SGLang: every child process imports it as its main module.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the server with the command line of this process until it is told to stop."""
    from kunserve_sgl.integration.launcher.launch import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
