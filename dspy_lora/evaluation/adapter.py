"""One adapter against its base, on the same test rows."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspy_lora.errors import ConfigError, DataError
from dspy_lora.evaluation.answers import Given, ask
from dspy_lora.evaluation.confusion import Confusion
from dspy_lora.evaluation.likelihood import Likelihoods
from dspy_lora.evaluation.overhead import ANSWER_TOKENS, TURNS, Overhead, measure_overhead
from dspy_lora.evaluation.scores import (
    Compared,
    LabelScores,
    compare_exact_match,
    compare_macro_f1,
    compare_perplexity,
    label_scores,
)
from dspy_lora.prepare.split import are_labels
from dspy_lora.training.data import render
from dspy_lora.training.rendering import Row, comparable, typed

if TYPE_CHECKING:
    import dspy

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        references: The rows' labels.
        adapter: The adapter's answers.
        base: The base model's answers.
        measures: Exact match; macro-F1 where the references are labels; perplexity where it was measured.
        labels: The per-label table, most frequent first; None where the references are texts.
        confusion: Labels by the adapter's answers; None where the references are texts.
        likelihoods: Of the reference answers; None where they were not measured.
        overhead: Speed of both; None where it was not measured.
    """

    references: tuple[str, ...]
    adapter: tuple[Given, ...]
    base: tuple[Given, ...]
    measures: tuple[Compared, ...]
    labels: tuple[LabelScores, ...] | None
    confusion: Confusion | None
    likelihoods: Likelihoods | None = None
    overhead: Overhead | None = None

    def problems(self) -> dict[str, dict[str, int]]:
        """For each system how many rows have no answer, by reason."""
        both = {"adapter": self.adapter, "base": self.base}
        return {name: dict(Counter(each.problem for each in given if each.problem)) for name, given in both.items()}


def output_field(signature: "type[dspy.Signature]") -> str:
    """The one output field of a task.

    Raises:
        ConfigError: It has several.
    """
    names = list(signature.output_fields)
    if len(names) != 1:
        raise ConfigError(
            f"the signature {signature.signature!r} has {len(names)} output fields; an adapter is evaluated on one. "
            "Evaluate a program with dspy.Evaluate and a metric of its own."
        )
    return names[0]


def references(signature: "type[dspy.Signature]", rows: Sequence[Row]) -> list[str]:
    """The rows' reference answers as text that answers are compared with.

    Raises:
        ConfigError: The signature has several output fields.
        DataError: An answer does not fit its field's type.
    """
    name = output_field(signature)
    field = signature.output_fields[name]
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(comparable(typed(name, row[name], field)))
        except DataError as exc:
            raise DataError(f"row {number}: {exc}") from exc
    return found


def evaluate_adapter(
    adapter: "dspy.LM",
    base: "dspy.LM",
    signature: "type[dspy.Signature]",
    rows: Sequence[Row],
    *,
    labelled: bool | None = None,
    turns: int = TURNS,
    answer_tokens: int = ANSWER_TOKENS,
    seed: int = 0,
) -> Evaluation:
    """Asks both and compares their answers and their speed. Perplexity is added by ``with_perplexity``.

    Args:
        adapter: The LM with the adapter, such as ``LoRALM(domain="legal")``; any ``dspy.LM`` will do.
        base: The base model alone.
        signature: The task, with one output field.
        rows: Test rows with every field of the signature.
        labelled: Whether the references are labels, so that macro-F1 and the tables make sense; None finds out
            (at least four rows a label). Texts get exact match alone.
        turns: Timed turns of each system; 0 takes no time.
        answer_tokens: Length of a timed answer.
        seed: Of the resamples.

    Raises:
        ConfigError: The signature has several output fields.
        DataError: No rows, or rows that lack a field or that DSPy cannot render.
    """
    if not rows:
        raise DataError("there are no rows to evaluate on. Give at least one.")
    output_field(signature)
    render(signature, rows)  # raises where no answer could be equal to the reference
    truth = references(signature, rows)
    ours, theirs = ask([adapter, base], signature, rows)
    evaluation = _score(truth, ours, theirs, are_labels(truth) if labelled is None else labelled, seed)
    if not turns:
        return evaluation
    fit = [row for row, given in zip(rows, ours, strict=True) if given.problem != "too long"]
    if not fit:
        logger.warning("no prompt fits the model's context, so no time was taken")
        return evaluation
    overhead = measure_overhead(adapter, base, signature, fit, answer_tokens=answer_tokens, turns=turns)
    return dataclasses.replace(evaluation, overhead=overhead)


def with_perplexity(evaluation: Evaluation, likelihoods: Likelihoods, seed: int = 0) -> Evaluation:
    """Adds the perplexity of the reference answers."""
    compared = compare_perplexity(likelihoods.adapter, likelihoods.base, likelihoods.tokens, seed)
    return dataclasses.replace(evaluation, measures=(*evaluation.measures, compared), likelihoods=likelihoods)


def _score(
    truth: Sequence[str], ours: Sequence[Given], theirs: Sequence[Given], labelled: bool, seed: int
) -> Evaluation:
    texts = [given.text for given in ours], [given.text for given in theirs]
    measures = [compare_exact_match(truth, *texts, seed)]
    if labelled:
        measures.append(compare_macro_f1(truth, *texts, seed))
    return Evaluation(
        tuple(truth),
        tuple(ours),
        tuple(theirs),
        tuple(measures),
        tuple(label_scores(truth, *texts)) if labelled else None,
        Confusion.of(truth, texts[0]) if labelled else None,
    )
