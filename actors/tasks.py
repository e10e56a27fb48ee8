"""What the driver asks of a replica: plain frozen data that names artifacts and sequences, never tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.store import Artifact
from conf.schema import ClusterConfig, Labels, Measurement, ModelConfig, ScanConfig
from influence.measurement import MeasuredQuery


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica is made of; a replica that is replaced is made of the same."""

    model: ModelConfig
    scan: ScanConfig
    cluster: ClusterConfig


@dataclass(frozen=True)
class GroupTask:
    """Sum the statistics of one fixed group of sequences, in the layers of one pass, and commit them as one part.

    Attributes:
        output: the covariance or correction artifact that the part belongs to.
        folder: where in it, `actors.factors.part_folder`.
        group: number of the group.
        layers: names of the layers of the pass.
        sequence_ids: its sequences, ascending.
        sequences: the tokenised corpus.
        labels: where pseudo-labels come from.
        seed: of sampled labels.
        blocks: diagonal blocks a side (covariance).
        bases: the eigenbasis artifact (correction).
        excluded: sequences that another pass set aside.
    """

    output: Artifact
    folder: str
    group: int
    layers: tuple[str, ...]
    sequence_ids: Sequence[int]
    sequences: Artifact
    labels: Labels
    seed: int
    blocks: int = 1
    bases: Artifact | None = None
    excluded: Mapping[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"group {self.group}"


@dataclass(frozen=True)
class QueryTask:
    """Compute the gradients of one batch of queries' measurements and write them, one file a layer."""

    output: Artifact
    batch: int
    queries: tuple[tuple[int, str, MeasuredQuery], ...]  # position in the file, query_id, tokens
    measurement: Measurement

    def __str__(self) -> str:
        return "queries " + ", ".join(repr(query_id) for _, query_id, _ in self.queries)


@dataclass(frozen=True)
class FidelityTask:
    """Score a sample of sequences with compressed and with full-rank queries."""

    sequence_ids: tuple[int, ...]
    sequences: Artifact
    compressed: Artifact
    gradients: Artifact
    factors: Mapping[str, Artifact]
    solver: str
    damping_factor: float
    queries: tuple[int, ...]
    refined: Artifact | None = None  # IHVPs by conjugate gradients, where the solver has them

    def __str__(self) -> str:
        return f"fidelity of queries {self.queries[0]}-{self.queries[-1]}"


@dataclass(frozen=True)
class ConvergenceTask:
    """Score a sample of sequences with queries that are preconditioned by each of several fits.

    Attributes:
        sequence_ids: the sample.
        sequences: the tokenised corpus.
        gradients: of the queries.
        fits: the factors of each fit, `eigenbasis` and, where the solver has it, `correction`.
        solver: name of the solver.
        damping_factor: damping = factor * mean eigenvalue.
        queries: numbers of those that are scored.
        size: sequences that each fit is of.
    """

    sequence_ids: tuple[int, ...]
    sequences: Artifact
    gradients: Artifact
    fits: tuple[Mapping[str, Artifact], ...]
    solver: str
    damping_factor: float
    queries: tuple[int, ...]
    size: int

    def __str__(self) -> str:
        return f"fits on {self.size} sequences, queries {self.queries[0]}-{self.queries[-1]}"


@dataclass(frozen=True)
class ScanTask:
    """Score the candidates with sequence_id in [first, stop) and write one file of scores."""

    output: Artifact
    shard: int
    first: int
    stop: int
    count: int
    sequences: Artifact
    candidates: Artifact
    queries: Artifact

    def __str__(self) -> str:
        return f"scan shard {self.shard} (sequences {self.first} to {self.stop - 1})"


@dataclass(frozen=True)
class AgreementTask:
    """Score a sample at the run's precision and in float32."""

    sequence_ids: tuple[int, ...]
    sequences: Artifact
    queries: Artifact

    def __str__(self) -> str:
        return "agreement of precisions"


@dataclass(frozen=True)
class AttributionTask:
    """Take the scores of some pairs of a sequence and a query apart, and write one part.

    Attributes:
        output: the attribution artifact.
        part: number of the part among those of its kind.
        pairs: (sequence_id, query).
        sequences: the tokenised corpus.
        queries: as the scan uses them.
        steps: α of each pair, for the influence of tokens.
        relative: the step that was asked for, as `attribution.step`; None chooses.
    """

    output: Artifact
    part: int
    pairs: tuple[tuple[int, int], ...]
    sequences: Artifact
    queries: Artifact
    steps: tuple[float, ...] = ()
    relative: float | None = None

    def __str__(self) -> str:
        return f"attribution {self.part} ({len(self.pairs)} pairs)"


@dataclass(frozen=True)
class ProbeTask:
    """Score sequences of one probe, which the corpus need not have: on all queries, on its own in detail.

    Attributes:
        output: the artifact to write to.
        probe: its number, and that of its own query.
        rows: token ids of its sequences.
        queries: those of all probes.
        tokens: of a sequence, on average over all probes; contractions are chosen for it.
    """

    output: Artifact
    probe: int
    rows: tuple[tuple[int, ...], ...]
    queries: Artifact
    tokens: int

    def __str__(self) -> str:
        return f"probe {self.probe}"


@dataclass(frozen=True)
class Done:
    """What a finished task reports to the driver: counts, and small results."""

    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0
    excluded: dict[int, str] = field(default_factory=dict)
    result: object = None
