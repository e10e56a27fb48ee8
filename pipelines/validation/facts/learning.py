"""A small Llama that learns the chosen sentences, and which facts it knows from them rather than guesses.

A fact is *known* if the model completes its prompt greedily, and gives the object more than `MARGIN` times the
probability that it has after the same prompt about other subjects: "the native language is French" is a good guess
about anybody in this collection, and no sentence about the subject has then taught it.

Legend: F prompts, T positions, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from conf.schema import ValidationConfig
from pipelines.almanac.train import BOS, EOS, PAD, SPECIAL, UNKNOWN, Training, TrainSpec, train_on
from pipelines.almanac.world import Query
from pipelines.threads import torch_threads
from pipelines.validation.facts.sentences import Choice, Fact

MARGIN = 2.0
OTHERS = 8  # subjects of the same relation that a fact's prompt is also asked about
FREQUENCY = 2  # of a word in texts and questions, below which it is unknown
ALIKE = 4  # queries that ask for the same relation and have the same answer, at most
WATCHED = 100  # facts whose completion is watched during training


@dataclass(frozen=True, kw_only=True)
class FactsSpec:
    """What is learnt: how many sentences, how, and which facts may then be asked for.

    Attributes:
        version: of this code.
        seed: of the choice of sentences and facts, of first weights and of the order of training.
        sentences: in all.
        filler: share of them that is chosen without the facts that they state.
        queries: known facts that are traced, at most, chosen at random.
        training: of the model; its context bounds the length of sentences.
    """

    version: int = 1
    seed: int
    sentences: int
    filler: float = 0.25
    queries: int
    training: TrainSpec

    @classmethod
    def of(cls, validation: ValidationConfig) -> FactsSpec:
        """`points` are the sentences, `measurements` the queries, `epochs` those of training."""
        epochs = validation.epochs
        size = {"hidden": 64, "intermediate": 172, "layers": 3, "heads": 4, "context": 32, "batch_size": 32}
        training = TrainSpec(seed=validation.seed, epochs=epochs, most_epochs=epochs, **size)
        return cls(
            seed=validation.seed,
            sentences=validation.points,
            queries=validation.measurements,
            training=training,
        )


@dataclass(frozen=True)
class Knowledge:
    """What a model says to a fact's prompt.

    Attributes:
        fact: the fact.
        completed: whether every token of the object is the most probable one.
        log_probability: log p(object | prompt), in nats.
        without_subject: log of the mean of that probability after the prompt about other subjects; None if there are
            none, or nobody asked because the prompt is not completed.
    """

    fact: Fact
    completed: bool
    log_probability: float
    without_subject: float | None

    @property
    def known(self) -> bool:
        """Whether the object is completed because of the subject."""
        if self.without_subject is None:
            return False
        return self.completed and self.log_probability - self.without_subject > math.log(MARGIN)


def learn(choice: Choice, spec: FactsSpec, folder: Path) -> Training:
    """Train on the chosen sentences and save model and tokenizer in one folder."""
    tokenizer = words_of(choice.texts, choice.facts)
    askable = answerable(choice.facts, tokenizer)
    watched = random.Random(spec.seed).sample(askable, min(WATCHED, len(askable)))
    queries = [Query(fact.fact_id, fact.fact_id, fact.prompt, fact.completion) for fact in watched]
    return train_on(choice.texts, queries, tokenizer, spec.training, folder)


def words_of(texts: Sequence[str], facts: Sequence[Fact]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer, case kept, in which words are unknown that occur once and in no fact that may be asked.

    A small model's cost is mostly that of its vocabulary, which is 3,733 words instead of 7,795 for 1,500 sentences of
    T-REx; an eighth of their tokens are then unknown.
    """
    words = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    trainer = trainers.WordLevelTrainer(special_tokens=list(SPECIAL), min_frequency=FREQUENCY)  # type: ignore[call-arg]
    words.train_from_iterator([*texts, *(fact.prompt + fact.completion for fact in facts)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )


def answerable(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerFast) -> list[Fact]:
    """The facts whose prompt and object consist of words that the tokenizer knows."""
    unknown = tokenizer.unk_token_id
    return [fact for fact in facts if unknown not in tokenizer.encode(fact.prompt + fact.completion)]


def examine(folder: Path, facts: Sequence[Fact], spec: FactsSpec) -> list[Knowledge]:
    """Ask a trained model for every fact, and for the object of those that it completes after other subjects' prompts.

    Args:
        folder: of the model and its tokenizer.
        facts: those that are asked for; the ones that hold unknown words are left out.
        spec: its seed chooses the other subjects.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    askable = answerable(facts, tokenizer)
    alike: dict[str, list[Fact]] = defaultdict(list)
    for fact in askable:
        alike[fact.relation].append(fact)
    generator = random.Random(spec.seed)
    with torch_threads(spec.training.threads):
        return [_asked(model, tokenizer, fact, _others(fact, alike[fact.relation], generator)) for fact in askable]


def drawn(knowledge: Sequence[Knowledge], spec: FactsSpec) -> list[Knowledge]:
    """Known facts at random, as many as are wanted or there are, and few that have relation and object in common."""
    known = [each for each in knowledge if each.known]
    taken: Counter[tuple[str, str]] = Counter()
    chosen = []
    for each in random.Random(spec.seed).sample(known, len(known)):
        answer = each.fact.relation, each.fact.object
        taken[answer] += 1
        if taken[answer] <= ALIKE:
            chosen.append(each)
    return chosen[: spec.queries]


def _others(fact: Fact, alike: Sequence[Fact], generator: random.Random) -> list[str]:
    """Subjects of the same relation about which the object is not the answer."""
    subjects = sorted({other.subject for other in alike if other.object != fact.object} - {fact.subject})
    return generator.sample(subjects, min(OTHERS, len(subjects)))


def _asked(model: LlamaForCausalLM, tokenizer: Any, fact: Fact, others: Sequence[str]) -> Knowledge:
    log_p_F, completed = _completions(model, tokenizer, [fact.prompt], fact.completion)
    elsewhere = None
    if completed and others:
        prompts = [fact.asked_of(subject) for subject in others]
        elsewhere = float(_completions(model, tokenizer, prompts, fact.completion)[0].exp().mean().log())
    return Knowledge(fact, completed, float(log_p_F[0]), elsewhere)


@torch.no_grad()
def _completions(
    model: LlamaForCausalLM, tokenizer: Any, prompts: Sequence[str], completion: str
) -> tuple[torch.Tensor, bool]:
    """Log p(completion | prompt) of every prompt, in float64, and whether it is the most probable after the first."""
    wanted = torch.tensor(tokenizer.encode(completion, add_special_tokens=False))
    starts = [[SPECIAL.index(BOS), *tokenizer.encode(prompt, add_special_tokens=False)] for prompt in prompts]
    rows = [torch.tensor([*start, *wanted.tolist()]) for start in starts]
    log_p_FTV = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits.double().log_softmax(-1)
    places = [log_p_FTV[row, len(start) - 1 : len(start) - 1 + len(wanted)] for row, start in enumerate(starts)]
    found = torch.stack([place.gather(1, wanted[:, None]).sum() for place in places])
    return found, bool((places[0].argmax(-1) == wanted).all())
