"""Runs stateless tasks as a Ray Data pipeline: descriptors in, small tables out, in whatever order they finish.

The driver holds descriptors and one result at a time. An error of ours comes back as data: Ray Data would wrap it and
lose its class, its file and its row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data

from actors import errors
from actors.errors import WhenceError

_BLOCKS = 2048
_LOUD = ("enable_progress_bars", "print_on_execution_start")
_FIELDS = ("message", "stage", "file", "row", "rank", "remedy")
_SCHEMA = pa.schema([("result", pa.large_binary()), ("error", pa.string())])


def prepare(cluster: Any) -> None:
    """Start Ray, and let replicas go: their CPUs serve the pipeline. Does nothing without a cluster handle."""
    if cluster is not None:
        cluster.start()
        cluster.make_room()


def stream(task: Callable[[Any], pa.Table], items: Sequence[Any], cpus: int = 1) -> Iterator[pa.Table]:
    """Run `task` on every item, each on `cpus` CPUs of the cluster, and yield its tables as they come.

    Args:
        task: A function that pickles; it is run again if its worker dies, so what it writes must be idempotent.
        items: JSON-able descriptors.
        cpus: CPUs that Ray reserves for a task.

    Raises:
        WhenceError: The first that a task raised, as it raised it.
    """
    if not items:
        return
    rows = [{"item": json.dumps(item)} for item in items]
    with _quietly():
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS))
        results = dataset.map_batches(
            partial(_caught, task=task), batch_size=1, batch_format="pyarrow", num_cpus=cpus, zero_copy_batch=True
        )
        batches: Iterable[Any] = results.iter_batches(batch_format="pyarrow", batch_size=1, prefetch_batches=1)
        for batch in batches:
            for row in batch.to_pylist():
                if row["error"] is not None:
                    raise _rebuilt(row["error"])
                yield pa.ipc.open_stream(row["result"]).read_all()


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Ray Data's own progress and notices off the console, where the stage's are; its log file has them."""
    context = ray.data.DataContext.get_current()
    consoles = [
        handler
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
    levels = [handler.level for handler in consoles]
    before = {name: getattr(context, name) for name in _LOUD if hasattr(context, name)}
    for name in before:
        setattr(context, name, False)
    for handler in consoles:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)


def _caught(batch: Any, task: Callable[[Any], pa.Table]) -> Any:
    results = [_attempt(json.loads(item), task) for item in batch.column("item").to_pylist()]
    return pa.Table.from_pylist(results, schema=_SCHEMA)


def _attempt(item: Any, task: Callable[[Any], pa.Table]) -> dict[str, Any]:
    try:
        table = task(item)
    except WhenceError as error:
        fields = {name: getattr(error, name) for name in _FIELDS}
        return {"result": None, "error": json.dumps([type(error).__name__, fields])}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return {"result": sink.getvalue().to_pybytes(), "error": None}


def _rebuilt(text: str) -> WhenceError:
    name, fields = json.loads(text)
    return getattr(errors, name, WhenceError)(fields.pop("message"), **fields)
