"""Claims: of all runs on a store, one computes an artifact and the others wait for it.

A claim is a small JSON file, `<store>/claims/<kind>-<fingerprint[:16]>.json`, whose `beat` its holder raises every few
seconds. A claim is dead when its process is gone from this very machine, or when its beat has stood still for
`dead_after` seconds on the watcher's own clock, so that no two clocks are compared. A dead claim is taken over.

On a local or network folder, looking at a claim and writing it happen under a file lock, so one of several watchers
gets it. Object stores have no lock, and pyarrow none of the conditional writes that S3 offers: there the last writer
wins, and reads the claim again after `settle` seconds. Only if more than that passes between another's look and its
write, in a network that stands still just then, do two believe that they hold it. The next heartbeat tells one of them,
which stops (`ClaimLost`) and commits nothing; until then both write whole files of the same content.

The driver holds the claim, not its replicas: one that outlives its driver for a moment may still write a part, which is
whole, and which a checksum names beside that of the heir (`actors.checked`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from actors.checked import CheckedFolder
from actors.errors import ClaimLost, WriteFailed
from actors.filesystem import is_local, read_stream
from actors.store import Artifact, Store

logger = logging.getLogger(__name__)

FOLDER = "claims"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Holder:
    """Who computes an artifact.

    Attributes:
        token: Unique to this claim.
        host: For people to read.
        machine: Identifies the process table that `pid` is in: host, boot and PID namespace.
        pid: The process.
        since: When it was claimed, for people to read.
        beat: Raised while the process lives.
    """

    token: str
    host: str
    machine: str
    pid: int
    since: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @classmethod
    def here(cls) -> Holder:
        """This process, with a new token."""
        since = time.strftime("%Y-%m-%d %H:%M:%S%z")
        return cls(uuid.uuid4().hex, socket.gethostname(), machine(), os.getpid(), since)


def machine() -> str:
    """What tells this process table from all others: containers share host names, and PIDs start anew at each boot."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    marks = [boot.read_text().strip(), str(namespace.stat().st_ino)] if boot.exists() and namespace.exists() else []
    return ":".join([socket.gethostname(), *marks])


def is_dead(holder: Holder, *, here: str, running: bool, still_for: float, dead_after: float) -> bool:
    """Whether a claim may be taken over.

    Args:
        holder: The claim.
        here: The watcher's `machine()`.
        running: Whether the watcher sees a process of the holder's PID.
        still_for: Seconds that the watcher has seen the same beat.
        dead_after: Seconds after which that is enough.
    """
    return (holder.machine == here and not running) or still_for >= dead_after


