"""Claims: one holder at a time, released whatever happens, taken over when the holder is dead."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from actors.errors import ClaimLost
from actors.store import Artifact, Store
from pipelines.claims import Claims, Holder, is_dead, machine

PATIENT = {"heartbeat": 0.05, "dead_after": 30.0, "poll": 0.01, "settle": 0.05}
DEAD_PID = 2**22 + 1  # above the largest PID of Linux


@pytest.fixture(params=["local", "object store"])
def store(request, tmp_path) -> Store:
    return Store(str(tmp_path) if request.param == "local" else f"mock:///{tmp_path.name}")


@pytest.fixture
def artifact(store) -> Artifact:
    return store.folder("covariance", "ab" * 32)


def plant(store: Store, artifact: Artifact, **changes) -> Holder:
    """Leave a claim in the store as another process would."""
    holder = dataclasses.replace(Holder.here(), **changes)
    Claims(store)._write(f"{artifact.kind}-{artifact.fingerprint[:16]}.json", holder)
    return holder


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("same_machine", "running", "still_for", "dead"),
    [
        (True, True, 0, False),
        (True, False, 0, True),
        (False, False, 0, False),  # its PID means nothing here
        (False, True, 61, True),
        (True, True, 61, True),  # the PID was given to another process
    ],
)
def test_who_is_dead(same_machine, running, still_for, dead):
    holder = Holder.here() if same_machine else dataclasses.replace(Holder.here(), machine="elsewhere")
    assert is_dead(holder, here=machine(), running=running, still_for=still_for, dead_after=60) == dead


def test_claim_is_released(store, artifact):
    claims = Claims(store, **PATIENT)
    for _ in range(2):
        with claims.acquire(artifact, never) as claim:
            claim.check()
            assert len(claims._folder.names()) >= 1
    assert [name for name in claims._folder.names() if name.endswith(".json")] == []


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_claim_is_released_when_the_block_fails(store, artifact, kind):
    claims = Claims(store, **PATIENT)
    with pytest.raises(kind), claims.acquire(artifact, never):
        raise kind
    assert [name for name in claims._folder.names() if name.endswith(".json")] == []


def test_finished_work_needs_no_claim(store, artifact):
    assert Claims(store, **PATIENT).acquire(artifact, lambda: True) is None


def test_waits_for_a_living_holder_and_names_it(store, artifact, caplog):
    caplog.set_level(logging.INFO, logger="pipelines.claims")
    claims = Claims(store, **PATIENT)
    with claims.acquire(artifact, never):
        looks = iter([False] * 5 + [True])
        assert Claims(store, **PATIENT).acquire(artifact, lambda: next(looks)) is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert f"is being computed by process {os.getpid()} on" in lines[0]


def test_takes_over_from_a_dead_process_at_once(store, artifact, caplog):
    plant(store, artifact, pid=DEAD_PID)
    with Claims(store, **PATIENT).acquire(artifact, never) as claim:
        claim.check()
    assert "its holder is dead" in caplog.text


def test_takes_over_from_another_machine_when_its_beat_stands_still(store, artifact):
    plant(store, artifact, pid=DEAD_PID, machine="elsewhere")
    start = time.monotonic()
    with Claims(store, **{**PATIENT, "dead_after": 0.3}).acquire(artifact, never):
        assert time.monotonic() - start >= 0.3


def test_a_beating_claim_of_another_machine_is_left_alone(store, artifact):
    holder = plant(store, artifact, machine="elsewhere")
    claims = Claims(store, **{**PATIENT, "dead_after": 0.5})
    stop = time.monotonic() + 1.2

    def beats_until_stop() -> bool:
        plant(store, artifact, **{**dataclasses.asdict(holder), "beat": time.monotonic_ns()})
        return time.monotonic() > stop

    assert claims.acquire(artifact, beats_until_stop) is None


def test_a_damaged_claim_is_nobodys(tmp_path):
    store = Store(str(tmp_path))
    artifact = store.folder("covariance", "ab" * 32)
    plant(store, artifact)
    next((tmp_path / "claims").glob("*.json")).write_bytes(b"")
    with Claims(store, **PATIENT).acquire(artifact, never) as claim:
        claim.check()


def test_the_heart_beats(store, artifact):
    claims = Claims(store, **PATIENT)
    name = f"{artifact.kind}-{artifact.fingerprint[:16]}.json"
    with claims.acquire(artifact, never):
        deadline = time.monotonic() + 10
        while claims._read(name).beat < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert claims._read(name).beat >= 2


def test_a_lost_claim_is_noticed_and_left_to_its_new_holder(store, artifact):
    claims = Claims(store, **PATIENT)
    with claims.acquire(artifact, never) as claim:
        other = plant(store, artifact, machine="elsewhere")
        claim._thread.join(timeout=10)
        with pytest.raises(ClaimLost, match=r"another process took over covariance-.*Remedy: run again"):
            claim.check()
    assert claims._read(f"{artifact.kind}-{artifact.fingerprint[:16]}.json").token == other.token


def test_one_of_many_watchers_takes_over(tmp_path):
    store = Store(str(tmp_path))
    artifact = store.folder("covariance", "ab" * 32)
    plant(store, artifact, pid=DEAD_PID)
    inside, most = [], []

    def work() -> None:
        with Claims(store, **PATIENT).acquire(artifact, never):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


def test_takes_over_from_a_process_that_was_killed(tmp_path):
    program = (
        "import sys, time; from actors.store import Store; from pipelines.claims import Claims\n"
        "store = Store(sys.argv[1])\n"
        "with Claims(store).acquire(store.folder('covariance', 'ab' * 32), lambda: False):\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    claim = next((tmp_path / "claims").glob("*.json"))
    assert json.loads(claim.read_text())["pid"] == child.pid
    child.kill()
    child.wait()
    child.stdout.close()

    store = Store(str(tmp_path))
    with Claims(store, **PATIENT).acquire(store.folder("covariance", "ab" * 32), never):
        assert json.loads(Path(claim).read_text())["pid"] == os.getpid()
