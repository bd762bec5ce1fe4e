"""The bundled adapters on test rows, next to the base model, the majority class and a classical classifier.

Usage:
    python examples/domain_scores.py --data-root DIR [--domain legal ...] [--rows 500] [--json FILE]

``DIR`` holds ``<domain>/<set>/{train,dev,test}.jsonl`` with rows ``{"text", "label"}``: the sets that
``lora_config.yaml`` names. Every answer comes through LoRALM, all domains and the base model in one mixed batch. The
classical classifier is TF-IDF and logistic regression, trained on the rows that the adapter was trained on (see
classical_baseline.py); sets whose labels are texts to produce have none. Needs scikit-learn.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import dspy
from classical_baseline import Splits, measure
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError
from options import output_file, positive
from sklearn.metrics import accuracy_score, f1_score

from dspy_lora import LoRALM, load_config
from dspy_lora.adapters.registry import PACKAGED_ROOT
from dspy_lora.evaluation.answers import THREADS, side_by_side
from dspy_lora.training.rendering import comparable

MOST_LABELS = 200  # a set with more different labels is taken for a generative one


def program(domain: str, lm: dspy.LM) -> dspy.Predict:
    """The domain's own signature on a language model."""
    predict = dspy.Predict(load_config().domain(domain).signature())
    predict.lm = lm
    return predict


def answer(predict: dspy.Predict, text: str) -> str:
    """The label for a text; "" where DSPy cannot parse one out of the answer, or the prompt exceeds the context."""
    try:
        return comparable(predict(text=text).label)
    except (AdapterParseError, ContextWindowExceededError):
        return ""


def scores(domain: str, name: str, splits: Splits, adapter: list[str], base: list[str]) -> dict[str, Any]:
    """One row of the table, as shares of one."""
    train, test = splits.train, splits.test
    row: dict[str, Any] = {"domain": domain, "set": name, "rows": len(test.labels)}
    for system, given in (("adapter", adapter), ("base", base)):
        row[system] = accuracy_score(test.labels, given)
        row[f"{system}_f1"] = f1_score(
            test.labels, given, average="macro", labels=sorted(set(test.labels)), zero_division=0.0
        )
    if len(set(train.labels)) <= MOST_LABELS:
        classical = measure(domain, name, splits)
        row |= {"majority": classical.majority, "classical": classical.exact_match, "classical_f1": classical.macro_f1}
    else:
        [(label, _)] = Counter(train.labels).most_common(1)
        row["majority"] = accuracy_score(test.labels, [label] * len(test.labels))
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table as text."""

    def both(name: str) -> str:
        return f"{row[name]:.3f} / {row[f'{name}_f1']:.3f}" if name in row else "-"

    cells = (both("adapter"), both("base"), both("classical"))
    start = f"{row['domain']:<17} {row['set']:<18} {row['rows']:>5}"
    return f"{start} {cells[0]:>15} {cells[1]:>15} {row['majority']:>9.3f} {cells[2]:>15}"


def main() -> None:
    """Prints one table row a domain: exact match / macro-F1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--domain", nargs="+", help="only these")
    parser.add_argument("--rows", type=positive, help="at most so many test rows of each")
    parser.add_argument("--json", type=output_file, help="write the figures there too")
    args = parser.parse_args()
    config = load_config()
    folders = {name: args.data_root / str(config.domain(name).data) for name in args.domain or config.domains}
    sets = {name: Splits.read(folder, args.rows) for name, folder in folders.items()}
    base = LoRALM("seedling", registry=PACKAGED_ROOT, max_tokens=60)
    asked = []
    for name, splits in sets.items():
        for lm in (base.copy(domain=name), base):
            asked += [(program(name, lm), text) for text in splits.test.texts]
    with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        given = iter(side_by_side(answer, asked, THREADS))
    print(f"{'domain':<17} {'set':<18} {'rows':>5} {'adapter':>15} {'base':>15} {'majority':>9} {'classical':>15}")
    table = []
    for name, splits in sets.items():
        adapter, alone = ([next(given) for _ in splits.test.texts] for _ in range(2))
        table.append(scores(name, folders[name].name, splits, adapter, alone))
        print(line(table[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
