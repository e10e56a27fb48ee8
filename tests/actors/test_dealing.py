"""Which task is dealt next, and how often one may be lost."""

from __future__ import annotations

import pickle

import pytest

from actors.dealing import Dealer
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
