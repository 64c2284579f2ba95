"""Who may import whom: read from the source, so that a wrong import fails even where it is never executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "python" / "kunserve_sgl"

# Layer -> what a module of it must not import. Anything not listed is allowed.
FORBIDDEN = {
    "memory": (
        "sglang",
        "kunserve_sgl.integration",
        "kunserve_sgl.control",
        "kunserve_sgl.exchange",
        "kunserve_sgl.policy",
    ),
    "policy": (
        *("sglang", "torch", "numpy", "zmq", "msgspec", "time", "socket"),
        *("kunserve_sgl.integration", "kunserve_sgl.control", "kunserve_sgl.exchange", "kunserve_sgl.memory"),
    ),
    "exchange": ("sglang", "kunserve_sgl.integration", "kunserve_sgl.control"),
    "control": ("sglang", "torch", "kunserve_sgl.integration", "kunserve_sgl.memory"),
    "sim": ("sglang", "torch", "kunserve_sgl.integration"),
    "": ("sglang",),
}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path} uses a relative import, which this test does not resolve"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_files(layer: str) -> list[Path]:
    return sorted(PACKAGE.glob("*.py") if not layer else (PACKAGE / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layer_imports_only_what_it_may(layer: str) -> None:
    for path in layer_files(layer):
        for module in imported_modules(path):
            for forbidden in FORBIDDEN[layer]:
                wrong = module == forbidden or module.startswith(forbidden + ".")
                assert not wrong, f"{path.relative_to(PACKAGE)} imports {module}"


def test_the_test_sees_imports() -> None:
    source = PACKAGE / "integration" / "scheduler" / "scheduler.py"
    assert "sglang.srt.managers.scheduler" in set(imported_modules(source))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle(path: Path) -> None:
    assert not {"pickle", "cloudpickle", "dill", "marshal"} & set(imported_modules(path))
