"""How tests are spread over the processes of pytest-xdist: those that share a server run in the same one."""

from __future__ import annotations

import re

from _deployments import GROUPS
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

# Longer names first: a name may be the beginning of another one.
_NAMES = "|".join(re.escape(each.name) for each in sorted(GROUPS, key=lambda each: -len(each.name)))
_DEPLOYMENT = re.compile(rf"(?<=[\[-])({_NAMES})(?=[]-])")
_FOLDER = "tests/host/"
_WITH_SERVERS = 2  # processes whose servers run side by side on two cores
_GROUP_OF_NAME = {deployment.name: group for deployment, group in GROUPS.items()}


def unit_of(node_id: str) -> str:
    """Names what a test runs in one process with: the group of its deployment, or its file."""
    file, _, test = node_id.partition("::")
    deployment = _DEPLOYMENT.search(test) if _is_with_servers(file) else None
    return file if deployment is None else _GROUP_OF_NAME[deployment.group()]


class SharedServerScheduling(LoadScopeScheduling):
    """Hands whole units out, in the order in which they were collected. Of three processes one begins with those that
    need no server, and computes while the others wait for theirs.

    Marks for `--dist loadgroup` would say the same, but pytest-xdist 3.8 loses them with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        if len(self.nodes) > _WITH_SERVERS and node is self.nodes[-1]:
            others = (unit for unit, tests in self.workqueue.items() if not any(map(_is_with_servers, tests)))
            if (first := next(others, None)) is not None:
                self.workqueue.move_to_end(first, last=False)
        super()._assign_work_unit(node)


def _is_with_servers(node_id: str) -> bool:
    return node_id.startswith(_FOLDER)
