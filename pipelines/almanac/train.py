"""Train the almanac's tokenizer and its small Llama, until the model completes the facts that it will be asked about.

Training stops soon after the facts are learned. A model that has gone on to certainty has next to no gradient left on
the documents that taught it a fact, and every influence on it is then small beside that of surprising documents: with
16 epochs instead of 10, EK-FAC's recall@10 of the documents that state a fact fell from 0.64 to 0.31.

Legend: B documents, T positions. `input_ids_BT` is right-padded; every position predicts the next one, padding nothing.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipelines.almanac.world import Query, World
from pipelines.threads import torch_threads

logger = logging.getLogger(__name__)

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")  # token ids 0 to 3
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The parameters of the model and of its training."""

    version: int = 1
    seed: int = 0
    hidden: int = 96
    intermediate: int = 256
    layers: int = 3
    heads: int = 4
    context: int = 64
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    epochs: int = 10  # the learning rate falls to a tenth over them
    most_epochs: int = 30  # if the facts are not learned by then, training goes on at the low rate up to here
    accuracy: float = 0.95  # of the queries, completed greedily
    threads: int = 1  # more help little with matrices of this size, and hurt where cores are shared


@dataclass(frozen=True)
class Training:
    """What training reached: mean loss a token of the last epoch, and the share of queries completed greedily."""

    loss: float
    accuracy: float
    epochs: int
    parameters: int
    vocabulary: int
    seconds: float


def train(world: World, spec: TrainSpec, folder: Path) -> Training:
    """Train on all documents of a world and save model and tokenizer in one folder.

    Args:
        world: The documents to learn, and the queries that must be completed.
        spec: The parameters; the result is deterministic on one machine.
        folder: Where `save_pretrained` puts both.

    Returns:
        What training reached. An accuracy below `spec.accuracy` is logged as a warning, not raised.
    """
    texts = [document.text for document in world.documents]
    found = train_on(texts, world.queries, train_tokenizer(texts), spec, folder)
    if found.accuracy < spec.accuracy:
        logger.warning("only %.0f%% of the queries are completed after training", 100 * found.accuracy)
    return found


def train_on(
    texts: Sequence[str], queries: Sequence[Query], tokenizer: PreTrainedTokenizerFast, spec: TrainSpec, folder: Path
) -> Training:
    """Train on any texts, each a sequence of its own, until the queries are completed.

    Args:
        texts: What to learn.
        queries: Prompts and completions that tell how far it has come.
        tokenizer: Its first token ids are those of `SPECIAL`.
        spec: As in `train`.
        folder: As in `train`.
    """
    start = time.perf_counter()
    tokenizer.save_pretrained(folder)
    rows = [encode(tokenizer, text, spec.context) for text in texts]
    with torch_threads(spec.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = LlamaForCausalLM(_llama(tokenizer, spec))
        loss, accuracy, epochs = _fit(model, rows, tokenizer, queries, spec)
    model.save_pretrained(folder)
    seconds = time.perf_counter() - start
    return Training(loss, accuracy, epochs, model.num_parameters(), len(tokenizer), round(seconds, 1))


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer: words and runs of punctuation, case kept, nothing unknown in these texts."""
    words = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    trainer = trainers.WordLevelTrainer(special_tokens=list(SPECIAL))  # type: ignore[call-arg]
    words.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str, context: int) -> list[int]:
    """Turn a document into the token ids of its one sequence, with BOS and EOS.

    Raises:
        ValueError: If it does not fit into the context.
    """
    ids = [SPECIAL.index(BOS), *tokenizer.encode(text, add_special_tokens=False), SPECIAL.index(EOS)]
    if len(ids) > context:
        raise ValueError(f"document of {len(ids)} tokens is longer than context={context}: {text!r}")
    return ids


def completion_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, queries: Sequence[Query]) -> float:
    """Return the share of queries whose completion is the most probable one, token by token."""
    return sum(_completes(model, tokenizer, query) for query in queries) / len(queries)


@torch.no_grad()
def _completes(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, query: Query) -> bool:
    prompt = [SPECIAL.index(BOS), *tokenizer.encode(query.prompt, add_special_tokens=False)]
    completion = tokenizer.encode(query.completion, add_special_tokens=False)
    logits_TV = model(torch.tensor([prompt + completion])).logits[0]
    return logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == completion


def _llama(tokenizer: PreTrainedTokenizerFast, spec: TrainSpec) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        max_position_embeddings=spec.context,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        tie_word_embeddings=False,
    )


def _fit(
    model: LlamaForCausalLM,
    rows: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerFast,
    queries: Sequence[Query],
    spec: TrainSpec,
) -> tuple[float, float, int]:
    """Run epochs until the queries are completed, at least `epochs` and at most `most_epochs` of them."""
    rng = random.Random(spec.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    steps = spec.epochs * -(-len(rows) // spec.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.1, 1.0 - 0.9 * step / steps))
    loss, accuracy = float("nan"), 0.0
    for epoch in range(1, spec.most_epochs + 1):
        loss = _epoch(model, _batches(rows, spec.batch_size, rng), optimizer, schedule)
        accuracy = completion_accuracy(model, tokenizer, queries)
        logger.info("epoch %d, loss %.3f a token, %.0f%% of the queries completed", epoch, loss, 100 * accuracy)
        if epoch >= spec.epochs and accuracy >= spec.accuracy:
            return loss, accuracy, epoch
    return loss, accuracy, spec.most_epochs


def _epoch(
    model: LlamaForCausalLM,
    batches: Iterator[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    model.train()
    total, tokens = 0.0, 0
    for labels_BT in batches:
        input_ids_BT = labels_BT.clamp(min=0)
        logits_BTV = model(input_ids=input_ids_BT).logits  # right padding is never attended to by what precedes it
        predicted = int((labels_BT[:, 1:] != IGNORED).sum())
        loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total, tokens = total + loss.item() * predicted, tokens + predicted
    model.eval()
    return total / tokens


def _batches(rows: Sequence[list[int]], size: int, rng: random.Random) -> Iterator[Tensor]:
    """Yield the rows in random order as right-padded batches of labels; neighbours in length share a batch."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]) + 4 * rng.random())
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(chunks)
    for chunk in chunks:
        batch = [torch.tensor(rows[row]) for row in chunk]
        yield torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=IGNORED)
