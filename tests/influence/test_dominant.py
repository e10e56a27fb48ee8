"""The inverse of the largest rows against dense matrices."""

from __future__ import annotations

import pytest
import torch

from influence.dominant import Dominant
from tests.networks import convolutional, mlp


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_with_all_rows_it_is_the_exact_inverse(loss: str):
    plain = mlp(loss)
    fitted = Dominant.fit(plain.network, plain.layers, plain.examples, plain.increasing, batch=7)
    torch.testing.assert_close(plain.matrix(fitted), torch.linalg.inv(plain.damped(plain.increasing)))
    assert fitted.trace_share == pytest.approx(1.0)


def test_with_some_rows_it_lies_above_the_exact_inverse_and_nearer_with_more():
    plain = mlp("softmax")
    exact_PP, gaps = torch.linalg.inv(plain.damped(plain.increasing)), []
    for rows in (5, 20, 40):
        found_PP = plain.matrix(Dominant.fit(plain.network, plain.layers, plain.examples, plain.increasing, rows))
        torch.testing.assert_close(found_PP, found_PP.T)
        assert torch.linalg.eigvalsh(found_PP - exact_PP).min() > -1e-10
        gaps.append(float((found_PP - exact_PP).trace()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.1 * gaps[0]


def test_the_rows_are_the_largest():
    plain = mlp("softmax")
    few, more = (Dominant.fit(plain.network, plain.layers, plain.examples, plain.increasing, rows) for rows in (10, 20))
    share = sum(
        float((few.inputs[name][few.owner_R].square().sum(1) * grad.square().sum(1) / plain.increasing[name]).sum())
        for name, grad in few.gradients.items()
    )
    plain_trace = plain.gauss_newton() / (plain.damped(plain.increasing) - plain.gauss_newton()).diagonal()
    assert few.trace_share == pytest.approx(share / float(plain_trace.trace()))
    assert few.trace_share > more.trace_share - few.trace_share


def test_it_does_not_depend_on_how_vectors_come():
    plain = mlp("softmax")
    fitted = Dominant.fit(plain.network, plain.layers, plain.examples, plain.increasing, 20)
    vectors = plain.vectors(3)
    together = fitted(vectors)
    alone = fitted({name: value[1:2] for name, value in vectors.items()})
    torch.testing.assert_close(plain.flat(alone)[0], plain.flat(together)[1])


def test_layers_of_several_places_are_refused():
    plain = convolutional()
    with pytest.raises(ValueError, match="layer 3 sees several rows"):
        Dominant.fit(plain.network, plain.layers, plain.examples, plain.increasing)
