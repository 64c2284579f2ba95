"""The patch loader: exact application, in memory, and a clear refusal of everything that does not match."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from kunserve_sgl.integration.attach import patches
from kunserve_sgl.integration.attach.patches import AttachmentError

SOURCE = "def answer():\n    value = 1\n    return value\n\n\ndef other():\n    return 'unchanged'\n"
DIFF = """--- module.py
+++ module.py
@@ -1,3 +1,4 @@
 def answer():
-    value = 1
+    value = 41
+    value += 1
     return value
"""


def patch_text(source: str = SOURCE, module: str = "patched_module", diff: str = DIFF) -> str:
    digest = hashlib.sha256(source.encode()).hexdigest()
    header = f"Module: {module}\nProcesses: scheduler, launcher\nSource-SHA256: {digest}\nReason: a test\n"
    return f"{header}\nSome words.\n\n{diff}"


@pytest.fixture
def module_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "patched_module.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = before
    sys.modules.pop("patched_module", None)


def test_patched_module_runs_the_new_code_and_the_file_stays_as_it_was(module_directory: Path) -> None:
    patches.install([patches.parse_patch("0001.patch", patch_text())])
    module = importlib.import_module("patched_module")
    assert module.answer() == 42
    assert module.other() == "unchanged"
    assert patches.is_patched(module)
    assert (module_directory / "patched_module.py").read_text() == SOURCE


def test_tracebacks_show_the_patched_lines(module_directory: Path) -> None:
    diff = DIFF.replace("+    value = 41", "+    value = int('no number')")
    patches.install([patches.parse_patch("0001.patch", patch_text(diff=diff))])
    module = importlib.import_module("patched_module")
    try:
        module.answer()
    except ValueError:
        shown = traceback.format_exc()
    assert "value = int('no number')" in shown
    assert "module.py (patched by KunServe)" in shown


def test_bytecode_of_the_unpatched_module_is_not_used(module_directory: Path) -> None:
    unpatched = importlib.import_module("patched_module")  # writes the bytecode cache
    assert unpatched.answer() == 1
    assert not patches.is_patched(unpatched)
    del sys.modules["patched_module"]
    patches.install([patches.parse_patch("0001.patch", patch_text())])
    assert importlib.import_module("patched_module").answer() == 42


def test_source_of_another_version_is_refused(module_directory: Path) -> None:
    (module_directory / "patched_module.py").write_text(SOURCE + "# a later release\n")
    patches.install([patches.parse_patch("0001.patch", patch_text())])
    with pytest.raises(AttachmentError, match=r"0001\.patch was made for another version of patched_module"):
        importlib.import_module("patched_module")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda diff: diff.replace("-    value = 1", "-    value = 2"), "does not apply .* at line 2"),
        (lambda diff: diff.replace("@@ -1,3 +1,4 @@", "@@ -2,3 +2,4 @@"), "does not apply .* at line 2"),
        (lambda diff: diff + "@@ -2,1 +3,1 @@\n     value = 1\n", "overlaps"),
    ],
    ids=["wrong-line", "wrong-place", "overlap"],
)
def test_patch_that_does_not_apply_names_patch_module_and_line(damage: object, message: str) -> None:
    patch = patches.parse_patch("0002.patch", patch_text(diff=damage(DIFF)))  # type: ignore[operator]
    with pytest.raises(AttachmentError, match=message):
        patch.apply(SOURCE)


def test_patch_past_the_end_of_the_file_is_refused() -> None:
    patch = patches.parse_patch("0002.patch", patch_text())
    with pytest.raises(AttachmentError, match="end of file"):
        patch.apply("def answer():\n")


@pytest.mark.parametrize("field", ["Module", "Processes", "Source-SHA256", "Reason"])
def test_missing_header_field_is_named(field: str) -> None:
    text = "".join(line for line in patch_text().splitlines(keepends=True) if not line.startswith(field))
    with pytest.raises(AttachmentError, match=f"0003.patch has no header fields {field}"):
        patches.parse_patch("0003.patch", text)


def test_truncated_hunk_is_refused() -> None:
    text = patch_text()
    with pytest.raises(AttachmentError, match="shorter than it says"):
        patches.parse_patch("0003.patch", text[: text.rindex("     return value")])


def test_module_imported_too_early_is_refused(module_directory: Path) -> None:
    importlib.import_module("patched_module")
    with pytest.raises(AttachmentError, match="imported before their patches could apply: patched_module"):
        patches.install([patches.parse_patch("0001.patch", patch_text())])


def test_every_shipped_patch_applies_to_the_installed_sglang() -> None:
    shipped = patches.load_patches()
    assert shipped, "the package carries no patch; was patches/ left out of the build?"
    for patch in shipped:
        spec = importlib.util.find_spec("sglang")
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin).parent.joinpath(*patch.module.split(".")[1:]).with_suffix(".py")
        source = path.read_text(encoding="utf-8")
        assert hashlib.sha256(path.read_bytes()).hexdigest() == patch.source_sha256
        patched = patch.apply(source)
        assert patched != source
        compile(patched, str(path), "exec")
