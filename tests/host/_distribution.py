"""How tests are spread over the processes of pytest-xdist: those that share a server run in the same one."""

from __future__ import annotations

import re

from _deployments import GROUPS
from xdist.scheduler import LoadScopeScheduling

# Longer names first: a name may be the beginning of another one.
_NAMES = "|".join(re.escape(each.name) for each in sorted(GROUPS, key=lambda each: -len(each.name)))
_DEPLOYMENT = re.compile(rf"(?<=[\[-])({_NAMES})(?=[]-])")
_GROUP_OF_NAME = {deployment.name: group for deployment, group in GROUPS.items()}


def unit_of(node_id: str) -> str:
    """Names what a test runs in one process with: the group of its deployment, or its file."""
    file, _, test = node_id.partition("::")
    deployment = _DEPLOYMENT.search(test) if file.startswith("tests/host/") else None
    return file if deployment is None else _GROUP_OF_NAME[deployment.group()]


class SharedServerScheduling(LoadScopeScheduling):
    """Hands whole units out, in the order in which they were collected.

    Marks for `--dist loadgroup` would say the same, but pytest-xdist 3.8 loses them with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
