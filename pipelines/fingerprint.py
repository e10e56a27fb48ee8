"""Fingerprints: the SHA-256 of canonical JSON, which refuses what it cannot write the same way every time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from enum import Enum


def fingerprint(identity: Mapping[str, object], inputs: Mapping[str, str]) -> str:
    """The fingerprint of an artifact: what determines its bits, and the fingerprints of what it is made from.

    Args:
        identity: JSON-able configuration; `conf.schema.plain` makes it from the groups of a run.
        inputs: Fingerprint of each dependency, by the name of its step.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: If the identity holds anything but None, booleans, integers, finite floats, strings, and lists and
            string-keyed mappings of these; the message says where.
    """
    canonical = canonical_json({"identity": identity, "inputs": inputs})
    return hashlib.sha256(canonical.encode()).hexdigest()


def canonical_json(value: object) -> str:
    """Write a value as JSON in the one way: keys sorted, no spaces, ASCII, tuples as lists.

    Raises:
        ValueError: If a part of it has no canonical form.
    """
    _refuse_uncanonical(value, "")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _refuse_uncanonical(value: object, place: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str) or isinstance(key, Enum):
                raise ValueError(f"{place or 'identity'}: the key {key!r} is not a string")
            _refuse_uncanonical(item, f"{place}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _refuse_uncanonical(item, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: {value} has no canonical form; fingerprints take finite numbers")
    elif isinstance(value, Enum) or not (value is None or isinstance(value, (bool, int, float, str))):
        raise ValueError(
            f"{place}: {type(value).__name__} has no canonical form; fingerprints take None, booleans, numbers, "
            "strings, and lists and mappings of these (conf.schema.plain turns a config into them)"
        )
