"""The error tree: every error is this package's and the standard type a caller would expect."""

import inspect
import pickle
import re

import pytest

from dspy_lora import errors

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, Exception) and cls.__module__ == errors.__name__
]


@pytest.mark.parametrize("cls", CLASSES)
def test_is_this_packages_error(cls):
    assert issubclass(cls, errors.DspyLoraError)
    assert cls.__doc__


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (errors.ConfigError, ValueError),
        (errors.UnknownDomainError, LookupError),
        (errors.AdapterError, ValueError),
        (errors.UnknownAdapterError, LookupError),
        (errors.ChangedAdapterError, ValueError),
        (errors.PublishError, OSError),
        (errors.DataError, ValueError),
        (errors.TrainingError, RuntimeError),
        (errors.MissingDependencyError, ImportError),
        (errors.EngineStartError, RuntimeError),
        (errors.EngineDiedError, RuntimeError),
    ],
)
def test_is_the_expected_standard_type(cls, expected):
    assert issubclass(cls, expected)


def test_the_tree_in_the_docstring_names_every_error():
    drawn = set(re.findall(r"\b[A-Z]\w+Error\b", errors.__doc__ or ""))
    assert {cls.__name__ for cls in CLASSES} <= drawn


@pytest.mark.parametrize("cls", CLASSES)
def test_survives_a_process_boundary(cls):
    again = pickle.loads(pickle.dumps(cls("what happened")))  # noqa: S301
    assert type(again) is cls
    assert str(again) == "what happened"


def test_near_asks_for_the_nearest_first():
    assert errors.near("leagl", ["financial", "legal"]) == "Did you mean 'legal'? Known: financial, legal."


def test_near_without_a_likely_word():
    assert errors.near("zzz", ["legal"]) == "Known: legal."
    assert errors.near("zzz", []) == "Known: none."
