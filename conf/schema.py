"""The typed schema of a run: one frozen dataclass a config group.

Hydra composes YAML files of the same names into these classes (`conf/*/*.yaml`); `conf.load.to_config` turns
the composed tree into a `RunConfig` once, at the entry point. Nothing below the entry point sees a DictConfig.
Every field that changes the bits of an artifact is part of that artifact's identity (see
`pipelines.steps`), the others (threads, batch sizes, folders) are not.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from enum import Enum

MISSING = "???"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Dtype(Enum):
    """A floating-point type of weights, of products or of sums."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Solver(Enum):
    """How a query gradient is preconditioned: the curvature that is inverted."""

    ekfac = "ekfac"
    ekfac_cg = "ekfac_cg"
    kfac = "kfac"
    identity = "identity"


class Labels(Enum):
    """Where the labels of pseudo-gradients come from: the model's own distribution, or the corpus."""

    sampled = "sampled"
    empirical = "empirical"


class Measurement(Enum):
    """What a query measures: log p(completion | prompt), a contrast of two completions, or a whole sequence."""

    log_probability = "log_probability"
    contrast = "contrast"
    sequence_log_probability = "sequence_log_probability"


class CorpusFormat(Enum):
    """How corpus files are read; `auto` decides by the file's extension."""

    auto = "auto"
    jsonl = "jsonl"
    parquet = "parquet"
    text = "text"
    datasets = "datasets"


class BadRecord(Enum):
    """What happens to a record that cannot be used: the run stops, or the record is skipped and counted."""

    fail = "fail"
    skip = "skip"


class Offload(Enum):
    """Where the weights of a sharded model lie while they are not used: on the device, in host memory, or on disk."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class AttributionTokens(Enum):
    """What is attributed to tokens: all kinds of influence, or the simple one that the gradient gives alone."""

    all = "all"
    simple = "simple"


class Gpu(Enum):
    """A GPU whose data sheet a plan counts with."""

    a100 = "A100"
    h100 = "H100"
    h200 = "H200"


class Contraction(Enum):
    """How training gradients meet queries: two thin products, one formed gradient, or the cheaper of them."""

    auto = "auto"
    factored = "factored"
    dense = "dense"


class Subject(Enum):
    """What the model of a validation has learnt: a data set of Appendix C, a generated almanac, text, or facts."""

    concrete = "concrete"
    energy = "energy"
    mnist = "mnist"
    fashion_mnist = "fashion_mnist"
    cifar10 = "cifar10"
    almanac = "almanac"
    language = "language"
    facts = "facts"


class UnfilteredKind(Enum):
    """Which sequences the unfiltered feed holds."""

    all = "all"
    sample = "sample"
    none = "none"


class PrefilterKind(Enum):
    """Which prefilter proposes candidates to each query."""

    bm25 = "bm25"
    none = "none"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model under study, and which of its linear layers are tracked."""

    path: str = MISSING  # local folder or hub name that AutoModelForCausalLM loads
    tokenizer: str | None = None  # where the tokenizer is, if not beside the model
    revision: str | None = None  # of a hub name
    layers: str = "mlp"  # mlp | attention | all | a regular expression over module names
    dtype: Dtype = Dtype.float32  # of the weights and of the forward and backward pass
    trust_remote_code: bool = False  # run code that comes with the model
    attention: str | None = None  # transformers' attn_implementation; None is its default
    offload: Offload = Offload.none  # where each rank's slice of the weights lies while it is not used
    offload_path: str | None = None  # a local folder for offload=nvme


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """The training corpus and how it becomes sequences of equal length."""

    path: str = MISSING  # file, folder or glob; a local path or a URI
    format: CorpusFormat = CorpusFormat.auto
    text_field: str = "text"  # the column that holds a document
    id_field: str | None = None  # a column that names a document; None numbers them
    sequence_length: int = 512  # tokens a packed sequence
    pack: bool = True  # False: every document starts its own sequence
    add_bos: bool = True  # the tokenizer's BOS token, if it has one, before each document
    add_eos: bool = True  # the tokenizer's EOS token, if it has one, after each document
    collapse_newlines: bool = False  # runs of newlines become one
    on_bad_record: BadRecord = BadRecord.fail
    limit: int | None = None  # read only this many documents
    part_bytes: int = 33_554_432  # the bytes of corpus that one tokenising task reads
    shard_sequences: int = 4096  # sequences in a file of the tokenised corpus


