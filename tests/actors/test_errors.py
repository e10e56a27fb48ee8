"""Errors cross process borders and say stage, file, row and remedy."""

from __future__ import annotations

import pickle

import pytest

from actors import errors

CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.WhenceError)
]


@pytest.mark.parametrize("error_class", CLASSES)
def test_survives_pickling(error_class):
    error = error_class("text is empty", stage="tokenise", file="corpus/a.jsonl", row=0, rank=3, remedy="skip it")
    error.add_note("while reading")

    copy = pickle.loads(pickle.dumps(error))  # noqa: S301

    assert type(copy) is error_class
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert copy.__notes__ == ["while reading"]


def test_message_names_stage_file_row_and_remedy():
    error = errors.BadRecord(
        "the field 'text' is missing.",
        stage="tokenise",
        file="corpus/a.jsonl",
        row=17,
        remedy="set corpus.on_bad_record=skip",
    )

    assert str(error) == (
        "tokenise: corpus/a.jsonl, row 17: the field 'text' is missing. Remedy: set corpus.on_bad_record=skip"
    )


def test_message_leaves_out_what_is_unknown():
    assert str(errors.ShardFailed("failed 3 times")) == "failed 3 times"
    assert str(errors.NonFiniteShare("3 of 100 sequences", rank=1)) == "rank 1: 3 of 100 sequences"


def test_user_mistakes_are_value_errors():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.BadRecord, ValueError)
