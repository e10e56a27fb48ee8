"""The embedded demo: a fictional almanac, a model trained on it, and how well a trace finds who stated a fact."""

from __future__ import annotations

from pipelines.almanac.demo import demo

__all__ = ["demo"]
