"""The record of a committed artifact: what it is, what it was made from, by what, and the checksum of each file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime

from actors.environment import hardware, versions

FORMAT = 1


def make_record(
    *,
    kind: str,
    fingerprint: str,
    config: Mapping[str, object],
    inputs: Mapping[str, str],
    counts: Mapping[str, object],
    seconds: float,
    extra: Mapping[str, object],
    files: Mapping[str, Mapping[str, object]],
) -> dict:
    """Gather a record and seal it with a digest of itself.

    Args:
        kind: The artifact's kind.
        fingerprint: Its fingerprint in full.
        config: The configuration that determines its bits.
        inputs: Fingerprint of each artifact that it was made from.
        counts: Its sizes.
        seconds: Wall time.
        extra: Anything else that its stage wants to say.
        files: `sha256` and `bytes` of each file.
    """
    record = {
        "format": FORMAT,
        "kind": kind,
        "fingerprint": fingerprint,
        "config": config,
        "inputs": inputs,
        "counts": counts,
        "seconds": round(seconds, 3),
        "extra": extra,
        "committed_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "files": files,
    }
    record = json.loads(json.dumps(record, allow_nan=False))
    return {**record, "seal": _seal(record)}


def sealed(record: object) -> bool:
    """Whether a record is as it was written: a flipped bit in a count is as wrong as one in a tensor."""
    if not isinstance(record, dict) or "seal" not in record:
        return False
    return record["seal"] == _seal({key: value for key, value in record.items() if key != "seal"})


def _seal(record: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def difference(wanted: Mapping[str, object], record: Mapping[str, object]) -> str:
    """Where a record differs from what is wanted, in words; empty if it agrees.

    Args:
        wanted: Keys that matter, with the values they should have; nested mappings are compared key by key.
        record: The record.
    """
    return "; ".join(_differences(json.loads(json.dumps(wanted)), record, ""))


def _differences(wanted: object, found: object, place: str) -> list[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = [*wanted, *(key for key in found if key not in wanted and place)]
        return [
            text
            for key in keys
            for text in _differences(wanted.get(key), found.get(key), f"{place}.{key}" if place else key)
        ]
    return [] if wanted == found else [f"{place} is {found!r}, wanted {wanted!r}"]
