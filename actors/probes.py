"""Reads probes (YAML): sequences that the user wrote, in partitions, each with the query that they are written for.

    - id: capital
      prompt: The capital of Veldra is
      completion: " Dunek"
      partitions:
        original order:
          - The capital of Veldra is Dunek.
        reversed order:
          - Dunek is the capital of Veldra.

A probe may have a `contrast`, and a `reference`: the partition that its scores are shown relative to, by default its
first. YAML is read as a tree of text with line numbers and nothing is built from its tags, so that a file can do no
harm, and `no` and `1912` are refused where text is wanted instead of becoming something else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import yaml

from actors.errors import BadRecord, ConfigError
from actors.filesystem import locate
from actors.packing import encode_text, framed
from actors.queries import Query, TokenisedQuery, tokenise_queries
from actors.tokeniser import Limits, Tokeniser, outside_vocabulary, well_formed
from conf.problems import did_you_mean
from conf.schema import Measurement, RunConfig

REQUIRED = ("id", "prompt", "completion", "partitions")
OPTIONAL = ("contrast", "reference")


@dataclass(frozen=True)
class ProbeSequence:
    """A sequence that the user wrote.

    Attributes:
        partition: What kind of sequence it is.
        index: Its place in the partition, from 1.
        text: What it says.
        row: The line of the file, from 1.
    """

    partition: str
    index: int
    text: str
    row: int


@dataclass(frozen=True)
class Probe:
    """A query and the sequences that were written for it.

    Attributes:
        query: Its `query_id` is the probe's id.
        sequences: In the order of the file: partition by partition.
        reference: The partition whose mean score is 1 on the relative scale.
    """

    query: Query
    sequences: tuple[ProbeSequence, ...]
    reference: str

    @property
    def probe_id(self) -> str:
        """The probe's name."""
        return self.query.query_id

    @property
    def partitions(self) -> tuple[str, ...]:
        """The partitions, in the order of the file."""
        return tuple(dict.fromkeys(sequence.partition for sequence in self.sequences))

    def record(self) -> dict[str, str]:
        """The query as a line of a queries file."""
        found = {"query_id": self.probe_id, "prompt": self.query.prompt, "completion": self.query.completion}
        return found if self.query.contrast is None else found | {"contrast": self.query.contrast}


def read_probes(config: RunConfig) -> list[Probe]:
    """Read the probes of a run, checking all that can be checked without a tokenizer.

    Raises:
        BadRecord: The file or a probe cannot be used; names the file, the line, the probe and the field.
        ConfigError: The file is not there.
    """
    assert config.probe.path is not None
    return parse_probes(config.probe.path, config.queries.measurement)


def parse_probes(path: str, measurement: Measurement = Measurement.log_probability) -> list[Probe]:
    """Read the probes of a file. Raises as `read_probes`."""
    probes: dict[str, Probe] = {}
    for number, node in enumerate(_items(_document(path), path), start=1):
        probe = _Reader(path, number, node, measurement).probe()
        if probe.probe_id in probes:
            first = probes[probe.probe_id].query.row
            raise _bad(path, node, f"probe {probe.probe_id!r}: 'id' was given to the probe of row {first} already")
        probes[probe.probe_id] = probe
    return list(probes.values())


def sequences_digest(probes: Sequence[Probe]) -> str:
    """Identify what is to be scored (SHA-256): the text of every sequence, with its query's place."""
    content = [[number, s.text] for number, probe in enumerate(probes) for s in probe.sequences]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def tokenise_probe_queries(
    probes: Sequence[Probe], tokeniser: Tokeniser, limits: Limits, config: RunConfig
) -> list[TokenisedQuery]:
    """Tokenise the queries of probes, as those of a queries file.

    Raises:
        BadRecord: As `actors.queries.tokenise_queries`, naming the probe.
    """
    path = config.probe.path or ""
    named = replace(config, queries=replace(config.queries, path=path))
    found = []
    for probe in probes:
        try:
            found += tokenise_queries([probe.query], tokeniser, limits, named)
        except BadRecord as error:
            raise _refused(path, error.row or 0, f"probe {probe.probe_id!r}: {error.message}") from error
    return found


def tokenise_probes(
    probes: Sequence[Probe], tokeniser: Tokeniser, limits: Limits, config: RunConfig
) -> list[list[np.ndarray]]:
    """Tokenise the sequences of each probe as the corpus's documents are, BOS and EOS included; none is cut.

    Returns:
        int32 token ids, by probe and sequence.

    Raises:
        BadRecord: A sequence has more tokens than the model's context, fewer than two, or one outside its vocabulary.
    """
    path, found = config.probe.path or "", []
    for probe in probes:
        texts = [encode_text(sequence.text, config.corpus) for sequence in probe.sequences]
        rows = [_framed(ids, tokeniser, config) for ids in tokeniser.encode(texts)]
        for sequence, ids in zip(probe.sequences, rows, strict=True):
            reason = _unfit(ids, limits)
            if reason is not None:
                raise _refused(path, sequence.row, f"{_place(probe.probe_id, sequence)}: {reason}")
        found.append(rows)
    return found


def _framed(ids: Sequence[int], tokeniser: Tokeniser, config: RunConfig) -> np.ndarray:
    bos = tokeniser.bos if config.corpus.add_bos else None
    eos = tokeniser.eos if config.corpus.add_eos else None
    return framed(np.asarray(ids, dtype=np.int64), bos, eos) if ids else np.empty(0, dtype=np.int32)


