"""What adapters, prompts and context bring, alone and together, to one pipeline over several domains.

Usage:
    python examples/pipeline.py --data-root DIR [--domain legal operations ...] [--rows 60] [--seeds 3] [--json FILE]

``DIR`` holds ``<domain>/<set>/{train,test}.jsonl`` with rows ``{"text", "label"}``: the sets that ``lora_config.yaml``
names. The pipeline is not told a row's domain. Prompts are evolved for each domain on the base model by LoRAGEPA;
context is the training row most like the query, found by TF-IDF. Each seed draws other rows. Needs scikit-learn.
"""

import argparse
import functools
import random
from pathlib import Path

import dspy
from options import output_file, positive
from sklearn.feature_extraction.text import TfidfVectorizer

from dspy_lora import DomainPipeline, LoRAGEPA, LoRALM, load_config
from dspy_lora.context.assemble import ContextAssembler
from dspy_lora.context.sources import Passages
from dspy_lora.context.tokens import count_tokens_of
from dspy_lora.training.data import read_rows

TRAINED_ON = 80  # rows of a domain that prompts are evolved on

Rows = list[dspy.Example]


def read(path: Path) -> Rows:
    """The rows of a file."""
    return [dspy.Example(text=row["text"], label=row["label"]).with_inputs("text") for row in read_rows(path)]


def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):  # noqa: ANN001, ANN201
    """Whether the label is right."""
    right = pred.label == gold.label
    return dspy.Prediction(score=float(right), feedback=f"The right answer is {gold.label}.")


class Nearest:
    """The labelled rows most like a query."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.words = TfidfVectorizer(sublinear_tf=True)
        self.table = self.words.fit_transform([row.text for row in rows])

    def __call__(self, query: str) -> list[str]:
        """One of them, as a rule."""
        [best] = (self.table @ self.words.transform([query]).T).toarray().ravel().argsort()[-1:]
        return [f"A text like {self.rows[best].text!r} is {self.rows[best].label}."]


def compiled(program: dspy.Module, train: Rows, lm: LoRALM, calls: int, seed: int) -> dspy.Module:
    """The program with a prompt evolved on the base model."""
    optimizer = LoRAGEPA(metric, lm=lm, select_adapters=False, max_metric_calls=calls, seed=seed)
    found = optimizer.compile(program, trainset=train[: TRAINED_ON // 2], valset=train[TRAINED_ON // 2 : TRAINED_ON])
    found.set_lm(None)  # the route decides about the adapter
    return found


def main() -> None:
    """Prints one table a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--domain", nargs="+", default=["financial", "marketing", "real_estate", "research"])
    parser.add_argument("--rows", type=positive, default=60, help="test rows of each domain")
    parser.add_argument("--metric-calls", type=positive, default=250, help="budget of each domain's prompts")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--json", type=output_file, help="write the last seed's figures there")
    args = parser.parse_args()
    program, lm = dspy.Predict(dspy.Signature("text -> label", "Give the text's label.")), LoRALM(max_tokens=60)
    folders = {name: args.data_root / str(load_config().domain(name).data) for name in args.domain}
    for seed in range(args.seeds):
        chance = random.Random(seed)
        train, test = {}, Rows()
        for name, folder in folders.items():
            train[name] = chance.sample(rows := read(folder / "train.jsonl"), min(len(rows), 1000))
            test += chance.sample(rows := read(folder / "test.jsonl"), min(len(rows), args.rows))
        nearest = Passages(Nearest([row for rows in train.values() for row in rows]), name="rows")
        pipeline = DomainPipeline(
            args.domain,
            program,
            compiled={name: compiled(program, rows, lm, args.metric_calls, seed) for name, rows in train.items()},
            context=ContextAssembler([nearest], budget=300, count_tokens=count_tokens_of(lm)),
            make_lm=functools.partial(LoRALM, max_tokens=60),
        )
        report = pipeline.evaluate(test, metric, seed=seed)
        print(f"seed {seed}: {len(test)} rows of {', '.join(args.domain)}\n{report.to_text()}", flush=True)
        if args.json:
            report.save(args.json)


if __name__ == "__main__":
    main()
