"""The rooms of the code and who may import whom, read from the tree: a wrong import fails even where it never runs."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "kunserve_sgl"
TOP = "kunserve_sgl"

# Room -> the other rooms that its files may import. The files beside the rooms (errors, args, ...) are open to all.
ROOMS = {
    "policy": set(),
    "memory": set(),
    "wire": set(),
    "cpu_attention": set(),
    "cuda_attention": {"cpu_attention", "exchange"},
    "exchange": {"memory", "policy", "wire"},
    "control": {"policy", "wire"},
    "replica": {"control", "exchange", "memory", "policy", "wire"},
    "integration": {"control"},
    "integration.attach": {"control", "wire"},
    "integration.launcher": {
        *("control", "cuda_attention", "integration", "integration.attach", "integration.cpu_platform"),
    },
    "integration.controller": {
        *("control", "integration", "integration.attach", "integration.cpu_platform", "policy", "wire"),
    },
    "integration.scheduler": {"integration", "integration.attach", "integration.runner", "memory", "replica"},
    "integration.attention": {"cpu_attention", "cuda_attention", "exchange"},
    "integration.runner": {
        *("exchange", "integration.attach", "integration.attention", "integration.cpu_platform", "memory", "replica"),
    },
    "integration.cpu_platform": {"cpu_attention", "exchange", "integration.attention", "memory"},
}
# Room -> what else than the standard library its files may import. SGLang is for `integration` alone.
LIBRARIES = {
    "policy": set(),
    "memory": {"cuda", "torch", "typing_extensions", "xxhash"},
    "wire": {"msgspec", "zmq"},
    "cpu_attention": {"numba", "numpy", "torch"},
    "cuda_attention": {"numpy", "torch", "triton"},
    "exchange": {"msgspec", "numpy", "torch", "typing_extensions", "zmq"},
    "control": {"msgspec", "zmq"},
    "replica": {"msgspec", "numpy", "torch", "typing_extensions", "zmq"},
}
CLOCKS_AND_SOCKETS = {"time", "socket"}  # not even these in `policy`: its functions are pure
BESIDE_ROOMS = {"": {"integration.launcher"}}  # launch_server.py is the way in


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path} uses a relative import, which this test does not resolve"
            yield node.module
            if node.module.startswith(TOP):  # what is imported may be a module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    """The room of a file, or of a module's path without its suffix: the folders that it lies in."""
    return ".".join(path.parent.relative_to(PACKAGE).parts)


def rooms_of_the_tree() -> set[str]:
    return {room_of(path) for path in PACKAGE.rglob("*.py")} - {""}


def target_of(module: str) -> str | None:
    """The room that an import of one of our modules leads to; None for what is no module, but a name in one."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return room_of(path) if path.with_suffix(".py").exists() else None


def may_import(room: str, target: str) -> bool:
    allowed = {**ROOMS, **BESIDE_ROOMS}[room]
    return target in ("", room) or target in allowed


def test_rooms_are_those_of_the_tree() -> None:
    assert rooms_of_the_tree() == set(ROOMS)


def test_structure_document_names_each_room_and_the_process_it_runs_in() -> None:
    rows = re.findall(r"^\| `([a-z_/]+)/` \| ([^|]+) \| [^|]+ \|$", _structure(), flags=re.MULTILINE)
    inside = {folder.replace("/", "."): process.strip() for folder, process in rows if (PACKAGE / folder).is_dir()}
    assert set(inside) == set(ROOMS)
    assert all(inside.values())
    beside = {folder for folder, _ in rows if not (PACKAGE / folder).is_dir()}
    assert beside == {"patches", *folders_beside_the_package()}


def folders_beside_the_package() -> set[str]:
    """The folders of bench/ and tests/, two deep, that hold code."""
    files = [path.relative_to(ROOT) for top in ("bench", "tests") for path in (ROOT / top).rglob("*.py")]
    return {"/".join(path.parent.parts[:2]) for path in files}


def test_unit_tests_have_the_folders_of_the_rooms() -> None:
    unit = ROOT / "tests" / "unit"
    assert {".".join(path.parent.relative_to(unit).parts) for path in unit.rglob("*.py")} - {""} == set(ROOMS)


def test_glossary_is_short() -> None:
    section = _structure().split("\n## Words\n")[1].split("\n## ")[0]
    terms = re.findall(r"^\| \*([^*]+)\* \|", section, flags=re.MULTILINE)
    assert 10 <= len(terms) == len(set(terms)) <= 25


def _structure() -> str:
    return (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("room", [*ROOMS, *BESIDE_ROOMS])
def test_room_imports_only_what_it_may(room: str) -> None:
    for path in PACKAGE.joinpath(*room.split(".")).glob("*.py"):
        for module in imported_modules(path):
            top = module.partition(".")[0]
            if top == TOP:
                target = target_of(module)
                wrong = target is not None and not may_import(room, target)
            elif top in sys.stdlib_module_names:
                wrong = room == "policy" and top in CLOCKS_AND_SOCKETS
            else:
                wrong = top not in LIBRARIES[room] if room in LIBRARIES else top == "sglang" and not room
            assert not wrong, f"{path.relative_to(PACKAGE)} imports {module}"


def test_a_name_is_that_of_one_class() -> None:
    places: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
    assert {"Order", "Answer", "Work", "Command"} <= set(places)


def test_the_test_sees_imports() -> None:
    source = PACKAGE / "integration" / "scheduler" / "scheduler.py"
    assert "sglang.srt.managers.scheduler" in set(imported_modules(source))
    assert target_of("kunserve_sgl.integration.scheduler.admission") == "integration.scheduler"
    assert target_of("kunserve_sgl.errors") == ""
    assert target_of("kunserve_sgl.errors.InvariantError") is None
    assert not may_import("control", "exchange")
    assert not may_import("integration.scheduler", "integration.launcher")
    assert not may_import("memory", "integration.launcher")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle(path: Path) -> None:
    assert not {"pickle", "cloudpickle", "dill", "marshal"} & set(imported_modules(path))
