"""An installation that is not editable has everything: every package is listed, and the patches are data of one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "python" / "kunserve_sgl"


@pytest.fixture(scope="module")
def setuptools() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings: dict[str, Any] = tomllib.load(file)["tool"]["setuptools"]
    return settings


def directory_of(package: str, settings: dict[str, Any]) -> Path:
    """Where setuptools looks for a package."""
    directories: dict[str, str] = settings["package-dir"]
    if package in directories:
        return ROOT / directories[package]
    parent, _, name = package.rpartition(".")
    return directory_of(parent, settings) / name


def test_every_package_is_listed(setuptools: dict[str, Any]) -> None:
    listed = {directory_of(package, setuptools): package for package in setuptools["packages"]}
    assert len(listed) == len(setuptools["packages"])
    with_modules = {path.parent for path in SOURCE.rglob("*.py")} | {ROOT / "patches"}
    assert set(listed) == with_modules
    # Without this file the directory is no package, and its modules are packaged by nobody.
    assert [str(directory) for directory in listed if not (directory / "__init__.py").exists()] == []


def test_every_other_file_is_data_of_its_package(setuptools: dict[str, Any]) -> None:
    packaged: set[Path] = set()
    for package, patterns in setuptools["package-data"].items():
        for pattern in patterns:
            packaged.update(directory_of(package, setuptools).glob(pattern))
    patches = set((ROOT / "patches").glob("*.patch"))
    others = {
        path
        for path in SOURCE.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert patches
    assert patches | others == packaged
