"""What a classical classifier reaches on the rows an adapter is trained on: TF-IDF and logistic regression.

Usage:
    python examples/classical_baseline.py --data-root DIR [--set financial=tatqa_answer_type] [--domain legal]

``DIR`` holds ``manifest.json`` (a list of ``{"domain", "name", "primary", "labels"}``) and
``<domain>/<name>/{train,dev,test}.jsonl`` with rows ``{"text", "label"}``. Sets without a label count are generative
and are skipped. Needs scikit-learn.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import Pipeline, make_pipeline

from dspy_lora.errors import DataError, near
from dspy_lora.training.data import read_rows
from dspy_lora.training.rendering import comparable

INVERSE_REGULARISATION = (1.0, 10.0, 100.0)  # C of the logistic regression, chosen on the dev rows


@dataclass(frozen=True)
class Rows:
    """The texts and labels of one split, in file order."""

    texts: list[str]
    labels: list[str]


@dataclass(frozen=True)
class Splits:
    """The rows of one set."""

    train: Rows
    dev: Rows
    test: Rows

    @classmethod
    def read(cls, folder: Path, most: int | None = None) -> "Splits":
        """Reads a folder's train.jsonl, dev.jsonl and, with at most ``most`` rows, the first ones, test.jsonl."""
        train, dev, test = (read(folder / f"{split}.jsonl") for split in ("train", "dev", "test"))
        return cls(train, dev, Rows(test.texts[:most], test.labels[:most]))


@dataclass(frozen=True)
class Score:
    """Figures of one set on its test rows, as shares of one."""

    domain: str
    name: str
    exact_match: float
    macro_f1: float
    majority: float
    c: float


def read(path: Path) -> Rows:
    """Reads one split from a JSON-lines file."""
    rows = read_rows(path)
    return Rows([row["text"] for row in rows], [comparable(row["label"]) for row in rows])


def fit(train: Rows, c: float) -> Pipeline:
    """Fits word 1- and 2-gram TF-IDF and a logistic regression on the training rows."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    return make_pipeline(vectorizer, LogisticRegression(C=c, max_iter=1000)).fit(train.texts, train.labels)


def measure(domain: str, name: str, splits: Splits) -> Score:
    """Chooses C on the dev rows and scores that model, and the training rows' most frequent label, on the test rows.

    Args:
        domain: The domain.
        name: Its set.
        splits: The set's rows.

    Returns:
        The scores; macro-F1 is the mean over the labels of the test rows.
    """
    train, dev, test = splits.train, splits.dev, splits.test
    models = {c: fit(train, c) for c in INVERSE_REGULARISATION}
    c = max(models, key=lambda c: accuracy_score(dev.labels, models[c].predict(dev.texts)))
    predicted = models[c].predict(test.texts)
    [(majority, _)] = Counter(train.labels).most_common(1)
    return Score(
        domain,
        name,
        exact_match=accuracy_score(test.labels, predicted),
        macro_f1=f1_score(test.labels, predicted, average="macro", labels=sorted(set(test.labels)), zero_division=0.0),
        majority=accuracy_score(test.labels, [majority] * len(test.labels)),
        c=c,
    )


def override(word: str) -> tuple[str, str]:
    """Takes ``DOMAIN=NAME`` apart.

    Raises:
        argparse.ArgumentTypeError: It is something else.
    """
    domain, sign, name = word.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{word!r} is no DOMAIN=NAME, like legal=cuad")
    return domain, name


def chosen_sets(root: Path, domains: list[str], overrides: dict[str, str]) -> list[tuple[str, str]]:
    """Lists (domain, set name): the primary set of each domain or the one asked for, without generative sets.

    Raises:
        DataError: The manifest has no such domain or set, or only generative sets were asked for.
    """
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    for domain in (*domains, *overrides):
        known = {entry["name"] for entry in manifest if entry["domain"] == domain}
        if not known:
            raise DataError(f"no domain {domain!r} in the manifest. {near(domain, {e['domain'] for e in manifest})}")
        if domain in overrides and overrides[domain] not in known:
            raise DataError(f"no set {overrides[domain]!r} of {domain!r} in it. {near(overrides[domain], known)}")
    chosen = []
    for entry in manifest:
        domain, name = entry["domain"], entry["name"]
        wanted = name == overrides[domain] if domain in overrides else entry["primary"]
        if wanted and entry["labels"] is not None and (not domains or domain in domains):
            chosen.append((domain, name))
    if not chosen:
        raise DataError("the sets asked for have texts to produce, not labels. Name others with --domain or --set.")
    return chosen


def main() -> None:
    """Prints one table row a domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--domain", action="append", default=[], help="only this domain (may be repeated)")
    parser.add_argument(
        "--set", type=override, action="append", default=[], metavar="DOMAIN=NAME", help="a set other than the primary"
    )
    args = parser.parse_args()
    try:
        sets = chosen_sets(args.data_root, args.domain, dict(args.set))
    except DataError as exc:
        parser.error(str(exc))
    print(f"{'domain':<18} {'set':<20} {'exact match':>11} {'macro-F1':>9} {'majority':>9} {'C':>5}")
    for domain, name in sets:
        score = measure(domain, name, Splits.read(args.data_root / domain / name))
        print(
            f"{domain:<18} {name:<20} {score.exact_match:>11.3f} {score.macro_f1:>9.3f} {score.majority:>9.3f} "
            f"{score.c:>5.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