@dataclass(frozen=True, kw_only=True)
class FactorsConfig:
    """The curvature: how it is estimated, and how it is inverted."""

    solver: Solver = Solver.ekfac
    samples: int | None = 10_000  # sequences for the covariance and for the correction; None is all
    labels: Labels = Labels.sampled
    blocks: int = 1  # Appendix A: blocks on each side of each layer
    damping_factor: float = 0.1  # damping = factor * mean(correction), layer by layer
    seed: int = 0  # of the choice of sequences
    groups: int = 16  # fixed groups of sequences that are summed, committed and merged in order
    convergence_share: float = 0.125  # of samples, for each of two disjoint fits that are compared; 0 compares none
    cg_iterations: int = 10  # of conjugate gradients (ekfac_cg), each a pass over cg_samples
    cg_samples: int | None = None  # sequences that its exact curvature is averaged over; None is those of samples


@dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """The queries, what they measure, and how their preconditioned gradients are compressed."""

    path: str = MISSING  # JSONL of query_id, prompt, completion[, contrast]
    measurement: Measurement = Measurement.log_probability
    rank: str = "32"  # mean rank over layers, or `full`
    fidelity: float | None = None  # correlation with full-rank scores that ranks are chosen to meet; overrides rank
    fidelity_sample: int = 64  # sequences scored both ways to measure it; 0 turns it off


@dataclass(frozen=True, kw_only=True)
class PrefilterConfig:
    """The BM25 TF-IDF prefilter of Section 3.2.1."""

    kind: PrefilterKind = PrefilterKind.bm25
    top: int = 10_000  # candidates a query
    k1: float = 1.5  # of Equation 28


@dataclass(frozen=True, kw_only=True)
class UnfilteredConfig:
    """The unfiltered feed: all of the corpus, or a seeded sample of it."""

    kind: UnfilteredKind = UnfilteredKind.sample
    sequences: int = 100_000  # of a sample
    seed: int = 0  # of the choice of sequences


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """The gradient scan and how its products are computed."""

    batch_size: int = 8  # sequences a micro-batch; halved and retried when memory runs out
    shard_sequences: int = 512  # candidates in one unit of work
    contraction: Contraction = Contraction.auto
    product_dtype: Dtype = Dtype.float32  # operands of the products
    sum_dtype: Dtype = Dtype.float32  # sums of products, covariances and scores
    agreement_sample: int = 32  # sequences scored again in float32 where product_dtype or model dtype is lower
    dense_memory: int = 1_073_741_824  # bytes that full-rank queries of all layers may take in a replica
    nonfinite_share: float = 0.001  # of sequences that may be set aside before a stage fails
    top: int = 100  # sequences a query in top.parquet
    bottom: int = 0  # sequences a query in bottom.parquet: those that lower the measurement most


@dataclass(frozen=True, kw_only=True)
class TailsConfig:
    """What is said of the distribution of influences: which scores are its tail, and how fits are tested."""

    share: float = 0.0001  # of each feed's scores: the largest, which are the tail
    count: int | None = None  # of scores that are the tail; None takes the share
    least: int = 50  # values below which nothing is fitted
    bootstraps: int = 200  # samples of the power law behind its p-value
    seed: int = 0  # of samples


