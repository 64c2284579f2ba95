"""What is imported before a fork: nothing of it touches a CUDA device, and SGLang is patched where it is among it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt import plugins

from kunserve_sgl.integration.attach import preload
from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from unit.integration.imported import Imported

DEADLINE_S = 900.0
# In place of the CUDA driver: writes down that it was initialised, by torch's and CUDA's own libraries, which are real.
# It has one device, as far as the functions are concerned that those call before and while they initialise.
DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
enum { SUCCESS = 0, NOT_INITIALIZED = 3 };
static int initialized;
static void note(const char *what) { FILE *file = fopen(getenv("DRIVER_CALLS"), "a"); fputs(what, file); fclose(file); }
__attribute__((constructor)) static void loaded(void) { note("loaded\\n"); }
int cuInit(unsigned flags) { note("cuInit\\n"); initialized = 1; return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 1; return initialized ? SUCCESS : NOT_INITIALIZED; }
int cuCtxGetCurrent(void **context) { *context = 0; return initialized ? SUCCESS : NOT_INITIALIZED; }
static int other(void) { return initialized ? 100 : NOT_INITIALIZED; }
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *found) {
  if (found) *found = 0;
  *function = !strcmp(name, "cuInit") ? (void *)cuInit
    : !strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
    : !strcmp(name, "cuDeviceGetCount") ? (void *)cuDeviceGetCount
    : !strncmp(name, "cuGetProcAddress", 16) ? (void *)cuGetProcAddress_v2 : (void *)other;
  return SUCCESS;
}
int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
"""
PROGRAM = """
import os, sys
from kunserve_sgl.integration.attach import preload

def state(): return [open(os.environ["DRIVER_CALLS"]).read().split().count("cuInit"), preload.has_touched_cuda()]

preload.accelerator_may_be_there = lambda: True
print(preload.preload(), [name for name in sys.modules if name.partition(".")[0] == "sglang"], *state())
import torch
torch.cuda.is_available()
print(*state())
"""

# What each role finds in a process that is forked once everything is imported. This one and the next are run so.
ROLES = """
import os, sys
from kunserve_sgl.integration.attach import attachment, patches

is_read = "SGLANG_PLATFORM" in VARIABLES_READ
print([name for name in ("prometheus_client",) if name in sys.modules], is_read, flush=True)
for role in attachment.Role:
    if os.fork() == 0:
        attached = attachment.attach(role)
        modules = [patch.module for patch in patches.load_patches()]
        print(all(patches.is_patched(sys.modules[name]) for name in modules), end=" ")
        for each in attachment.REPLACEMENTS:
            current = getattr(sys.modules[each.module], each.name)
            ours = f"{current.__module__}:{getattr(current, '__qualname__', '')}" == each.implementation
            assert ours == (each.role is role), each
        try:
            attached.verify()
        except attachment.AttachmentError as error:
            print(error, flush=True)
        else:
            print("verified", flush=True)
        os._exit(0)
    os.wait()
"""

# What SGLang's launcher changes in the environment between the imports and the first child.
LAUNCHER = """
import os, sys
from kunserve_sgl.integration.attach import forked_process

before = dict(os.environ)
from sglang.srt.entrypoints import engine
from sglang.srt.server_args import ServerArgs

engine._set_envs_and_config(ServerArgs(model_path=sys.argv[1], device="cpu", enable_metrics=True))
assert os.environ["SGLANG_RUN_ID"] != before.get("SGLANG_RUN_ID"), "it changes nothing; the test shows nothing"
print(forked_process.seen_too_early(before, os.environ, VARIABLES_READ))
"""

# What SGLang's own plugins change is its parser: nothing that we replace.
PLUGINS = """
from sglang.srt import plugins
from sglang.srt.plugins.hook_registry import HookRegistry

hooked = {target.rpartition(".")[0] for target in HookRegistry._hooks}
print(plugins._plugins_loaded, hooked, "SGLANG_PLUGINS" in VARIABLES_READ)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_no_cuda_call_before_the_fork_on_an_accelerator(tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    build = ["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "driver.c")]
    subprocess.run(build, check=True, timeout=DEADLINE_S)
    calls = tmp_path / "calls"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "DRIVER_CALLS": str(calls)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=True)
    before, after = ended.stdout.splitlines()
    assert "loaded" in calls.read_text().split(), "the libraries look for another driver; the test shows nothing"
    assert before == "None [] 0 False"
    assert after == "1 True"


def test_each_role_attaches_in_a_process_that_has_imported_everything(imported: Imported) -> None:
    modules, launcher, controller, scheduler = imported.run(ROLES).splitlines()
    # SGLang's metrics need variables of the environment that it sets later.
    assert modules == "[] True"
    assert launcher == "True verified"
    # Nothing has made objects of these classes, which is what their verification is about.
    for line, role in ((controller, "controller"), (scheduler, "scheduler")):
        assert line.startswith(f"True the {role} process does not use kunserve_sgl.integration.")


def test_plugins_of_sglang_are_loaded_before_the_fork(imported: Imported) -> None:
    assert imported.run(PLUGINS) == "True {'sglang.srt.server_args.ServerArgs'} True\n"


@pytest.mark.parametrize(("others", "expected"), [([], True), (["another-plugin"], False)])
def test_each_process_loads_plugins_where_there_are_others(
    monkeypatch: pytest.MonkeyPatch, others: list[str], expected: bool
) -> None:
    loaded: list[bool] = []
    found = [SimpleNamespace(dist=SimpleNamespace(name=name)) for name in ("smg_grpc_servicer", *others)]
    monkeypatch.setattr(plugins, "load_plugins", lambda: loaded.append(True))
    monkeypatch.setattr(preload, "entry_points", lambda group: found)
    preload._load_plugins()
    assert bool(loaded) is expected


def test_the_launcher_of_sglang_changes_nothing_that_was_read_before(tmp_path: Path, imported: Imported) -> None:
    write_tiny_model(TinyModelSpec(), tmp_path)
    assert imported.run(LAUNCHER, str(tmp_path)).splitlines()[-1] == "[]"


def test_what_has_touched_a_device_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "import_all", set)
    monkeypatch.setattr(preload, "has_touched_cuda", lambda: True)
    assert preload.preload() == "what was imported has touched a CUDA device"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", False),
        ("--dp-size 1", False),
        ("--dp-size 2", True),
        ("--dp=3", True),
        ("--data-parallel-size 2 --model-path x --kunserve-reserve-frames 2", True),
        ("--dp-size 2 --kunserve off", False),
        ("--dp-size 2 --kunserve auto --kunserve=off", False),
        ("--kunserve manual", True),
        ("--dp-size 2 --kunserve nonsense", False),
        ("--dp-size two", False),
        ("--dp-size", False),
        ("--dp-size 2 --config file.yaml", False),
    ],
)
def test_which_servers_are_attached(flags: str, expected: bool) -> None:
    assert preload.is_attached(flags.split()) is expected


def test_variables_that_modules_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reads_variables.py").write_text(
        "import os\nos.environ.get('READ_A')\nos.getenv('READ_B')\n'READ_C' in os.environ\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "reads_variables", raising=False)
    variables = preload.import_modules(["reads_variables"])
    assert variables >= {"READ_A", "READ_B", "READ_C"}
    os.environ.get("READ_D")
    assert "READ_D" not in variables
