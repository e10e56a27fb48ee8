"""Text and numbers as the page of probes writes them."""

from __future__ import annotations

import html


def escaped(value: object) -> str:
    """Text for HTML; control characters, which have no place there, become visible replacement marks."""
    cleaned = "".join(char if char in "\n\t" or char >= " " else "\ufffd" for char in str(value))
    return html.escape(cleaned.replace("\x7f", "\ufffd"))


def minus(text: str) -> str:
    """A number with a real minus sign."""
    return text.replace("-", "\u2212")