def is_running(pid: int) -> bool:
    """Whether this machine has a process of this PID."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Claims:
    """The claims on a store's artifacts, as one process sees them.

    Args:
        store: The store.
        heartbeat: Seconds between beats.
        dead_after: Seconds without a beat after which a claim is dead.
        poll: Seconds between looks at another's claim.
        settle: Seconds that a claim on an object store is left before it is believed.
    """

    def __init__(
        self,
        store: Store,
        *,
        heartbeat: float = 10.0,
        dead_after: float = 60.0,
        poll: float = 1.0,
        settle: float = 2.0,
    ) -> None:
        self._folder = CheckedFolder(store.uri, FOLDER)
        self._heartbeat, self._dead_after, self._poll, self._settle = heartbeat, dead_after, poll, settle

    def acquire(
        self, artifact: Artifact, done: Callable[[], bool], waiting: Callable[[float], None] = lambda seconds: None
    ) -> Claim | None:
        """Wait until this process holds the claim on an artifact, or another has finished it.

        Args:
            artifact: What is to be computed.
            done: Whether it is finished.
            waiting: Called now and then while another holds it, with the seconds since the first look.

        Returns:
            The claim, already beating, or None once `done()`.
        """
        name = f"{artifact.kind}-{artifact.fingerprint[:16]}.json"
        seen: Holder | None = None
        began = since = time.monotonic()
        while not done():
            holder = self._read(name)
            now = time.monotonic()
            since = since if holder == seen else now
            if holder is None or self._dead(holder, now - since):
                if claim := self._take(name, holder):
                    return self._unless(done, claim)
                continue
            if seen is None or seen.token != holder.token:
                logger.info("%s is being computed by %s; waiting for it", artifact.uri, holder)
            seen = holder
            waiting(now - began)
            time.sleep(self._poll)
        return None

    @staticmethod
    def _unless(done: Callable[[], bool], claim: Claim) -> Claim | None:
        """Give the claim back if the artifact was finished between the last look and the claim."""
        try:
            finished = done()
        except BaseException:
            claim.release()
            raise
        if finished:
            claim.release()
            return None
        return claim

    def _dead(self, holder: Holder, still_for: float) -> bool:
        return is_dead(
            holder,
            here=machine(),
            running=is_running(holder.pid),
            still_for=still_for,
            dead_after=self._dead_after,
        )

    def _take(self, name: str, expected: Holder | None) -> Claim | None:
        """Write a claim of ours where `expected` still stands; None if another was faster."""
        with self._locked() as locked:
            if self._read(name) != expected:
                return None
            if expected is not None:
                logger.warning("taking over %s: its holder is dead (%s)", name.removesuffix(".json"), expected)
            holder = Holder.here()
            self._write(name, holder)
        if not locked:
            time.sleep(self._settle)
            if self._read(name) != holder:
                return None
        return Claim(self, name, holder, self._heartbeat)

    def beat(self, name: str, holder: Holder) -> bool:
        """Write a raised beat; False if the claim is no longer this holder's."""
        with self._locked():
            if not self._is_held_by(name, holder):
                return False
            self._write(name, holder)
            return True

    def release(self, name: str, holder: Holder) -> None:
        """Remove the claim, if it is still this holder's."""
        with self._locked():
            if self._is_held_by(name, holder):
                self._folder.delete(name)

    def _is_held_by(self, name: str, holder: Holder) -> bool:
        current = self._read(name)
        return current is not None and current.token == holder.token

    def _read(self, name: str) -> Holder | None:
        try:
            text = read_stream(self._folder.filesystem, self._folder.path_of(name))
        except FileNotFoundError:
            return None
        try:
            return Holder(**json.loads(text))
        except ValueError:
            return None  # damaged by a crash of the machine: nobody holds it

    def _write(self, name: str, holder: Holder) -> None:
        self._folder.write_unchecked(name, json.dumps(asdict(holder)).encode())

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the file lock of all claims for a moment; yields False where the file system has none."""
        if not is_local(self._folder.filesystem):
            yield False
            return
        path = Path(self._folder.path_of("lock"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            yield _lock(file.fileno())


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False where the file system cannot."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


class Claim:
    """A claim that this process holds, beating in a thread of its own until it is released.

    Use it in a `with` block: whatever ends the block, the claim is released.
    """

    def __init__(self, claims: Claims, name: str, holder: Holder, heartbeat: float) -> None:
        self._claims, self._name, self._holder = claims, name, holder
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(heartbeat,), name=f"claim {name}", daemon=True)
        self._thread.start()

    def _beat(self, seconds: float) -> None:
        holder = self._holder
        while not self._ended.wait(seconds):
            holder = replace(holder, beat=holder.beat + 1)
            try:
                held = self._claims.beat(self._name, holder)
            except (OSError, WriteFailed) as error:
                logger.warning("the heartbeat of %s failed, and is tried again: %s", self._name, error)
                continue
            if not held:
                self._lost.set()
                return

    def check(self) -> None:
        """Raise `ClaimLost` if another process has taken the claim over."""
        if self._lost.is_set():
            raise ClaimLost(
                f"another process took over {self._name.removesuffix('.json')}, since this one gave no sign of life",
                remedy="run again: it waits for the other process, and uses what that computes",
            )

    def release(self) -> None:
        """Stop beating and remove the claim; a claim that was lost stays with its new holder."""
        self._ended.set()
        self._thread.join()
        try:
            self._claims.release(self._name, self._holder)
        except OSError as error:
            logger.warning("the claim %s could not be removed; it dies with this process: %s", self._name, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
