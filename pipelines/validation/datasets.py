"""Data sets of Appendix C, from files: tables for regression, images for classification; split and normalised.

N examples of F features. The split is 70 % for training, 20 % for validation, 10 % for testing, drawn from
`validation.seed`. Normalised means zero mean and unit variance over the *training* split: of each column of a table,
and of each channel of images (a pixel of its own has next to no variance at the edges). Targets of regression are
normalised too, so that losses are in units of their variance; the statistics that undo it are kept.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from pyarrow.fs import FileSystem, FileType
from torch import Tensor

from actors.digests import remembered_digests
from actors.errors import BadRecord, ConfigError
from actors.filesystem import locate, read_stream, shown
from conf.schema import Subject
from influence.gauss_newton import Examples

SHARES = {"train": 0.7, "valid": 0.2, "test": 0.1}
FEWEST = 20  # examples of a data set that can be split


@dataclass(frozen=True)
class Table:
    """A CSV file with a header: the first columns are features, the one after them is the target.

    Attributes:
        features: F.
        columns: all that the file has, those after the target unused.
    """

    features: int
    columns: int


@dataclass(frozen=True)
class Images:
    """An .npz file with x_train uint8 and y_train; the images of its own test set are not read.

    Attributes:
        shape: of an image: height, width, and channels where there are several.
        classes: labels are 0 ... classes − 1.
        flat: whether networks are given an image as a row of pixels, and not as [channels, height, width].
    """

    shape: tuple[int, ...]
    classes: int
    flat: bool


SETS: Mapping[Subject, Table | Images] = {
    Subject.concrete: Table(features=8, columns=9),
    Subject.energy: Table(features=8, columns=10),  # Y1, the heating load, then Y2
    Subject.mnist: Images((28, 28), 10, flat=True),
    Subject.fashion_mnist: Images((28, 28), 10, flat=True),
    Subject.cifar10: Images((32, 32, 3), 10, flat=False),
}


@dataclass(frozen=True)
class Split:
    """A data set in its three parts.

    Attributes:
        parts: `train`, `valid` and `test`. Tables are float64 with targets [N, 1]; images are float32 with int64
            labels [N].
        outputs: of a network: targets, or classes.
        statistics: what was subtracted and divided by: `mean`, `deviation`, and for tables those of the target.
    """

    parts: Mapping[str, Examples]
    outputs: int
    statistics: Mapping[str, list[float]]

    @property
    def inputs(self) -> int:
        """Features, or channels of images that keep their shape."""
        return self.parts["train"].inputs.shape[1]


def load(subject: Subject, path: str | None, seed: int, limit: int | None = None) -> Split:
    """Read, split and normalise a data set, or as many of its examples as are asked for.

    Raises:
        ConfigError: if there is no such file, or the subject has no data set.
        BadRecord: if the file is not what the subject asks for; names the row.
    """
    kind = _kind(subject)
    data = _bytes(subject, path)
    raw = read_table(data, kind, str(path)) if isinstance(kind, Table) else read_images(data, kind, str(path))
    parts = split(raw, seed, limit)
    if isinstance(kind, Table):
        return _normalised_table(parts)
    return _normalised_images(parts, kind)


def data_digest(subject: Subject, path: str | None) -> str:
    """The SHA-256 of the file: what identifies the data, wherever the file lies.

    Raises:
        ConfigError: as `load`.
    """
    _kind(subject)
    filesystem, inner = _found(subject, path)
    return remembered_digests(filesystem, [inner], f"validation {path}")[0]


# --- files ----------------------------------------------------------------------------------------------------------


def read_table(data: bytes, table: Table, path: str) -> Examples:
    """Rows of a CSV file in float64.

    Raises:
        BadRecord: for a row that has another number of columns or holds what is no finite number.
    """
    rows, remedy = _rows(data, path), f"give {_expected(table)}"
    header = next(rows, [])
    if len(header) != table.columns:
        what = f"the header has {len(header)} columns; there should be {table.columns}"
        raise BadRecord(what, file=path, row=1, remedy=remedy)
    if all(_number(cell) is not None for cell in header):
        raise BadRecord("the first line holds numbers, not the names of columns", file=path, row=1, remedy=remedy)
    values = []
    for row, cells in enumerate(rows, 2):
        if not cells:
            continue
        if len(cells) != table.columns:
            raise BadRecord(f"{len(cells)} columns, where the header has {table.columns}", file=path, row=row)
        numbers = [_number(cell) for cell in cells]
        if None in numbers:
            at = numbers.index(None)
            raise BadRecord(f"column {header[at]!r}: {cells[at]!r} is not a finite number", file=path, row=row)
        values.append(numbers)
    _enough(len(values), path)
    found = torch.tensor(values, dtype=torch.float64)
    return Examples(found[:, : table.features], found[:, table.features : table.features + 1])


def _rows(data: bytes, path: str) -> Iterator[list[str]]:
    try:
        return csv.reader(io.StringIO(data.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise BadRecord(f"this is no text in UTF-8 ({error})", file=path) from error


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def read_images(data: bytes, images: Images, path: str) -> Examples:
    """Pixels uint8 as they are stored, labels int64.

    Raises:
        BadRecord: if an array is missing, or of another shape or type.
    """
    remedy = f"give {_expected(images)}"
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            missing = [name for name in ("x_train", "y_train") if name not in arrays]
            if missing:
                raise BadRecord(f"there is no array {' and no '.join(missing)}", file=path, remedy=remedy)
            x, y = arrays["x_train"], arrays["y_train"]
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord(f"this is no .npz file that can be read ({error})", file=path, remedy=remedy) from error
    y = y.reshape(len(y), -1) if y.ndim else y
    if x.dtype != np.uint8 or x.shape[1:] != images.shape:
        raise BadRecord(f"x_train is {x.dtype} {list(x.shape)}", file=path, remedy=remedy)
    if y.dtype.kind not in "iu" or y.shape != (len(x), 1):
        raise BadRecord(f"y_train is {y.dtype} {list(y.shape)}, for {len(x)} images", file=path, remedy=remedy)
    _enough(len(x), path)
    wrong = np.flatnonzero((y < 0) | (y >= images.classes))
    if len(wrong):
        what = f"label {y[wrong[0], 0]}; labels are 0 to {images.classes - 1}"
        raise BadRecord(what, file=path, row=int(wrong[0]), remedy=remedy)
    return Examples(torch.from_numpy(x), torch.from_numpy(y[:, 0].astype(np.int64)))


def _enough(count: int, path: str) -> None:
    if count < FEWEST:
        raise BadRecord(f"{count} examples are too few to be split; there should be {FEWEST}", file=path)


def _kind(subject: Subject) -> Table | Images:
    if subject not in SETS:
        names = ", ".join(each.name for each in SETS)
        raise ConfigError(f"validation.subject={subject.name} has no data set of its own. Those that have: {names}")
    return SETS[subject]


def _bytes(subject: Subject, path: str | None) -> bytes:
    filesystem, inner = _found(subject, path)
    return read_stream(filesystem, inner)


def _found(subject: Subject, path: str | None) -> tuple[FileSystem, str]:
    expected = _expected(SETS[subject])
    if path is None:
        raise ConfigError(
            f"validation.path=null: validation.subject={subject.name} learns from a file",
            remedy=f"set validation.path to {expected}",
        )
    filesystem, inner = locate(path)
    if filesystem.get_file_info(inner).type is not FileType.File:
        raise ConfigError(
            f"validation.path={shown(path)}: there is no such file",
            file=shown(path),
            remedy=f"validation.subject={subject.name} reads {expected}; put it there or set validation.path",
        )
    return filesystem, inner


def _expected(kind: Table | Images) -> str:
    if isinstance(kind, Table):
        unused = f", and {kind.columns - kind.features - 1} more" if kind.columns > kind.features + 1 else ""
        return f"a CSV file with a header, {kind.features} columns of features, then the target{unused}"
    shape = ", ".join(map(str, kind.shape))
    return (
        f"an .npz file with x_train, uint8 [N, {shape}], and y_train, whole numbers from 0 to {kind.classes - 1}, [N]"
    )


# --- splits and their normalisation ---------------------------------------------------------------------------------


def split(examples: Examples, seed: int, limit: int | None = None) -> dict[str, Examples]:
    """The parts of a data set, in an order drawn from the seed, of which `limit` examples are taken."""
    order = torch.randperm(len(examples.inputs), generator=torch.Generator().manual_seed(1_000_003 * seed))[:limit]
    train, valid = (round(len(order) * SHARES[name]) for name in ("train", "valid"))
    cut = {"train": order[:train], "valid": order[train : train + valid], "test": order[train + valid :]}
    return {name: Examples(examples.inputs[rows], examples.targets[rows]) for name, rows in cut.items()}


def _normalised_table(parts: Mapping[str, Examples]) -> Split:
    x, y = _moments(parts["train"].inputs), _moments(parts["train"].targets)
    found = {name: Examples(_scaled(part.inputs, x), _scaled(part.targets, y)) for name, part in parts.items()}
    statistics = {"mean": x[0], "deviation": x[1], "target_mean": y[0], "target_deviation": y[1]}
    return Split(found, parts["train"].targets.shape[1], {name: value.tolist() for name, value in statistics.items()})


def _normalised_images(parts: Mapping[str, Examples], images: Images) -> Split:
    channels = images.shape[2] if len(images.shape) == 3 else 1
    moments = _moments(parts["train"].inputs.reshape(-1, channels).double() / 255)
    found = {}
    for name, part in parts.items():
        pixels_NHWC = part.inputs.reshape(len(part.inputs), *images.shape[:2], channels) / 255
        scaled = _scaled(pixels_NHWC, (moments[0].float(), moments[1].float())).permute(0, 3, 1, 2)
        found[name] = Examples(scaled.flatten(1) if images.flat else scaled.contiguous(), part.targets)
    statistics = {"mean": moments[0].tolist(), "deviation": moments[1].tolist()}
    return Split(found, images.classes, statistics)


def _moments(values_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column; a column that does not vary is only shifted."""
    deviation = values_NF.std(0, correction=0)
    return values_NF.mean(0), torch.where(deviation > 0, deviation, 1.0)


def _scaled(values: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    return (values - moments[0]) / moments[1]
