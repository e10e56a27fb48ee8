"""Stacked SGD against plain loops of torch.optim.SGD in float64, and what must move no run: neighbours, left-outs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from influence.gauss_newton import Examples, TensorNetwork
from influence.output_losses import SoftmaxCrossEntropy, SquaredError
from pipelines.validation import learning
from pipelines.validation.learning import Recipe, learn

SIZE, BATCH, EPOCHS = 37, 8, 3
KEPT = torch.arange(0, SIZE, 2)
Fresh = Callable[[int], TensorNetwork]


def perceptron(seed: int) -> TensorNetwork:
    """Regression with two outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    return TensorNetwork(model.requires_grad_(False), SquaredError())


def classifier(seed: int) -> TensorNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)).double()
    return TensorNetwork(model, SoftmaxCrossEntropy())


def normed(seed: int) -> TensorNetwork:
    """Classes of images by a network with batch norm, in evaluation mode as `build` gives it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    return TensorNetwork(model.eval().requires_grad_(False), SoftmaxCrossEntropy())


def data(kind: str = "regression") -> Examples:
    generator = torch.Generator().manual_seed(8)
    if kind == "regression":
        x = torch.randn(SIZE, 3, generator=generator, dtype=torch.float64)
        return Examples(x, torch.stack([x.sin().sum(1), x[:, 0] * x[:, 1]], dim=1))
    shape = (SIZE, 1, 4, 4) if kind == "images" else (SIZE, 3)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return Examples(x, torch.randint(4, (SIZE,), generator=generator))


def plainly(fresh: Fresh, examples: Examples, recipe: Recipe, epochs: int = EPOCHS) -> dict[str, Tensor]:
    """The loop that anybody would write, over the examples that are kept and no others."""
    network = fresh(recipe.seed)
    model = network.model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.l2)
    kept = set(range(SIZE) if recipe.kept is None else recipe.kept.tolist())
    generator = torch.Generator().manual_seed(1_000_003 * recipe.seed + 3)
    for _ in range(epochs):
        order = [number for number in torch.randperm(SIZE, generator=generator).tolist() if number in kept]
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            outputs = model(examples.inputs[chosen])
            if isinstance(network.loss, SquaredError):
                loss = 0.5 * ((outputs - examples.targets[chosen]) ** 2).sum(1).mean()
            else:
                loss = nn.functional.cross_entropy(outputs, examples.targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("fresh", "kind"), [(perceptron, "regression"), (classifier, "classes"), (normed, "images")])
def test_as_a_plain_loop(fresh: Fresh, kind: str) -> None:
    recipes = [Recipe(0.1, 0.0, 1), Recipe(0.3, 0.01, 2, KEPT), Recipe(0.05, 0.1, 2)]
    learnt = learn(fresh, data(kind), recipes, EPOCHS, BATCH)
    for run, recipe in enumerate(recipes):
        same(learning.one(learnt, run), plainly(fresh, data(kind), recipe))


@pytest.mark.parametrize(("fresh", "kind"), [(perceptron, "regression"), (normed, "images")])
def test_examples_left_out_enter_nothing(fresh: Fresh, kind: str) -> None:
    """Not the batches, not their number, not the statistics of batch norm: they may as well be no numbers at all."""
    whole, poisoned = data(kind), data(kind)
    poisoned.inputs[1::2] = torch.nan
    recipe = Recipe(0.1, 0.01, 5, KEPT)
    first, second = (learn(fresh, examples, [recipe], EPOCHS, BATCH) for examples in (whole, poisoned))
    assert all(bool(torch.isfinite(value).all()) for value in first.values())
    same(first, second, 0.0)


def test_order_of_kept_numbers_is_no_matter() -> None:
    shuffled = KEPT[torch.randperm(len(KEPT), generator=torch.Generator().manual_seed(0))]
    recipes = [Recipe(0.1, 0.0, 1, KEPT), Recipe(0.1, 0.0, 1, shuffled)]
    learnt = learn(perceptron, data(), recipes, EPOCHS, BATCH)
    same(learning.one(learnt, 0), learning.one(learnt, 1))


def test_a_stack_is_its_runs_alone() -> None:
    sizes = [None, KEPT, torch.arange(5), torch.arange(20)]  # steps of 5, 3, 1 and 3 batches
    recipes = [Recipe(0.1 + 0.1 * run, 0.01 * run, run, kept) for run, kept in enumerate(sizes)]
    together = learn(perceptron, data(), recipes, EPOCHS, BATCH)
    pairs = learning.joined([learn(perceptron, data(), recipes[at : at + 2], EPOCHS, BATCH) for at in (0, 2)])
    same(together, pairs)
    for run, recipe in enumerate(recipes):
        same(learning.one(together, run), learning.one(learn(perceptron, data(), [recipe], EPOCHS, BATCH), 0))


def test_a_neighbour_that_diverges_is_no_matter() -> None:
    recipes = [Recipe(0.1, 0.0, 1), Recipe(1e200, 0.0, 1), Recipe(0.2, 0.0, 2)]
    together = learn(perceptron, data(), recipes, EPOCHS, BATCH)
    assert not torch.isfinite(learning.losses(perceptron(0), together, data())[1]).any()
    for run in (0, 2):
        same(learning.one(together, run), learning.one(learn(perceptron, data(), [recipes[run]], EPOCHS, BATCH), 0))


def test_runs_of_one_seed_start_alike_and_learn() -> None:
    recipes = [Recipe(0.1, 0.0, 1), Recipe(0.1, 0.0, 1), Recipe(0.1, 0.0, 2)]
    untrained = learn(perceptron, data(), recipes, 0)
    same(learning.one(untrained, 0), perceptron(1).model.state_dict())
    learnt = learn(perceptron, data(), recipes, 30, BATCH)
    same(learning.one(learnt, 0), learning.one(learnt, 1))
    assert not torch.allclose(learnt["0.weight"][0], learnt["0.weight"][2])
    before, after = (learning.losses(perceptron(0), states, data()).mean(1) for states in (untrained, learnt))
    assert bool((after < before / 2).all())


@pytest.mark.parametrize(("fresh", "kind"), [(classifier, "classes"), (normed, "images")])
def test_losses_and_hits(fresh: Fresh, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "EVALUATED", 10)
    examples = data(kind)
    learnt = learn(fresh, examples, [Recipe(0.1, 0.0, 1), Recipe(0.1, 0.0, 2)], 1, BATCH)
    found, hits = (measure(fresh(0), learnt, examples) for measure in (learning.losses, learning.hits))
    for run in range(2):
        model = fresh(0).model.eval()
        model.load_state_dict(learning.one(learnt, run))
        scores = model(examples.inputs)
        expected = nn.functional.cross_entropy(scores, examples.targets, reduction="none")
        torch.testing.assert_close(found[run], expected.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(hits[run] == 1, scores.argmax(1) == examples.targets)


def test_progress_and_no_examples() -> None:
    ticks: list[None] = []
    learn(perceptron, data(), [Recipe(0.1, 0.0, 1)], 4, BATCH, lambda: ticks.append(None))
    assert len(ticks) == 4
    with pytest.raises(ValueError, match="no examples"):
        learn(perceptron, data(), [Recipe(0.1, 0.0, 1, torch.tensor([], dtype=torch.int64))], 1)
