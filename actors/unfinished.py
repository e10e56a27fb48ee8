"""What has to be done again where a file of unfinished work is damaged.

Stages keep to one convention, by which an attempt goes on from the last: what vouches for finished work is JSON, and is
written after what it vouches for. The work of a group is vouched for by a `done.json` above it, a chunk by
`parts/<its number>.json`, everything together by JSON at the top (`index.json`, `merged.json`). A file for which none
of these can be named is vouched for by all. A shard of scores is one file, which vouches for itself.
"""

from __future__ import annotations

from collections.abc import Collection

PARTS = "parts/"
DONE = "done.json"


def to_forget(name: str, names: Collection[str]) -> set[str]:
    """The files to delete so that the next attempt makes a damaged file again: itself, and what vouches for it.

    Args:
        name: The damaged file.
        names: All files of the unfinished artifact.
    """
    there = set(names)
    if name.startswith(PARTS) and name.endswith(".json"):
        return {name} & there
    return ({name} & there) | (_own_vouchers(name) & there or _all_vouchers(there))


def is_missed(name: str, names: Collection[str]) -> bool:
    """Whether a file that was announced and is not there has been lost, rather than cut short before it was in place.

    Args:
        name: The file.
        names: All files of an artifact that is to be committed.
    """
    return not name.startswith(PARTS) or not _own_vouchers(name).isdisjoint(names)


def _own_vouchers(name: str) -> set[str]:
    folders = name.split("/")[:-1]
    above = {"/".join([*folders[:depth], DONE]) for depth in range(2, len(folders) + 1)}
    stem = name.rpartition("/")[2].partition(".")[0]
    return above | {f"{PARTS}{stem}.json", f"{PARTS}{stem.rpartition('-')[0]}.json"}


def _all_vouchers(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith(".json")}
