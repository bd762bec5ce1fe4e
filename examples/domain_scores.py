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
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import dspy
from classical_baseline import Rows, measure, read
from dspy.utils.exceptions import AdapterParseError
from sklearn.metrics import accuracy_score, f1_score

from dspy_lora import LoRALM, load_config

MOST_LABELS = 200  # a set with more different labels is taken for a generative one


def program(domain: str, lm: dspy.LM) -> dspy.Predict:
    """The domain's own signature on a language model."""
    predict = dspy.Predict(load_config().domain(domain).signature())
    predict.lm = lm
    return predict


def answer(predict: dspy.Predict, text: str) -> str:
    """The label for a text; "" where DSPy cannot parse one out of the answer."""
    try:
        return str(predict(text=text).label).strip()
    except AdapterParseError:
        return ""


def answers(asked: list[tuple[dspy.Predict, str]], threads: int = 128) -> list[str]:
    """Asks every program its text, side by side."""
    with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)), ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(copy_context().run, answer, predict, text) for predict, text in asked]
        return [each.result() for each in waiting]


def scores(domain: str, folder: Path, test: Rows, adapter: list[str], base: list[str]) -> dict[str, Any]:
    """One row of the table, as shares of one."""
    row: dict[str, Any] = {"domain": domain, "set": folder.name, "rows": len(test.labels)}
    for name, given in (("adapter", adapter), ("base", base)):
        row[name] = accuracy_score(test.labels, given)
        row[f"{name}_f1"] = f1_score(
            test.labels, given, average="macro", labels=sorted(set(test.labels)), zero_division=0.0
        )
    train = read(folder / "train.jsonl")
    if len(set(train.labels)) <= MOST_LABELS:
        classical = measure(domain, folder.name, folder, len(test.labels))
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
    parser.add_argument("--rows", type=int, help="at most so many test rows of each")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    config = load_config()
    folders = {name: args.data_root / str(config.domain(name).data) for name in args.domain or config.domains}
    tests = {name: read(folder / "test.jsonl") for name, folder in folders.items()}
    tests = {name: Rows(rows.texts[: args.rows], rows.labels[: args.rows]) for name, rows in tests.items()}
    base = LoRALM("seedling", max_tokens=60)
    asked = []
    for name, test in tests.items():
        for lm in (base.copy(domain=name), base):
            asked += [(program(name, lm), text) for text in test.texts]
    given = iter(answers(asked))
    print(f"{'domain':<17} {'set':<18} {'rows':>5} {'adapter':>15} {'base':>15} {'majority':>9} {'classical':>15}")
    table = []
    for name, test in tests.items():
        adapter, alone = ([next(given) for _ in test.texts] for _ in range(2))
        table.append(scores(name, folders[name], test, adapter, alone))
        print(line(table[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
