"""A module of SGLang's with our patch, in a process whose own one is as it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from kunserve_sgl.integration.attach import patches


@contextmanager
def patched_module(name: str) -> Iterator[ModuleType]:
    """Makes the module `name` a second time, from its source with our patch, which a server has."""
    [patch] = [each for each in patches.load_patches() if each.module == name]
    package = find_spec("sglang")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent.joinpath(*name.split(".")[1:]).with_suffix(".py").read_text()
    made = ModuleType(f"patched_{name.rpartition('.')[2]}")
    sys.modules[made.__name__] = made  # dataclasses look their module up
    try:
        exec(compile(patch.apply(source), made.__name__, "exec"), made.__dict__)
        yield made
    finally:
        del sys.modules[made.__name__]
