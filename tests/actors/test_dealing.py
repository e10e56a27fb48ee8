"""Which task is dealt next, how often one may be lost, which is copied, and how many replicas there should be."""

from __future__ import annotations

import pickle

import pytest

from actors.dealing import Breath, Census, Dealer, breathe
from actors.errors import ShardFailed


def test_tasks_are_dealt_in_order_and_once():
    dealer = Dealer(["a", "b", "c"])
    assert [dealer.deal() for _ in range(4)] == [0, 1, 2, None]


def test_work_is_unfinished_until_every_task_is_finished():
    dealer = Dealer(["a", "b"])
    first, second = dealer.deal(), dealer.deal()
    assert dealer.unfinished
    dealer.finished(second)
    assert dealer.unfinished
    dealer.finished(first)
    assert not dealer.unfinished


def test_nothing_to_do_is_finished():
    assert not Dealer([]).unfinished
    assert Dealer([]).deal() is None


def test_a_lost_task_is_the_next_to_be_dealt():
    dealer = Dealer(["a", "b", "c"])
    dealer.deal()
    dealer.deal()
    dealer.lost(0, "killed")
    assert [dealer.deal(), dealer.deal()] == [0, 2]


def test_a_task_that_was_lost_and_then_finished_counts_once():
    dealer = Dealer(["a"])
    dealer.deal()
    dealer.lost(0, "killed")
    dealer.finished(dealer.deal())
    assert not dealer.unfinished


def test_losses_are_counted_task_by_task():
    dealer = Dealer(["a", "b"], attempts=2)
    for task in (0, 1):
        assert dealer.deal() == task
        dealer.lost(task, "killed")
        dealer.finished(dealer.deal())
    assert not dealer.unfinished


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_task_that_loses_too_many_replicas_fails_by_name(attempts: int):
    dealer = Dealer(["group 4", "group 5"], attempts=attempts)
    for _ in range(attempts - 1):
        dealer.deal()
        dealer.lost(0, "the actor died")
    dealer.deal()
    with pytest.raises(ShardFailed) as caught:
        dealer.lost(0, "out of memory (OOM)")
    message = str(pickle.loads(pickle.dumps(caught.value)))  # noqa: S301
    assert message.startswith(f"group 4: {attempts} replicas died over it; the last: out of memory (OOM)")
    assert "lower scan.batch_size" in message


# --- the tail ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def tail(quick: int, seconds: float = 10.0) -> tuple[Dealer, Clock]:
    """A dealer of which `quick` tasks took `seconds` each, and the two last ones run."""
    clock = Clock()
    dealer = Dealer([f"task {number}" for number in range(quick + 2)], clock=clock)
    for _ in range(quick):
        task = dealer.deal()
        assert task is not None
        clock.now += seconds
        dealer.finished(task)
    dealer.deal()
    clock.now += 1.0
    dealer.deal()
    return dealer, clock


def anything(_task: int) -> bool:
    return True


def test_a_task_that_runs_twice_as_long_as_others_is_copied_once():
    dealer, clock = tail(3)
    clock.now += 18.5  # the first of the two has run for 19.5 s
    assert dealer.copy(anything) is None
    clock.now += 1.0
    assert dealer.copy(anything) == 3
    assert dealer.copy(anything) is None
    clock.now += 1.0
    assert dealer.copy(anything) == 4
    assert dealer.copy(anything) is None


def test_the_first_of_two_to_finish_ends_the_task():
    dealer, clock = tail(3)
    clock.now += 60
    assert dealer.copy(anything) == 3
    dealer.finished(3)
    assert dealer.unfinished == 1
    dealer.finished(4)
    assert not dealer.unfinished


def test_nothing_is_copied_while_tasks_wait_or_before_it_is_known_how_long_they_take():
    dealer, clock = tail(2)
    clock.now += 1000
    assert dealer.copy(anything) is None
    dealer, clock = tail(3)
    clock.now += 1000
    dealer.lost(4, "killed")
    assert dealer.copy(anything) is None
    assert dealer.deal() == 4
    assert dealer.copy(anything) == 3


def test_short_tasks_are_not_copied():
    dealer, clock = tail(5, seconds=0.1)
    clock.now += 3.0
    assert dealer.copy(anything) is None
    clock.now += 3.0
    assert dealer.copy(anything) == 5


def test_a_task_is_copied_only_where_the_result_would_be_the_same():
    dealer, clock = tail(3)
    clock.now += 1000
    assert dealer.copy(lambda task: False) is None
    assert dealer.copy(lambda task: task == 4) == 4


def test_a_task_of_two_replicas_goes_on_when_one_of_them_dies():
    dealer, clock = tail(3)
    clock.now += 60
    task = dealer.copy(anything)
    assert task == 3
    dealer.lost(task, "killed")
    assert dealer.deal() is None
    dealer.lost(task, "killed")
    assert dealer.deal() == task


def test_deaths_over_a_task_fail_it_only_when_no_replica_is_left_on_it():
    dealer, clock = tail(3)
    for _ in range(2):
        dealer.lost(3, "killed")
        assert dealer.deal() == 3
    clock.now += 60
    assert dealer.copy(anything) == 4
    clock.now += 60
    assert dealer.copy(anything) == 3
    dealer.lost(3, "killed")
    with pytest.raises(ShardFailed, match="task 3: 4 replicas died over it; the last: killed again"):
        dealer.lost(3, "killed again")


def test_a_task_that_is_given_back_is_the_next_and_counts_no_death():
    dealer = Dealer(["a", "b"], attempts=1)
    dealer.deal()
    dealer.returned(0)
    assert [dealer.deal(), dealer.deal()] == [0, 1]


# --- breathing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unfinished", "pending", "held", "rested", "ask", "withdraw", "leave"),
    [
        (100, 0, 0, 0, 8, 0, 0),  # much to do: as many as may be
        (3, 0, 0, 0, 3, 0, 0),  # three tasks: three replicas
        (0, 0, 0, 0, 2, 0, 0),  # nothing to do: the least
        (100, 2, 6, 0, 0, 0, 0),  # full
        (100, 2, 5, 0, 1, 0, 0),  # one was lost: it is replaced
        (3, 0, 3, 0, 0, 0, 0),  # one was lost near the end and is not needed
        (4, 4, 3, 0, 0, 3, 0),  # pending ones that would find no work are withdrawn
        (0, 4, 3, 1, 0, 4, 1),  # after the end: pending ones first, rested ones down to the least
        (0, 0, 8, 8, 0, 0, 6),
        (0, 0, 8, 3, 0, 0, 3),  # those that rested for long enough only
        (5, 0, 8, 3, 0, 0, 3),  # at the tail, too
        (7, 0, 8, 3, 0, 0, 1),  # one more task than busy replicas is left
    ],
)
def test_a_pool_fits_its_work(
    unfinished: int, pending: int, held: int, rested: int, ask: int, withdraw: int, leave: int
):
    found = breathe(unfinished, Census(pending, held, rested), least=2, most=8)
    assert found == Breath(ask, withdraw, leave)


def test_a_pool_may_shrink_to_nothing():
    assert breathe(0, Census(0, 2, 2), least=0, most=8) == Breath(0, 0, 2)
    assert breathe(1, Census(0, 0, 0), least=0, most=8) == Breath(1, 0, 0)
