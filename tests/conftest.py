"""What holds for every test run: it leaves no process behind."""

from __future__ import annotations

import psutil
import pytest
from hypothesis import settings

# The same examples in every run, without a limit on the time of one: `--hypothesis-profile random` looks for others.
settings.register_profile("random", deadline=None)
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

_STOP_DEADLINE_S = 10.0


def _own_children() -> list[psutil.Process]:
    """Live descendants of this process; without helpers of the standard library, which end with it."""
    helpers = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            command = " ".join(child.cmdline())
            if child.status() != psutil.STATUS_ZOMBIE and not any(helper in command for helper in helpers):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run when a process that it started is still alive, and kills it."""
    left = _own_children()
    if not left:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for child in left:
        if reporter is not None:
            reporter.write_line(f"left behind: {child.pid} {' '.join(child.cmdline())[:200]}", red=True)
        child.kill()
    psutil.wait_procs(left, timeout=_STOP_DEADLINE_S)
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
