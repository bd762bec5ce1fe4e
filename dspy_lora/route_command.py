"""``dspy-lora route``: which adapter would answer a query; train a classifier of your own; measure one."""

import argparse
import dataclasses
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dspy_lora.config import Config, load_config
from dspy_lora.detection.classifier import Choice, DomainClassifier
from dspy_lora.detection.softmax import calibration_error
from dspy_lora.errors import ConfigError
from dspy_lora.route_growth import growth, microseconds
from dspy_lora.training.data import Row, read_rows

NONE = "none"
OTHER_QUERIES = Path("router", "ood_dev.jsonl")  # {"query", "domain"}, from sources that no domain's set uses
MANIFEST = Path("domains", "manifest.json")

# What a classifier has to reach (its bars), printed beside what it reaches.
LEAST_ACCURACY = 0.97
MOST_CALIBRATION_ERROR = 0.05
MOST_MICROSECONDS = 1000

_TIMED = 500
_FEWEST = 2  # domains of a classifier


@dataclasses.dataclass(frozen=True)
class Tally:
    """Choices for texts whose domain is known.

    Attributes:
        wanted: The domain of each text; None for a text of no domain.
        choices: What the classifier said of each.
    """

    wanted: list[str | None]
    choices: list[Choice]

    @property
    def accuracy(self) -> float:
        """Share sent to their domain; a text left to the base model counts as wrong."""
        return float(np.mean([choice.domain == want for choice, want in zip(self.choices, self.wanted, strict=True)]))

    @property
    def abstained(self) -> float:
        """Share left to the base model."""
        return float(np.mean([choice.domain is None for choice in self.choices]))

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the likeliest domain's probability."""
        right = [choice.best == want for choice, want in zip(self.choices, self.wanted, strict=True)]
        return calibration_error(np.array([choice.probability for choice in self.choices]), np.array(right))

    @property
    def strays(self) -> str:
        """Where the texts that were not sent to their domain went, the most frequent first."""
        pairs = zip(self.choices, self.wanted, strict=True)
        went = Counter(choice.domain or NONE for choice, want in pairs if choice.domain != want)
        return ", ".join(f"{name} {count}" for name, count in went.most_common(3))

    def of(self, domain: str | None) -> "Tally":
        """The part whose domain is this."""
        kept = [choice for choice, want in zip(self.choices, self.wanted, strict=True) if want == domain]
        return Tally([domain] * len(kept), kept)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``dspy-lora route``."""
    parser.add_argument("query", nargs="*", help="queries to choose an adapter for")
    parser.add_argument("--classifier", type=Path, metavar="FOLDER", help="a saved classifier (default: the packaged)")
    parser.add_argument("--threshold", type=float, help="smallest margin at which an adapter is chosen")
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="train one on the domains' rows, and save it here")
    parser.add_argument(
        "--domain", nargs="+", metavar="NAME", help="with --train: the domains to train on (default: all configured)"
    )
    parser.add_argument("--evaluate", action="store_true", help="measure it on the domains' test rows")
    parser.add_argument("--answers", type=int, metavar="ROWS", help="with --evaluate: ask so many rows a domain too")
    parser.add_argument(
        "--growth", type=int, nargs="+", metavar="DOMAINS", help="with --evaluate: the cost of so many made-up domains"
    )
    parser.add_argument("--data-root", type=Path, help="a folder that holds each domain's `data` folder")
    parser.add_argument("--config", type=Path, help="a lora_config.yaml (default: the one in the working directory)")


def run(args: argparse.Namespace) -> int:
    """Runs ``dspy-lora route``.

    Returns:
        The exit status, 0; also where a bar is missed, which the table shows.

    Raises:
        ConfigError: Nothing to do, no data folder, a domain that is not configured, a number that is not allowed, or no
            classifier where one was named.
        DataError: Rows that are missing or malformed, or an empty query.
    """
    _check(args)
    config = load_config(args.config)
    classifier = _classifier(args, config)
    for query, choice in zip(args.query, classifier.choose_all(args.query, args.threshold), strict=True):
        print(f"{choice.domain or NONE}\t{query}\t{choice.reason}")
    if args.evaluate:
        _evaluate(classifier, config, args.data_root, args.threshold)
        if args.growth:
            texts = [text for found in _test_texts(classifier, config, args.data_root).values() for text in found]
            for line in ("", *growth(texts, args.growth)):
                print(line, flush=True)
        if args.answers:
            _answers(classifier, config, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together, before anything is trained or measured."""
    if not (args.query or args.train or args.evaluate):
        raise ConfigError("give a query, --evaluate or --train FOLDER")
    if (args.train or args.evaluate) and args.data_root is None:
        raise ConfigError("--train and --evaluate need --data-root FOLDER, the folder that holds the domains' rows")
    if args.domain and not args.train:
        raise ConfigError(f"--domain {' '.join(args.domain)} says what to train on: give --train FOLDER too")
    if args.train and args.classifier:
        raise ConfigError("--train makes a classifier, and --classifier names another one: give one of them")
    if not args.evaluate and (args.answers is not None or args.growth):
        raise ConfigError("--answers and --growth say what to measure: give --evaluate too")
    if args.answers is not None and args.answers < 1:
        raise ConfigError(f"--answers {args.answers}: rows to ask of a domain are 1 or more")
    if few := [count for count in args.growth or () if count < _FEWEST]:
        raise ConfigError(f"--growth {few[0]}: a classifier tells {_FEWEST} domains or more apart")


