"""OSCAR+ runs as OSCAR does: three classes and the regions' LayerNorm stand in its config.json."""

from __future__ import annotations

from tests.reference.oscar import run

__all__ = ["run"]
