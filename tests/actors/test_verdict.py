"""What the answers of the ranks of one replica mean together."""

from __future__ import annotations

import pytest

from actors.errors import BadRecord, Cancelled, GangBroken, MemoryRanOut
from actors.verdict import GRACE_SECONDS, CalledOff, Finished, Lost, Raised, TooLarge, Wave

EARLY, LATE = 10.0 + GRACE_SECONDS - 1, 10.0 + GRACE_SECONDS + 1


def wave(ranks: int = 3, returned: tuple[int, ...] = (), gone: tuple[int, ...] = (), **raised: BaseException) -> Wave:
    """A call at 10 s; `rank1=error` is what a rank raised."""
    found = Wave(ranks)
    for rank in returned:
        found.returned(rank, f"result {rank}", 10.0)
    for name, error in raised.items():
        found.raised(int(name.removeprefix("rank")), error, 10.0)
    for rank in gone:
        found.gone[rank] = f"rank {rank} was killed"
    return found


BROKEN = GangBroken("the ranks lost one another", rank=0)


def test_a_call_is_open_until_all_ranks_have_returned():
    assert wave(returned=(0, 2)).verdict(LATE) is None
    assert wave(returned=(2, 0, 1)).verdict(LATE) == Finished(["result 0", "result 1", "result 2"])


def test_a_death_decides_at_once():
    assert wave(returned=(0,), gone=(1,)).verdict(10.0) == Lost("rank 1 was killed")
    assert wave(gone=(1,), rank0=BROKEN, rank2=ValueError("odd")).verdict(10.0) == Lost("rank 1 was killed")


def test_a_broken_gang_waits_for_its_cause():
    assert wave(rank0=BROKEN).verdict(EARLY) is None
    assert wave(rank0=BROKEN).verdict(LATE) == Lost("rank 0: the ranks lost one another")
    assert wave(rank0=BROKEN, gone=(2,)).verdict(EARLY) == Lost("rank 2 was killed")
    wrong = BadRecord("it is bad")
    assert wave(rank0=BROKEN, rank2=wrong).verdict(EARLY) == Raised(wrong)
    assert wave(rank0=BROKEN, rank2=wrong).verdict(LATE) == Raised(wrong)


def test_all_ranks_that_lost_one_another_need_no_grace():
    both = wave(2, rank0=BROKEN, rank1=GangBroken("me too", rank=1))
    assert both.verdict(10.0) == Lost("rank 0: the ranks lost one another; rank 1: me too")


def test_an_error_of_ours_decides_at_once_and_any_other_after_the_grace():
    wrong, odd = BadRecord("it is bad"), ValueError("odd")
    assert wave(rank1=wrong).verdict(EARLY) == Raised(wrong)
    assert wave(rank1=odd).verdict(EARLY) is None
    assert wave(rank1=odd).verdict(LATE) == Raised(odd)
    assert wave(rank0=odd, rank1=wrong).verdict(EARLY) == Raised(wrong)


def test_the_error_of_a_single_rank_needs_no_grace():
    odd = ValueError("odd")
    assert wave(1, rank0=odd).verdict(10.0) == Raised(odd)


def test_memory_that_ran_out_is_told_from_errors():
    error = MemoryRanOut("memory ran out")
    error.batch_size = 4
    assert wave(rank2=error, rank0=BROKEN).verdict(10.0) == TooLarge(4, error)


def test_a_task_is_called_off_when_all_ranks_have_left_it():
    off = Cancelled("off")
    assert wave(2, rank0=off).verdict(LATE) is None
    assert wave(2, rank0=off, rank1=off).verdict(10.0) == CalledOff()


@pytest.mark.parametrize("how", [{"returned": (0, 2)}, {"rank0": Cancelled("off"), "rank2": Cancelled("off")}])
def test_a_rank_that_is_not_done_long_after_the_others_hangs(how: dict):
    assert wave(**how).verdict(LATE, timeout=60.0) is None
    found = wave(**how).verdict(71.0, timeout=60.0)
    assert found == Lost("rank 1 is not done 60 s after the others (cluster.collective_timeout)")


def test_ranks_that_are_all_silent_are_not_known_to_hang():
    assert wave().verdict(1e6, timeout=60.0) is None
