"""How the response was measured, as a study: ε and linearity, convergence, and what did not come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def response(found: Mapping[str, Any]) -> dict[str, Any]:
    """The study, from `responses.json` of networks or of language models."""
    raise NotImplementedError(found)
