"""Requests that persist: what is asked for again, how long, and what is said in the end. A real server is elsewhere."""

from __future__ import annotations

import logging

import pytest

from actors import remote
from actors.errors import Unreachable
from actors.filesystem import absolute, child, shown, without_secret
from actors.remote import Patience, is_passing, persist

LOST = "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 52, Server returned nothing"


@pytest.mark.parametrize(
    ("message", "passing"),
    [
        (LOST, True),
        ("AWS Error SLOW_DOWN during PutObject operation: x", True),
        (
            "When getting information: AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response",
            True,
        ),
        ("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body.", False),
        ("AWS Error ACCESS_DENIED during HeadObject operation: No response body.", False),
        ("AWS Error NO_SUCH_BUCKET during PutObject operation: The specified bucket does not exist", False),
    ],
)
def test_what_passes(message, passing):
    assert is_passing(OSError(message)) == passing
    assert not is_passing(FileNotFoundError(message))


def test_pauses_double_up_to_a_limit_and_spread():
    patience = Patience(first=1.0, longest=5.0)
    assert [patience.pause(failures, 1.0) for failures in (1, 2, 3, 4, 5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert patience.pause(3, 0.0) == 2.0


def failing(times: int, message: str):
    left = [times]

    def action() -> str:
        if left[0]:
            left[0] -= 1
            raise OSError(message)
        return "done"

    return action


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", found.append)
    return found


def test_persists_and_says_so(pauses, caplog):
    with caplog.at_level(logging.WARNING):
        assert persist(failing(3, LOST), "s3://b/k") == "done"
    assert len(pauses) == 3
    assert len(caplog.records) == 3
    assert caplog.records[0].getMessage().startswith(f"s3://b/k: {LOST}; trying again in ")


def test_gives_up_in_the_end(pauses):
    with pytest.raises(Unreachable, match=r"^s3://b/k: the object store does not answer, after 7 attempts \(AWS Error"):
        persist(failing(99, LOST), "s3://b/k")
    assert len(pauses) == remote.PATIENCE.attempts - 1


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("AWS Error ACCESS_DENIED during GetObject operation: x", r"the object store refuses .*Remedy: check the cred"),
        (
            "AWS Error NO_SUCH_BUCKET during PutObject operation: x",
            r"there is no such bucket .*Remedy: create the buck",
        ),
        ("something else", r"the object store failed \(something else\)"),
    ],
)
def test_what_is_refused_is_not_asked_for_again(pauses, message, said):
    with pytest.raises(Unreachable, match=said):
        persist(failing(99, message), "s3://b/k")
    assert pauses == []


def test_a_file_that_is_not_there_is_not_there(pauses):
    def action() -> None:
        raise FileNotFoundError("k")

    with pytest.raises(FileNotFoundError):
        persist(action, "s3://b/k")
    assert pauses == []


def test_uris_keep_their_options_at_the_end_and_show_no_secret():
    uri = "s3://key:sec%2Fret@bucket/pre/?endpoint_override=host:9000&scheme=http"
    assert absolute(uri) == "s3://key:sec%2Fret@bucket/pre?endpoint_override=host:9000&scheme=http"
    assert child(uri, "a/b") == "s3://key:sec%2Fret@bucket/pre/a/b?endpoint_override=host:9000&scheme=http"
    assert shown(child(uri, "a/b")) == "s3://bucket/pre/a/b"
    assert without_secret(uri) == "s3://bucket/pre/?endpoint_override=host:9000&scheme=http"
    assert without_secret("s3://bucket/mail@home") == "s3://bucket/mail@home"
    assert child("/tmp/what?/x", "a") == shown("/tmp/what?/x/a") == "/tmp/what?/x/a"
    assert absolute("memory://") == "memory://"