def _unfit(ids: np.ndarray, limits: Limits) -> str | None:
    if len(ids) < 2:
        return "the sequence has fewer than two tokens: none is predicted from another"
    if limits.context is not None and len(ids) > limits.context:
        return f"the sequence has {len(ids):,} tokens, where the model's context has {limits.context:,}"
    wrong = outside_vocabulary(ids, limits.vocabulary)
    if wrong is not None:
        return f"token id {wrong} is outside the model's vocabulary of {limits.vocabulary:,} tokens"
    return None


def _place(probe_id: str, sequence: ProbeSequence) -> str:
    return f"probe {probe_id!r}, partition {sequence.partition!r}, sequence {sequence.index}"


class _Reader:
    """Reads one probe from its node of the YAML tree."""

    def __init__(self, path: str, number: int, node: yaml.Node, measurement: Measurement) -> None:
        self._path, self._node, self._measurement = path, node, measurement
        self._name = f"probe {number}"

    def probe(self) -> Probe:
        fields = self._mapping(self._node, "the probe")
        if "id" in fields:
            self._name = f"probe {self._text(fields['id'], 'id', number=True)!r}"
        for key, node in fields.items():
            if key not in REQUIRED + OPTIONAL:
                raise self._wrong(node, f"there is no field {key!r}.{did_you_mean(key, REQUIRED + OPTIONAL)}")
        for key in self._required():
            if key not in fields:
                needed = " (queries.measurement=contrast needs it)" if key == "contrast" else ""
                raise self._wrong(self._node, f"{key!r} is missing{needed}")
        texts = {key: self._text(fields[key], key, number=key == "id") for key in ("id", "prompt", "completion")}
        contrast = self._text(fields["contrast"], "contrast") if "contrast" in fields else None
        query = Query(texts["id"], texts["prompt"], texts["completion"], contrast, row=_row(self._node))
        if not query.query_id:
            raise self._wrong(fields["id"], "'id' is empty")
        sequences = tuple(self._sequences(fields["partitions"]))
        return Probe(query, sequences, self._reference(fields, sequences))

    def _required(self) -> tuple[str, ...]:
        return (*REQUIRED, "contrast") if self._measurement is Measurement.contrast else REQUIRED

    def _sequences(self, node: yaml.Node) -> Iterator[ProbeSequence]:
        partitions = self._mapping(node, "'partitions'")
        if not partitions:
            raise self._wrong(node, "'partitions' is empty: name one, with a list of sequences")
        for name, listed in partitions.items():
            where = f"partition {name!r}"
            if not name:
                raise self._wrong(listed, "a partition has an empty name")
            if not isinstance(listed, yaml.SequenceNode) or not listed.value:
                raise self._wrong(listed, f"{where} is no list of sequences, or an empty one")
            for index, item in enumerate(listed.value, start=1):
                text = self._text(item, f"{where}, sequence {index}")
                if not text.strip():
                    raise self._wrong(item, f"{where}, sequence {index} is empty")
                yield ProbeSequence(name, index, text, _row(item))

    def _reference(self, fields: Mapping[str, yaml.Node], sequences: Sequence[ProbeSequence]) -> str:
        if "reference" not in fields:
            return sequences[0].partition
        wanted = self._text(fields["reference"], "reference")
        names = dict.fromkeys(sequence.partition for sequence in sequences)
        if wanted not in names:
            known = f"Partitions: {', '.join(map(repr, names))}.{did_you_mean(wanted, names)}"
            raise self._wrong(fields["reference"], f"'reference' names {wanted!r}, which is no partition. {known}")
        return wanted

    def _mapping(self, node: yaml.Node, what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._wrong(node, f"{what} is no mapping of names to values")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = self._text(key, f"a name in {what}", number=True)
            if name in found:
                raise self._wrong(key, f"{name!r} is given twice")
            found[name] = value
        return found

    def _text(self, node: yaml.Node, what: str, number: bool = False) -> str:
        kinds = ("str", "int") if number else ("str",)
        if isinstance(node, yaml.ScalarNode) and node.tag in {f"tag:yaml.org,2002:{kind}" for kind in kinds}:
            return well_formed(node.value)
        field = what if " " in what else repr(what)
        quote = f": put {node.value!r} in quotes" if isinstance(node, yaml.ScalarNode) and node.value else ""
        raise self._wrong(node, f"{field} is not text{quote}")

    def _wrong(self, node: yaml.Node, reason: str) -> BadRecord:
        return _bad(self._path, node, f"{self._name}: {reason}")


def _document(path: str) -> yaml.Node:
    """The tree of a YAML file."""
    filesystem, base = locate(path)
    try:
        with filesystem.open_input_stream(base) as stream:
            data = stream.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"probe.path={path!r} is no file", remedy="give a YAML file with a list of probes") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise _refused(path, row, f"invalid UTF-8 at byte {error.start}") from error
    try:
        found = yaml.compose(text, yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        row = text[: error.position].count("\n") + 1
        raise _refused(path, row, f"malformed YAML: {error.reason}; write it as an escape, in quotes") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise _refused(path, mark.line + 1 if mark else 1, f"malformed YAML: {reason}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise BadRecord(f"malformed YAML: {error}", file=path) from error
    if found is None:
        raise BadRecord("the file has no probe", file=path, remedy="write a list: id, prompt, completion, partitions")
    return found


def _items(node: yaml.Node, path: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise _bad(path, node, "the file is no list of probes: begin each with '- id: '")
    return node.value


def _row(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _bad(path: str, node: yaml.Node, reason: str) -> BadRecord:
    return _refused(path, _row(node), reason)


def _refused(path: str, row: int, reason: str) -> BadRecord:
    return BadRecord(reason, file=path, row=row, remedy="correct or remove this probe")
