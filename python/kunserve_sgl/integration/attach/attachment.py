"""Attaches KunServe to SGLang in one process, and proves that the process really uses what was attached."""

from __future__ import annotations

import enum
import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kunserve_sgl.integration.attach import patches
from kunserve_sgl.integration.attach.patches import AttachmentError

SGLANG_VERSION = "0.5.17"


class Role(enum.Enum):
    """Says what a process of the server does; it decides which replacements the process needs."""

    LAUNCHER = "launcher"
    CONTROLLER = "controller"
    SCHEDULER = "scheduler"


@dataclass(frozen=True)
class Replacement:
    """Says that `module.name` of SGLang becomes `implementation` ("module:name") of ours."""

    role: Role
    module: str
    name: str
    implementation: str
    is_class: bool = True


REPLACEMENTS = (
    Replacement(
        Role.LAUNCHER,
        "sglang.srt.entrypoints.http_server",
        "Engine",
        "kunserve_sgl.integration.launcher.engine:KunserveEngine",
        is_class=False,  # only class methods of it are used
    ),
    Replacement(
        Role.LAUNCHER,
        "sglang.srt.entrypoints.engine",
        "run_data_parallel_controller_process",
        "kunserve_sgl.integration.attach.process:run_controller_process",
        is_class=False,
    ),
    Replacement(
        Role.CONTROLLER,
        "sglang.srt.managers.data_parallel_controller",
        "DataParallelController",
        "kunserve_sgl.integration.controller.controller:KunserveDataParallelController",
    ),
    Replacement(
        Role.SCHEDULER,
        "sglang.srt.managers.scheduler",
        "Scheduler",
        "kunserve_sgl.integration.scheduler.scheduler:KunserveScheduler",
    ),
    Replacement(
        Role.SCHEDULER,
        "sglang.srt.model_executor.model_runner",
        "ModelRunner",
        "kunserve_sgl.integration.runner.model_runner:KunserveModelRunner",
    ),
    Replacement(
        Role.SCHEDULER,
        "sglang.srt.model_executor.model_runner",
        "KVCacheConfigurator",
        "kunserve_sgl.integration.runner.kv_configurator:KunserveKVCacheConfigurator",
    ),
    Replacement(
        Role.SCHEDULER,
        "sglang.srt.managers.schedule_batch",
        "SamplingBatchInfo",
        "kunserve_sgl.integration.scheduler.penalties:KunserveSamplingBatchInfo",
        is_class=False,  # it is made by a class method
    ),
)


class Attachment:
    """Holds the state of one attached process."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self._replaced: list[tuple[Replacement, Any]] = []
        self._used: set[type] = set()
        _check_version()
        self._patches = _installed or patches.install(
            [each for each in _load_patches() if role.value in each.processes]
        )
        for replacement in REPLACEMENTS:
            if replacement.role is role:
                self._replace(replacement)

    def _replace(self, replacement: Replacement) -> None:
        target = importlib.import_module(replacement.module)
        if not hasattr(target, replacement.name):
            raise AttachmentError(f"SGLang has no {replacement.module}.{replacement.name} to replace")
        module, _, name = replacement.implementation.partition(":")
        implementation = getattr(importlib.import_module(module), name)
        setattr(target, replacement.name, implementation)
        self._replaced.append((replacement, implementation))

    def mark_used(self, cls: type) -> None:
        """Notes that a class of ours was really used. The constructor of every one that replaces one of SGLang's calls
        it."""
        self._used.add(cls)

    def verify(self) -> None:
        """Raises AttachmentError unless every replacement and every patch is in effect in this process."""
        for replacement, implementation in self._replaced:
            where = f"{replacement.module}.{replacement.name}"
            current = getattr(sys.modules[replacement.module], replacement.name)
            if current is not implementation:
                raise AttachmentError(
                    f"{where} was replaced by {replacement.implementation}, but the {self.role.value} process now has "
                    f"{current.__module__}.{current.__qualname__} there; another plugin may have hooked it"
                )
            if replacement.is_class and not any(issubclass(used, implementation) for used in self._used):
                raise AttachmentError(
                    f"the {self.role.value} process does not use {replacement.implementation} for {where}"
                )
        for module in self._patches.modules:
            if module in sys.modules and not patches.is_patched(sys.modules[module]):
                raise AttachmentError(f"{module} was imported without its patch in the {self.role.value} process")


_attachment: Attachment | None = None
_installed: patches.PatchFinder | None = None  # of all roles


def install_all_patches() -> None:
    """Installs the patches of all roles, in a process that imports SGLang before it has a role, and for those that are
    forked off it. What is replaced depends on the role, and waits for `attach`."""
    global _installed
    _check_version()
    _installed = patches.install(_load_patches())


def attach(role: Role) -> Attachment:
    """Attaches this process in `role`. Must run before the SGLang modules that are patched are imported."""
    global _attachment
    if _attachment is not None:
        raise AttachmentError(f"this process is attached already, as {_attachment.role.value}")
    _attachment = Attachment(role)
    return _attachment


def current_attachment() -> Attachment:
    """Returns the attachment of this process. Raises AttachmentError where there is none."""
    if _attachment is None:
        raise AttachmentError("this process is not attached to KunServe")
    return _attachment


def _load_patches() -> tuple[patches.Patch, ...]:
    loaded = patches.load_patches()
    known = {role.value for role in Role}
    for patch in loaded:
        if unknown := set(patch.processes) - known:
            raise AttachmentError(f"patch {patch.name} is for unknown processes {unknown}; known: {sorted(known)}")
    return loaded


def _check_version() -> None:
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        raise AttachmentError(f"SGLang is not installed; KunServe needs sglang=={SGLANG_VERSION}") from None
    if installed != SGLANG_VERSION:
        raise AttachmentError(f"KunServe needs sglang=={SGLANG_VERSION}, but {installed} is installed")
