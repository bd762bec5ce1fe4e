"""What a query and a training cost the domain classifier as the number of domains grows.

Usage:
    python examples/router_cost.py --texts FILE.jsonl [--domains 12 100 1000]

``FILE`` holds rows with a ``text``. The domains are made up: ten of the texts each, so no choice means anything.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from dspy_lora import DomainClassifier

TEXTS = 10  # of a domain
QUERIES = 500


def main() -> None:
    """Prints one line a number of domains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--domains", type=int, nargs="+", default=[12, 100, 1000])
    args = parser.parse_args()
    rows = args.texts.read_text(encoding="utf-8").splitlines()
    texts, chance = [json.loads(row)["text"] for row in rows], random.Random(0)
    print(f"{'domains':>7} {'training, s':>12} {'a query, microseconds (median)':>31}")
    for count in args.domains:
        began = time.perf_counter()
        classifier = DomainClassifier.train({f"domain {i}": chance.choices(texts, k=TEXTS) for i in range(count)})
        training, times = time.perf_counter() - began, []
        for text in chance.choices(texts, k=QUERIES):
            began = time.perf_counter()
            classifier.choose(text)
            times.append((time.perf_counter() - began) * 1e6)
        print(f"{count:>7} {training:>12.1f} {statistics.median(times):>31.0f}", flush=True)


if __name__ == "__main__":
    main()
