"""Patch loader: applies the unified diffs in patches/ to SGLang's source, in memory, when a module is imported.

The installed files are never changed. A patch names the module it is for, the SHA-256 of the upstream source it was
made against, and why it exists. Anything that does not match is an AttachmentError: a half-attached server could give
wrong answers under load, so the start stops instead.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from types import CodeType, ModuleType

from kunserve_sgl.errors import ConfigurationError

_PATCH_PACKAGE = "kunserve_sgl.patches"
_HEADER_FIELD = re.compile(r"^(Module|Processes|Source-SHA256|Reason): *(.+)$")
_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class AttachmentError(ConfigurationError):
    """KunServe could not attach itself to SGLang as it must; the process refuses to start."""


@dataclass(frozen=True)
class Patch:
    """Holds one unified diff against one upstream module."""

    name: str
    module: str
    processes: tuple[str, ...]
    """The roles of the processes that need it (see attachment.Role); others import the module as it is."""
    source_sha256: str
    reason: str
    hunks: tuple[tuple[int, tuple[str, ...]], ...]
    """Per hunk: the 1-based first line in the upstream source, and its lines with their ' ', '-' or '+' mark."""

    def apply(self, source: str) -> str:
        """Returns the patched text of the whole module. Context and removed lines must match exactly, at their place.
        Raises AttachmentError."""
        upstream = source.splitlines(keepends=True)
        result: list[str] = []
        position = 0
        for first_line, hunk in self.hunks:
            start = first_line - 1
            if start < position:
                raise AttachmentError(f"patch {self.name}: hunk at line {first_line} overlaps the one before it")
            result += upstream[position:start]
            position = start
            for line in hunk:
                mark, text = line[0], line[1:]
                if mark == "+":
                    result.append(text)
                    continue
                if position >= len(upstream) or upstream[position] != text:
                    found = upstream[position].rstrip("\n") if position < len(upstream) else "end of file"
                    raise AttachmentError(
                        f"patch {self.name} does not apply to {self.module} at line {position + 1}: "
                        f"expected {text.rstrip()!r}, found {found!r}"
                    )
                if mark == " ":
                    result.append(text)
                position += 1
        return "".join(result + upstream[position:])


def parse_patch(name: str, text: str) -> Patch:
    """Reads a patch file: header fields, then a unified diff of one file."""
    fields: dict[str, str] = {}
    hunks: list[tuple[int, tuple[str, ...]]] = []
    lines = text.splitlines(keepends=True)
    index = 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if match := _HEADER_FIELD.match(line):
            fields[match[1]] = match[2].strip()
        elif match := _HUNK.match(line):
            old_count = int(match[2] or 1)
            new_count = int(match[4] or 1)
            body: list[str] = []
            while old_count or new_count:
                if index == len(lines) or lines[index][0] not in " +-":
                    raise AttachmentError(f"patch {name}: hunk {line.strip()!r} is shorter than it says")
                body.append(lines[index])
                old_count -= lines[index][0] in " -"
                new_count -= lines[index][0] in " +"
                index += 1
            hunks.append((int(match[1]), tuple(body)))
    missing = [field for field in ("Module", "Processes", "Source-SHA256", "Reason") if field not in fields]
    if missing or not hunks:
        what = f"header fields {', '.join(missing)}" if missing else "hunks"
        raise AttachmentError(f"patch {name} has no {what}")
    processes = tuple(process.strip() for process in fields["Processes"].split(","))
    return Patch(name, fields["Module"], processes, fields["Source-SHA256"], fields["Reason"], tuple(hunks))


def load_patches() -> tuple[Patch, ...]:
    """Reads all patches that come with the package, in name order."""
    entries = resources.files(_PATCH_PACKAGE).iterdir()
    files = sorted((entry for entry in entries if entry.name.endswith(".patch")), key=lambda entry: entry.name)
    return tuple(parse_patch(entry.name, entry.read_text(encoding="utf-8")) for entry in files)


class _PatchingLoader(importlib.machinery.SourceFileLoader):
    """Loads one module from its patched source. Bytecode caches are not used: they hold the unpatched code."""

    def __init__(self, fullname: str, path: str, patches: Sequence[Patch]) -> None:
        super().__init__(fullname, path)
        self._patches = patches

    def get_code(self, fullname: str) -> CodeType:
        # The name is no file's, so that tracebacks take their lines from get_source and not from the unpatched file.
        path = f"{self.get_filename(fullname)} (patched by KunServe)"
        return compile(self.get_source(fullname), path, "exec", dont_inherit=True)

    def get_source(self, fullname: str) -> str:
        raw = self.get_data(self.get_filename(fullname))
        digest = hashlib.sha256(raw).hexdigest()
        source = importlib.util.decode_source(raw)
        for patch in self._patches:
            if patch.source_sha256 != digest:
                raise AttachmentError(
                    f"patch {patch.name} was made for another version of {fullname}: its source has SHA-256 {digest}, "
                    f"the patch expects {patch.source_sha256}"
                )
            source = patch.apply(source)
        return source


class PatchFinder(importlib.abc.MetaPathFinder):
    """Finds the modules that have patches, ahead of Python's own path finder."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self._by_module: dict[str, list[Patch]] = {}
        for patch in patches:
            self._by_module.setdefault(patch.module, []).append(patch)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of a module that has patches, with a loader that applies them, and None for any other.
        Raises AttachmentError where the module does not exist."""
        patches = self._by_module.get(fullname)
        if patches is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            raise AttachmentError(f"module {fullname} of patch {patches[0].name} does not exist")
        spec.loader = _PatchingLoader(fullname, spec.origin, patches)
        return spec

    @property
    def modules(self) -> tuple[str, ...]:
        """Names the modules that have patches."""
        return tuple(self._by_module)


def install(patches: Sequence[Patch]) -> PatchFinder:
    """Makes later imports in this process load patched modules. Fails if one of them is imported already."""
    finder = PatchFinder(patches)
    too_late = [module for module in finder.modules if module in sys.modules]
    if too_late:
        raise AttachmentError(f"modules were imported before their patches could apply: {', '.join(too_late)}")
    sys.meta_path.insert(0, finder)
    return finder


def is_patched(module: ModuleType) -> bool:
    """Tells whether `module` was loaded from patched source."""
    return isinstance(getattr(module.__spec__, "loader", None), _PatchingLoader)