@dataclass(frozen=True, kw_only=True)
class AttributionConfig:
    """How the scores of the top and bottom sequences are taken apart, by layer and by token."""

    top: int = 100  # sequences a query, of those in top.parquet; with those in bottom.parquet. 0 turns it off
    tokens: AttributionTokens = AttributionTokens.all  # simple leaves the influence of output and input tokens out
    step: float | None = None  # of its finite differences, as a share of layers' outputs; None chooses for each query
    context_characters: int = 400  # of neighbouring text on each side of a sequence


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the run happens."""

    address: str = "local"  # local starts Ray here; auto or an address joins a cluster
    min_replicas: int = 1  # copies of the model that stay while there is nothing to do
    max_replicas: int = 1  # copies of the model that work side by side, where the cluster has room
    idle_seconds: float = 60.0  # after which a replica above min_replicas without work leaves
    world_size: int = 1  # ranks a replica: processes that hold one model together with DeepSpeed ZeRO-3
    memory_per_rank: int | None = None  # bytes for factors in a rank; more take several passes. None is no limit
    collective_timeout: float = 600.0  # seconds that the ranks of a replica wait for one another
    cpus_per_rank: int = field(default_factory=cores)  # CPUs and threads of a rank; by default this machine's cores
    gpus_per_rank: float = 0.0  # a fraction lets ranks share a GPU
    num_cpus: int | None = None  # CPUs that a local Ray promises; None asks the machine
    progress_seconds: float = 10.0  # between lines of progress in a log


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report shows."""

    title: str | None = None  # None is the name of the run
    sequences: int = 100  # a query: that many top ones, and as many bottom ones where there are any
    megabytes: int = 25  # of 10^6 bytes that report.html may take; less important parts are left out, and it says so


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What `whence probe` scores; a trace does not read it."""

    path: str | None = None  # YAML list of id, prompt, completion[, contrast], partitions: lists of sequences by name


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What `whence plan` takes for files and machines that are not at hand; a trace does not read it."""

    sequences: int | None = None  # of a corpus that nobody has; None reads corpus.path
    queries: int | None = None  # that nobody has; None reads queries.path
    query_tokens: int = 64  # of each of plan.queries, prompt and completion
    gpu: Gpu | None = None  # of every rank with a GPU; None is the one of this machine, or an A100
    utilisation: float = 0.4  # share of a GPU's peak that products are taken to reach
    ranks_per_node: int = 8  # a replica of more ranks spans nodes
    link_utilisation: float = 0.7  # share of the GPUs' own link that exchanges inside a node are taken to reach
    link_bytes: float | None = None  # a second that a rank receives inside a node; None is the GPU's data sheet
    network_bytes: float = 12.5e9  # a second that a node receives from other nodes
    store_bytes: float = 1e9  # a second that a node reads from or writes to the store
    cpus: int | None = None  # of the whole cluster, for decompositions and IHVPs; None is the replicas' own
    cpu_flops: float | None = None  # a second of one CPU in float64; None times products and decompositions here
    memory_per_rank: int | None = None  # bytes of a rank's device; None is the GPU's data sheet


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What `whence validate` measures, and how long it takes over it; a trace does not read it."""

    subject: Subject = Subject.concrete
    path: str | None = None  # its data: a CSV file, an .npz file of images, or a folder of facts
    limit: int | None = None  # examples of a data set at most, drawn by the seed; None takes all
    seed: int = 0  # of splits, first weights, points and measurements
    points: int = 500  # training points (sequences) whose influence is compared with a measured response
    measurements: int = 10  # test points (queries) whose measurement responds
    epochs: int = 100  # of training by SGD
    pbo_steps: int = 12  # Gauss-Newton steps at most, for each objective of a network; 0 measures no response
    pbo_gradients: int = 320  # at most, for each objective of a language model, over all training sequences
    pbo_tolerance: float = 0.05  # relative gradient above which an objective counts as not converged
    epsilon: float | None = None  # weight of the added point; None takes the largest at which responses are linear
    label_draws: int = 1  # labels that EK-FAC samples for a training example; more for classifiers that know theirs
    lissa_depth: int | None = None  # steps of the recursion; None is the number of training points
    lissa_batch: int = 32  # training points a step of the recursion
    subsets: int = 0  # random halves that models are trained on, for the linear datamodeling score; 0 for none
    retrainings: int = 5  # models a subset, that differ in first weights and order
    removal: float = 0.0  # share of the training points that is dropped before training again; 0 for none
    largest_blocks: int = 8  # block-diagonal factors of 1, 2, 4 ... blocks are compared; 0 for none
    largest_rank: int = 64  # queries of rank 1, 2, 4 ... are compared with full rank; 0 for none
    convergence: bool = True  # whether factors of two disjoint samples are compared, by their size


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    store: str = ".whence/store"  # artifacts, shared by runs; a local path or a URI
    name: str = "trace"  # of the run; its folder is runs/<name>/<time>
    seed: int = 0  # of sampled labels
    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    factors: FactorsConfig = field(default_factory=FactorsConfig)
    queries: QueriesConfig = field(default_factory=QueriesConfig)
    prefilter: PrefilterConfig = field(default_factory=PrefilterConfig)
    unfiltered: UnfilteredConfig = field(default_factory=UnfilteredConfig)
    scan: ScanConfig = field(default_factory=ScanConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    tails: TailsConfig = field(default_factory=TailsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


def plain(value: object) -> object:
    """Turn a config (or a part of it) into JSON-able data: enums by name, dataclasses as dicts."""
    if isinstance(value, Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
