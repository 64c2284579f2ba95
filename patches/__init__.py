"""Unified diffs against the pinned SGLang; `kunserve_sgl.integration.attach.patches` applies them in memory."""
