"""The inverse of the largest rows, formed, against dense matrices."""

from __future__ import annotations

import pytest
import torch

from influence.dominant import Dominant
from influence.formed import Formed
from tests.networks import Plain, convolutional, mlp


def fitted(plain: Plain, rows: int | None = None, batch: int = 4) -> Formed:
    """With at most so many rows; None takes all."""
    size = 8 * sum(layer.parameters for layer in plain.layers)
    return Formed.fit(
        plain.network, plain.layers, plain.examples, plain.increasing, 1 << 30 if rows is None else rows * size, batch
    )


@pytest.mark.parametrize("loss", ["squared", "softmax"])
@pytest.mark.parametrize("make", [mlp, convolutional])
def test_with_all_rows_it_is_the_exact_inverse(make, loss: str):
    plain = make(loss)
    found = fitted(plain)
    assert found.whole
    assert found.trace_share == pytest.approx(1.0)
    torch.testing.assert_close(plain.matrix(found), torch.linalg.inv(plain.damped(plain.increasing)))


def test_with_some_rows_it_lies_above_the_exact_inverse_and_nearer_with_more():
    plain = convolutional()
    exact_PP, gaps = torch.linalg.inv(plain.damped(plain.increasing)), []
    for rows in (2, 5, 10):
        found = fitted(plain, rows)
        assert (len(found.cholesky_RR), found.whole) == (rows, False)
        found_PP = plain.matrix(found)
        assert torch.linalg.eigvalsh((found_PP + found_PP.T) / 2 - exact_PP).min() > -1e-10
        gaps.append(float((found_PP - exact_PP).trace()))
    assert gaps == sorted(gaps, reverse=True)


def test_it_chooses_the_rows_that_the_other_way_chooses():
    plain = mlp("softmax")
    other = Dominant.fit(plain.network, plain.layers, plain.examples, plain.increasing, 10)
    torch.testing.assert_close(plain.matrix(fitted(plain, 10)), plain.matrix(other))
    assert fitted(plain, 10).trace_share == pytest.approx(other.trace_share)


def test_micro_batches_do_not_matter():
    plain = convolutional()
    one, six = fitted(plain, 7, batch=1), fitted(plain, 7, batch=6)
    torch.testing.assert_close(plain.matrix(one), plain.matrix(six))
