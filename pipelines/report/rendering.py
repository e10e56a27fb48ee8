"""The page itself: a template, its style and scripts, and a policy that lets nothing else run and nothing out."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

SCRIPTS = ("dom", "data", "heat", "layers", "charts", "overview", "sequence", "shapes", "query", "keys", "main")
FORBIDDEN = re.compile(r"</(script|style)|<!--", re.IGNORECASE)


def render(record: Mapping[str, Any], blobs: Sequence[tuple[str, str]]) -> str:
    """The page.

    Args:
        record: what `overview` says.
        blobs: ids and content of inert elements; the content is base64, or JSON of base64.
    """
    style, script = style_text(), script_text()
    parts = {
        "title": _title(record["title"]),
        "policy": policy(style, script),
        "style": style,
        "script": script,
        "record": embedded(record),
        "blobs": "\n".join(f'<script type="text/plain" id="{name}">{content}</script>' for name, content in blobs),
    }
    # One pass: what was put in is not looked at again, whatever braces it holds.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def policy(style: str, script: str) -> str:
    """The content security policy: no request of any kind; of inline code, ours by its hash."""
    return (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded(record: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element: ASCII, and without any character that could end the element."""
    text = json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def style_text() -> str:
    """The style sheet, as it stands between its tags."""
    return f"\n{_asset('page.css')}"


@cache
def script_text() -> str:
    """The scripts in their order, as they stand between their tags: one module, so that nothing is global."""
    text = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    assert not FORBIDDEN.search(text), "a script would end its own element"
    return f"\n{text}"


def _asset(name: str) -> str:
    return resources.files("pipelines.report").joinpath("page", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def _title(text: str) -> str:
    """Escaped; control characters and half surrogates, which have no place in HTML, become replacement marks."""
    return html.escape(re.sub("[\x00-\x1f\x7f\ud800-\udfff]", "\ufffd", text))
