"""What a report holds, read as its page reads it; and a Chromium to open it with."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import zlib
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

CHROMIUM = os.environ.get("WHENCE_CHROMIUM", "/usr/bin/chromium")


def element(page: str, name: str) -> str:
    """Content of the script element with that id."""
    found = re.search(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found, name
    return found[1]


def record(page: str) -> dict[str, Any]:
    """What the page reads first."""
    return json.loads(element(page, "record"))


def sequences(page: str, query: int) -> list[dict[str, Any]]:
    """The sequences of a query, each with its `codes` by kind."""
    data = inflated(element(page, f"query-{query}"))
    start = 4 + int.from_bytes(data[:4], "little")
    found = json.loads(data[4:start])["sequences"]
    for sequence in found:
        sequence["codes"] = {}
        for kind in sequence.get("peaks", {}):
            sequence["codes"][kind] = np.frombuffer(data, np.int8, len(sequence["lengths"]), start)
            start += len(sequence["lengths"])
    assert start == len(data)
    return found


def maps(page: str, query: int) -> dict[str, np.ndarray]:
    """Codes of the layer × token maps of a query, by side and rank."""
    packed = json.loads(element(page, f"maps-{query}"))
    return {key: np.frombuffer(inflated(item), np.int8) for key, item in packed.items()}


def inflated(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text, validate=True))


class Markup(HTMLParser):
    """Elements and attributes of a page, and the text of those that are not scripts or styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if not self.tags or self.tags[-1] not in ("script", "style"):
            self.text += data


def chromium() -> str:
    """Path of a Chromium; the test is skipped where there is none."""
    pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
    found = shutil.which(CHROMIUM)
    if found is None:
        pytest.skip(f"needs a browser at {CHROMIUM}: apt install chromium, or set WHENCE_CHROMIUM")
    return found
