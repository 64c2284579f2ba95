"""Unified diffs against the pinned SGLang; `kunserve_sgl.integration.patches` applies them in memory."""
