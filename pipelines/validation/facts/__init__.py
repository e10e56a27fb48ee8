"""Fact tracing on real sentences: does a trace find the sentences that taught a small model a fact?"""

from __future__ import annotations

from pipelines.validation.facts.stages import steps

__all__ = ["steps"]
