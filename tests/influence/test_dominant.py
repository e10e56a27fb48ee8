"""The inverse of the largest rows against dense matrices."""

from __future__ import annotations

import pytest
import torch

from influence.dominant import Dominant
from tests.networks import Plain, convolutional, mlp


def damping(plain: Plain) -> dict[str, float]:
    return {layer.name: 0.05 * (1 + number) for number, layer in enumerate(plain.layers)}


def inverse(plain: Plain, fitted: Dominant) -> torch.Tensor:
    """M⁻¹ written out, [P, P]."""
    size = sum(layer.parameters for layer in plain.layers)
    parts = torch.eye(size, dtype=torch.float64).split([layer.parameters for layer in plain.layers], dim=1)
    unit = {
        layer.name: part.unflatten(1, (layer.outputs, layer.columns))
        for layer, part in zip(plain.layers, parts, strict=True)
    }
    return plain.flat(fitted(unit))


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_with_all_rows_it_is_the_exact_inverse(loss: str):
    plain = mlp(loss)
    fitted = Dominant.fit(plain.network, plain.layers, plain.examples, damping(plain), batch=7)
    torch.testing.assert_close(inverse(plain, fitted), torch.linalg.inv(plain.damped(damping(plain))))
    assert fitted.trace_share == pytest.approx(1.0)


def test_with_some_rows_it_lies_above_the_exact_inverse_and_nearer_with_more():
    plain = mlp("softmax")
    exact_PP, gaps = torch.linalg.inv(plain.damped(damping(plain))), []
    for rows in (5, 20, 40):
        found_PP = inverse(plain, Dominant.fit(plain.network, plain.layers, plain.examples, damping(plain), rows))
        torch.testing.assert_close(found_PP, found_PP.T)
        assert torch.linalg.eigvalsh(found_PP - exact_PP).min() > -1e-10
        gaps.append(float((found_PP - exact_PP).trace()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.1 * gaps[0]


def test_the_rows_are_the_largest():
    plain = mlp("softmax")
    few, more = (Dominant.fit(plain.network, plain.layers, plain.examples, damping(plain), rows) for rows in (10, 20))
    share = sum(
        float((few.inputs[name][few.owner_R].square().sum(1) * grad.square().sum(1) / damping(plain)[name]).sum())
        for name, grad in few.gradients.items()
    )
    plain_trace = plain.gauss_newton() / (plain.damped(damping(plain)) - plain.gauss_newton()).diagonal()
    assert few.trace_share == pytest.approx(share / float(plain_trace.trace()))
    assert few.trace_share > more.trace_share - few.trace_share


def test_it_does_not_depend_on_how_vectors_come():
    plain = mlp("softmax")
    fitted = Dominant.fit(plain.network, plain.layers, plain.examples, damping(plain), 20)
    vectors = plain.vectors(3)
    together = fitted(vectors)
    alone = fitted({name: value[1:2] for name, value in vectors.items()})
    torch.testing.assert_close(plain.flat(alone)[0], plain.flat(together)[1])


def test_layers_of_several_places_are_refused():
    plain = convolutional()
    with pytest.raises(ValueError, match="layer 3 sees several rows"):
        Dominant.fit(plain.network, plain.layers, plain.examples, damping(plain))
