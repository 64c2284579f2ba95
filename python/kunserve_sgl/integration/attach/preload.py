"""Imports what all processes of a server need, once, in the launcher, and forks the launcher's fork server off.

On an accelerator SGLang's modules ask for the device when they are imported, and a process that has touched a CUDA
device cannot be forked. There only the libraries under SGLang are imported here, and each process imports the rest.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import importlib
import os
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from kunserve_sgl.args import Mode, resolve_mode
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.attach import forked_process
from kunserve_sgl.integration.attach.attachment import REPLACEMENTS, install_all_patches
from kunserve_sgl.integration.attach.fork_server import ForkServerError

# None of them touches a device when it is imported; `tests/unit/integration/attach/test_preload.py` tries.
LIBRARIES = (
    *("torch", "torchaudio", "torchvision", "transformers", "mistral_common"),
    *("scipy.special", "scipy.stats", "numba", "openai", "aiohttp", "requests", "fastapi", "uvicorn", "uvloop", "zmq"),
    *("msgspec", "psutil", "setproctitle"),
)
SGLANG = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.data_parallel_controller",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.registry",
    # What the first process that needs them would import; of SGLang's metrics only what does not look at variables.
    "sglang.srt.distributed.device_communicators.custom_all_reduce",
    "sglang.srt.distributed.device_communicators.pynccl",
    "anyio._backends._asyncio",
    "wsgiref.simple_server",
)
_LAUNCHER = (
    *("kunserve_sgl.integration.launcher.server_args", "kunserve_sgl.integration.launcher.routes"),
    *("kunserve_sgl.integration.launcher.checked_requests", "kunserve_sgl.integration.launcher.ending"),
    "kunserve_sgl.integration.launcher.tokenizer_manager",
)
_PLUGINS_OF_SGLANG = "smg-grpc-servicer"  # a part of SGLang's own installation: they add flags to the parser
# SGLang's launcher sets these, unless they are set, before it starts a process. Libraries read them when they are
# imported, and a child that finds another value than they did is not forked.
_SET_BY_SGLANG = {"CUTE_DSL_LOG_LEVEL": "30", "CUTE_DSL_LOG_TO_CONSOLE": "1"}
_ACCELERATORS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/dri", "/dev/accel", "/dev/davinci_manager")
_DRIVER = "libcuda.so.1"
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED


def is_attached(argv: Sequence[str]) -> bool:
    """Tells whether a server with these flags has KunServe attached, as far as the flags say it by themselves; with
    `--kunserve off` SGLang has to be imported unpatched."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--kunserve")
    parser.add_argument("--data-parallel-size", "--dp-size", "--dp", dest="dp_size", type=int, default=1)
    parser.add_argument("--config")
    try:
        known, _ = parser.parse_known_args(argv)
        return known.config is None and resolve_mode(known.kunserve, known.dp_size) is not Mode.OFF
    except (argparse.ArgumentError, ConfigurationError):
        return False  # whoever parses all flags says what is wrong


def preload() -> str | None:
    """Imports, and forks the fork server off. Returns why there is none, if so; children are spawned then. Raises
    AttachmentError where a patch does not apply."""
    variables_read = import_all()
    if has_touched_cuda():
        return "what was imported has touched a CUDA device"
    try:
        forked_process.use(forked_process.Starter(variables_read))
    except ForkServerError as error:
        return str(error)
    return None


def import_all(*, is_patched: bool = True) -> Set[str]:
    """Imports what can be imported before a fork on this machine; SGLang as it is unless `is_patched`. Returns which
    variables of the environment that has read. Raises AttachmentError."""
    for name, value in _SET_BY_SGLANG.items():
        os.environ.setdefault(name, value)
    return _import_once(is_patched)


@functools.cache
def _import_once(is_patched: bool) -> Set[str]:
    modules = [*LIBRARIES]
    if not accelerator_may_be_there():
        modules += SGLANG
        if is_patched:
            install_all_patches()
            modules += (each.implementation.partition(":")[0] for each in REPLACEMENTS)
            modules += _LAUNCHER
    variables_read = import_modules(modules)
    if not accelerator_may_be_there():
        variables_read |= _load_plugins()
        _set_up_compiler()
    return variables_read


def _load_plugins() -> set[str]:
    """Loads SGLang's plugins, which takes each process 0.4 s of CPU time and writes on the pages of all modules, unless
    there are others than SGLang's own: one that replaces what we do has to come after us, to be seen. Returns which
    variables of the environment that has read."""
    from sglang.srt import plugins

    found = entry_points(group=plugins.GENERAL_PLUGINS_GROUP)
    with _reads_noted() as variables:
        if all(each.dist is not None and each.dist.name.replace("_", "-") == _PLUGINS_OF_SGLANG for each in found):
            plugins.load_plugins()
    return variables


def _set_up_compiler() -> None:
    """Lets numba make what it needs to compile or load anything, which takes it 0.4 s of CPU time: attention on a CPU
    would do so in each scheduler."""
    import numba

    numba.njit(lambda: None)()


def accelerator_may_be_there() -> bool:
    """Whether the system has a device file of an accelerator; asking its library could touch it."""
    return any(Path(each).exists() for each in _ACCELERATORS)


def has_touched_cuda() -> bool:
    """Tells whether this process has initialised the CUDA driver: libraries load it when they are imported, which does
    no harm by itself. The driver's answer to a call that is none of initialising tells."""
    if _DRIVER not in Path("/proc/self/maps").read_text():
        return False
    driver = ctypes.CDLL(_DRIVER, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    return bool(driver.cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p())) != _NOT_INITIALIZED)


def import_modules(modules: Sequence[str]) -> set[str]:
    """Imports them, and returns which variables of the environment they have read."""
    gc.disable()  # nothing that is imported becomes garbage, and looking for some would take a tenth of the time
    try:
        with _reads_noted() as variables:
            for module in modules:
                importlib.import_module(module)
    finally:
        gc.freeze()  # children share the pages as long as nobody looks at what lies there
        gc.enable()
    return variables


@contextmanager
def _reads_noted() -> Iterator[set[str]]:
    """Collects the variables that are looked up in `os.environ` while this lasts."""
    variables: set[str] = set()
    upstream = os.environ.encodekey

    def note(key: str) -> str:
        variables.add(key)
        return upstream(key)

    os.environ.encodekey = note
    try:
        yield variables
    finally:
        os.environ.encodekey = upstream