def _classifier(args: argparse.Namespace, config: Config) -> DomainClassifier:
    if args.train is not None:
        domains: dict[str, Sequence[str] | str] = {}
        for name in args.domain or config.domains:
            domain = config.domain(name)
            # A domain without data is learnt from its task, the sentence that describes it.
            domains[name] = (
                _texts(args.data_root, domain.data, "train", domain.input_field) if domain.data else domain.task
            )
        classifier = DomainClassifier.train(domains)
        print(f"Saved {classifier!r} in {classifier.save(args.train)}.")
        return classifier
    return DomainClassifier.load(args.classifier) if args.classifier else DomainClassifier.packaged()


def _texts(root: Path, data: str, split: str, field: str = "text") -> list[str]:
    return [row[field] for row in _rows(root, data, split, (field,))]


def _rows(root: Path, data: str, split: str, fields: tuple[str, ...]) -> list[Row]:
    """The rows of a set, which lies under ``domains/`` in the data folder, or in the folder itself."""
    folder = root / "domains" if (root / "domains").is_dir() else root
    return read_rows(folder / data / f"{split}.jsonl", fields)


def _test_texts(classifier: DomainClassifier, config: Config, root: Path) -> dict[str, list[str]]:
    """The test rows of each domain that has some and that the classifier knows."""
    known = [config.domain(name) for name in config.domains if name in classifier.domains]
    found = {each.name: _texts(root, each.data, "test", each.input_field) for each in known if each.data}
    if not found:
        raise ConfigError(
            f"no configured domain with `data` is known to {classifier!r}: there is nothing to measure it on"
        )
    return found


def _evaluate(classifier: DomainClassifier, config: Config, root: Path, threshold: float | None) -> None:
    texts = _test_texts(classifier, config, root)
    home = _tally(classifier, texts, threshold)
    print("trained on")
    for name, what in classifier.trained_on.items():
        print(f"  {name}: {what}")
    _table("test rows of the domains' own sets", home, [*texts])
    if (root / MANIFEST).is_file():
        _print_other_sets(classifier, root, {domain.data for domain in config.domains.values()}, threshold)
    if (root / OTHER_QUERIES).is_file():
        rows = read_rows(root / OTHER_QUERIES, ("query", "domain"))
        wanted = [None if row["domain"] == NONE else row["domain"] for row in rows]
        other = Tally(wanted, classifier.choose_all([row["query"] for row in rows], threshold))
        _table("queries from other sources", other, sorted({want or NONE for want in wanted}))
    _print_bars(classifier, home, [text for found in texts.values() for text in found])


def _answers(classifier: DomainClassifier, config: Config, args: argparse.Namespace) -> None:
    from dspy_lora.route_answers import answers

    rows = {}
    for name in _test_texts(classifier, config, args.data_root):
        domain = config.domain(name)
        found = _rows(args.data_root, str(domain.data), "test", tuple(domain.signature().fields))
        rows[name] = random.Random(0).sample(found, min(args.answers, len(found)))
    report = answers(config, rows, classifier, args.threshold)
    print(f"\nend to end: exact match on {len(report.responses.items)} test rows of {len(rows)} domains, shuffled")
    print(report.to_text())


def _print_other_sets(classifier: DomainClassifier, root: Path, own: set[str | None], threshold: float | None) -> None:
    """The manifest's sets that are not the domains' own: other tasks of a domain."""
    print(f"\n{'other sets of the domains':<36}   rows  right  left to the base")
    for entry in json.loads((root / MANIFEST).read_text(encoding="utf-8")):
        data = f"{entry['domain']}/{entry['name']}"
        if data not in own and entry["domain"] in classifier.domains:
            tally = _tally(classifier, {entry["domain"]: _texts(root, data, "test")}, threshold)
            print(f"{data:<36} {len(tally.choices):6d} {tally.accuracy:6.3f} {tally.abstained:6.3f}  {tally.strays}")


def _tally(classifier: DomainClassifier, texts: dict[str, list[str]], threshold: float | None) -> Tally:
    wanted: list[str | None] = [name for name, found in texts.items() for _ in found]
    return Tally(wanted, classifier.choose_all([text for found in texts.values() for text in found], threshold))


def _table(title: str, tally: Tally, domains: list[str]) -> None:
    print(f"\n{title:<36}   rows  right  left to the base")
    for name in domains:
        part = tally.of(None if name == NONE else name)
        print(f"{name:<36} {len(part.choices):6d} {part.accuracy:6.3f} {part.abstained:6.3f}  {part.strays}")
    if NONE in domains:
        given = [pair for pair in zip(tally.wanted, tally.choices, strict=True) if pair[0] is not None]
        tally = Tally([want for want, _ in given], [choice for _, choice in given])
    name = "all with a domain"
    print(f"{name:<36} {len(tally.choices):6d} {tally.accuracy:6.3f} {tally.abstained:6.3f}")


def _print_bars(classifier: DomainClassifier, home: Tally, texts: list[str]) -> None:
    spent, most = microseconds(classifier, texts[:: max(1, len(texts) // _TIMED)])
    print("\non the domains' own sets       reached      bar")
    for name, value, bar, good in (
        ("accuracy", f"{home.accuracy:.4f}", f">= {LEAST_ACCURACY}", home.accuracy >= LEAST_ACCURACY),
        (
            "expected calibration error",
            f"{home.calibration_error:.4f}",
            f"<= {MOST_CALIBRATION_ERROR}",
            home.calibration_error <= MOST_CALIBRATION_ERROR,
        ),
        ("microseconds a query (median)", f"{spent:.0f}", f"<= {MOST_MICROSECONDS}", spent <= MOST_MICROSECONDS),
    ):
        print(f"{name:<30} {value:<12} {bar:<9} {'reached' if good else 'missed'}")
    print(f"99 % of the queries took less than {most:.0f} microseconds")
    print(f"margin below which a query is left to the base model: {classifier.margin}")
