"""Which domain a text belongs to, or none: what the router and ``LoRALM(domain="auto")`` ask.

Softmax regression over hashed n-grams, or over the vectors of a ``dspy.Embedder``; calibrated on held-out rows. It
stands for itself: NumPy alone, no download, no pickle.
"""

import dataclasses
import functools
import hashlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dspy_lora.detection.calibration import FEWEST_TO_HOLD_OUT, calibrated, held_out, make_eager
from dspy_lora.detection.memory import Memory, remember
from dspy_lora.detection.ngrams import ngrams
from dspy_lora.detection.record import Record, read, write
from dspy_lora.detection.rows import rarity, rows_of, scaled, where
from dspy_lora.detection.softmax import Floats, Ints, Model, Row, fit, fit_one_more, softmax
from dspy_lora.errors import ConfigError, DataError, near

if TYPE_CHECKING:
    import dspy

PACKAGED = Path(__file__).parents[1] / "seedling" / "router"
BITS = 16  # 65,536 columns: with half as many, 0.2 points of accuracy are lost on twelve domains

_NO_DOMAIN = "no domain"
_PHRASE = re.compile(r"[.,;:!?\n]+")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the classifier says about one text.

    Attributes:
        domain: The domain; None leaves the text to the base model.
        probability: Calibrated probability of the likeliest domain, chosen or not, among all domains and "none".
        best: The likeliest domain; None where the text has no words, or looks like text of no domain.
        runner_up: The next likely domain.
        margin: Probability of the likeliest minus that of the next.
        reason: One sentence.
    """

    domain: str | None
    probability: float
    best: str | None
    runner_up: str | None
    margin: float
    reason: str


class DomainClassifier:
    """Chooses a domain for a text, or none. It never changes: ``add`` makes a new one.

    Made by ``train``, ``add``, ``load`` or ``packaged``.
    """

    def __init__(self, record: "Record", model: Model, scale: Floats, memory: "Memory", embedder: Any = None) -> None:
        self._record, self._model, self._scale, self._memory = record, model, scale, memory
        self._embedder = embedder

    # -- what it knows ---------------------------------------------------------------------------------------------

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, in the order of training."""
        return tuple(self._record.domains)

    @property
    def margin(self) -> float:
        """Below this difference between the two likeliest, a text is left to the base model."""
        return self._record.margin

    @property
    def calibrated(self) -> bool:
        """Whether rows were held out to calibrate on; without, probabilities are the raw model's."""
        return self._record.calibrated

    @property
    def trained_on(self) -> dict[str, str]:
        """What each domain was trained on, in words."""
        return dict(self._record.trained_on)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that a choice depends on, an embedder aside: equal for classifiers that choose alike."""
        record = self._record
        content = hashlib.sha256(repr((self.domains, record.bits, record.margin, record.temperature)).encode())
        for array in (*self._model, self._scale):
            content.update(np.ascontiguousarray(array).tobytes())
        return content.hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DomainClassifier":
        return self  # optimizers deep-copy programs; nothing here changes

    def __repr__(self) -> str:
        return f"DomainClassifier({', '.join(self.domains)})"

    # -- choosing --------------------------------------------------------------------------------------------------

    def choose(self, text: str, threshold: float | None = None) -> Choice:
        """Chooses the domain of one text.

        Args:
            text: A query of any length and language; only the first 4,000 characters are read.
            threshold: Smallest margin at which a domain is chosen; None takes the one of the training. 1 and above
                leaves nearly all to the base model.

        Raises:
            DataError: The text is empty.
        """
        return self.choose_all([text], threshold)[0]

    def choose_all(self, texts: Sequence[str], threshold: float | None = None) -> list[Choice]:
        """Chooses the domains of several texts; an embedder is called once.

        Raises:
            DataError: A text is empty.
        """
        least = self.margin if threshold is None else threshold
        return [self._choice(probabilities, least) for probabilities in self._probabilities(texts)]

    def probabilities(self, text: str) -> dict[str, float]:
        """Calibrated probability of each domain, likeliest first; what is missing to 1 is that of no domain."""
        shares = self._probabilities([text])[0]
        if shares is None:
            return dict.fromkeys(self.domains, 0.0)
        order = np.argsort(-shares[: len(self.domains)])
        return {self.domains[i]: float(shares[i]) for i in order}

    def _probabilities(self, texts: Sequence[str]) -> list[Floats | None]:
        """Probabilities a text, of "none" last where it is a class; None for a text without words."""
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                where = f" number {place}" if len(texts) > 1 else ""
                raise DataError(f"query{where} is {text!r}: there is nothing to choose a domain by. Give a text.")
        degree = np.float32(self._record.temperature)
        rows = rows_of(texts, self._record.bits, self._scale, self._embedder)
        return [softmax(self._model.logits(row) / degree) if len(row.columns) else None for row in rows]

    def _choice(self, shares: Floats | None, least: float) -> Choice:
        if shares is None:
            return Choice(None, 0.0, None, None, 0.0, "no words to choose a domain by: left to the base model")
        names = [*self.domains, None]
        first, second = np.argsort(-shares)[:2]
        best, probability = names[first], float(shares[first])
        margin = probability - float(shares[second])
        runner_up = names[second] or _NO_DOMAIN
        found = f"{best or _NO_DOMAIN} {probability:.2f}, next {runner_up} {shares[second]:.2f}"
        if best is None:
            return Choice(None, probability, None, names[second], margin, f"{found}: left to the base model")
        if margin < least:
            reason = f"{found}: the margin is below {least:.2f}, left to the base model"
            return Choice(None, probability, best, names[second], margin, reason)
        return Choice(best, probability, best, names[second], margin, found)

    # -- training --------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        domains: Mapping[str, Sequence[str] | str],
        *,
        background: Sequence[str] = (),
        embedder: "dspy.Embedder | None" = None,
        sources: Mapping[str, str] | None = None,
        bits: int = BITS,
        seed: int = 0,
    ) -> "DomainClassifier":
        """Trains on texts by domain.

        A tenth of a domain's texts (10 or more; at most 300) is held out, to calibrate the probabilities and to choose
        the margin: the largest, up to a half, that gives up 0.5 % of the right answers on them. A domain of fewer texts
        or of a description alone is added (see ``add``) to those of more.

        Args:
            domains: For each domain its texts (the adapter's own data, or example queries), or a description alone.
            background: Texts of no domain; with them, "none" is a class of its own.
            embedder: Turns texts into vectors; None takes hashed n-grams. It is not saved with the classifier.
            sources: Where a domain's texts come from (``"no domain"``: the background's), for ``trained_on``.
            bits: Of the hashed n-grams there are ``2**bits`` columns.
            seed: Decides the held-out rows and the order of training.

        Raises:
            DataError: Fewer than two domains (background counts as one), or a domain without text.
        """
        scarce = [name for name, given in domains.items() if isinstance(given, str) or len(given) < FEWEST_TO_HOLD_OUT]
        if scarce and len(domains) - len(scarce) + bool(background) >= 2:
            rich = {name: given for name, given in domains.items() if name not in scarce}
            grown = cls.train(rich, background=background, embedder=embedder, sources=sources, bits=bits, seed=seed)
            for name in scarce:
                grown = grown._add(name, domains[name], (sources or {}).get(name), seed)
            return grown
        named = [*domains.items(), *([(_NO_DOMAIN, background)] if background else [])]
        texts: list[str] = []
        labels: list[int] = []
        for label, (name, given) in enumerate(named):
            found = _texts(name, given)
            texts += found
            labels += [label] * len(found)
        if not labels or labels[-1] == 0:
            raise DataError(
                f"a classifier needs two domains or more to tell apart; given: {', '.join(domains) or 'none'}. Add "
                "another, or texts of no domain as background=[...]."
            )
        trained_on = {name: _described(given, (sources or {}).get(name)) for name, given in named}
        return cls._fit(list(domains), trained_on, texts, np.array(labels), embedder, bits, seed)

    @classmethod
    def _fit(
        cls,
        names: list[str],
        trained_on: dict[str, str],
        texts: list[str],
        labels: Ints,
        embedder: Any,
        bits: int,
        seed: int,
    ) -> "DomainClassifier":
        held = held_out(labels, seed)
        bits = 0 if embedder is not None else bits
        if bits:
            found = [ngrams(text, bits) for text in texts]
            scale = rarity([columns for columns, out in zip(found, held, strict=True) if not out], 2**bits)
            rows = [scaled(columns, scale) for columns in found]
        else:
            scale = np.ones(0, np.float32)
            rows = rows_of(texts, bits, scale, embedder)
        width = 2**bits if bits else len(rows[0].columns)
        classes = int(labels.max()) + 1
        model = fit(where(rows, ~held), labels[~held], width, classes, seed)
        record = Record(names, bits, width, classes > len(names), trained_on)
        memory = remember(rows, labels, held, classes)
        record = calibrated(record, model, where(rows, held), labels[held])
        return cls(record, model, scale, memory, embedder)

    def add(self, name: str, texts: Sequence[str] | str, *, seed: int = 0) -> "DomainClassifier":
        """A classifier with one more domain; the weights of the others stay as they are.

        It needs none of the earlier texts: the classifier keeps some of their rows (as numbers) for this. A domain with
        fewer than 100 texts is made as eager as it can be while it takes 1 % of the others' rows at most (where 100 of
        those are kept: with 20 domains of 100 texts, say, or 4 of 600).

        Args:
            name: The new domain.
            texts: Its texts or example queries, or a description alone.
            seed: Decides the held-out rows and the order of training.

        Raises:
            DataError: No text, or a domain of that name is there already.
        """
        return self._add(name, texts, None, seed)

    def _add(self, name: str, texts: Sequence[str] | str, source: str | None, seed: int) -> "DomainClassifier":
        if name in self.domains:
            raise DataError(f"domain {name!r} is there already. Train all of them again to change it.")
        found = _texts(name, texts)
        new = rows_of(found, self._record.bits, self._scale, self._embedder)
        # The new class stands before "none", which stays the last.
        place = len(self.domains)
        old_labels = self._memory.labels + (self._memory.labels >= place)
        held = held_out(np.zeros(len(new), np.int64), seed)
        rows = [*self._memory.rows, *new]
        labels = np.concatenate([old_labels, np.full(len(new), place)])
        out = np.concatenate([self._memory.kept_out(), held])
        model = self._with_class(place, where(rows, ~out), labels[~out], seed)
        if held.sum() < FEWEST_TO_HOLD_OUT:
            make_eager(model, place, where(rows, out & (labels != place)))
        trained_on = {**self.trained_on, name: _described(texts, source)}
        record = dataclasses.replace(self._record, domains=[*self.domains, name], trained_on=trained_on)
        record = calibrated(record, model, where(rows, out), labels[out])
        kept = np.concatenate([self._memory.held, held])
        memory = remember(rows, labels, kept, int(labels.max()) + 1)
        return DomainClassifier(record, model, self._scale, memory, self._embedder)

    def _with_class(self, place: int, rows: list[Row], labels: Ints, seed: int) -> Model:
        """The model with a class at ``place``, before the one of "none" where there is one."""
        classes = self._model.weights.shape[1]
        last = np.where(labels == place, classes, labels - (labels > place))
        grown = fit_one_more(self._model, rows, last, seed)
        order = [*range(place), classes, *range(place, classes)]
        return Model(np.ascontiguousarray(grown.weights[:, order]), grown.bias[order])

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes classifier.json and the weights beside it; weights are rounded to 8 bits.

        Args:
            folder: Made where it is missing; a classifier that is there is replaced.

        Returns:
            The folder.

        Raises:
            PublishError: The disk refused.
        """
        folder = Path(folder)
        peak = np.maximum(np.abs(self._model.weights).max(0), 1e-12) / 127
        arrays = {
            "weights": np.rint(self._model.weights / peak).astype(np.int8),
            "peak": peak.astype(np.float32),
            "bias": self._model.bias,
            "scale": self._scale.astype(np.float16),
            **self._memory.arrays(self._record.bits),
        }
        write(folder, self._record, arrays)
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, embedder: "dspy.Embedder | None" = None) -> "DomainClassifier":
        """Reads what ``save`` wrote.

        Args:
            folder: The folder.
            embedder: The one it was trained with, where it was trained with one.

        Raises:
            ConfigError: No classifier there, a damaged one, or an embedder missing or not wanted.
        """
        folder = Path(folder)
        try:
            record, arrays = read(folder)
            peak, scale = arrays["peak"], arrays["scale"].astype(np.float32)
            model = Model(arrays["weights"].astype(np.float32) * peak, arrays["bias"])
            memory = Memory.of(arrays, record.bits, scale)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as exc:
            raise ConfigError(
                f"{str(folder)!r} holds no classifier that can be read: {exc}. Save one with classifier.save(folder), "
                "or train it again."
            ) from exc
        if bool(record.bits) == (embedder is not None):
            wanted = "was trained without an embedder" if record.bits else "needs the embedder it was trained with"
            raise ConfigError(
                f"the classifier in {str(folder)!r} {wanted}: DomainClassifier.load(folder, embedder=...)."
            )
        return cls(record, model, scale, memory, embedder)

    @classmethod
    def packaged(cls) -> "DomainClassifier":
        """The classifier of the twelve configured domains that comes with the package."""
        return cls.load(PACKAGED)

    def check_domain(self, name: str) -> str:
        """Returns the name of a domain that is there.

        Raises:
            ConfigError: It is not; the message names the near ones.
        """
        if name not in self.domains:
            raise ConfigError(
                f"the classifier knows no domain {name!r}. {near(name, self.domains)} A new one needs texts or a "
                f"description: classifier.add({name!r}, [...])."
            )
        return name


def _texts(name: str, given: Sequence[str] | str) -> list[str]:
    """A domain's texts; a description becomes its phrases and itself."""
    found = [given, *_PHRASE.split(given)] if isinstance(given, str) else list(given)
    wrong = next((text for text in found if not isinstance(text, str)), None)
    if wrong is not None:
        raise DataError(f"domain {name!r}: {wrong!r} is not a text. Give a list of texts, or a description.")
    found = [text for text in found if text.strip()]
    if not found:
        raise DataError(f"domain {name!r} has no text. Give example queries, or a description of what it is about.")
    return found


def _described(given: Sequence[str] | str, source: str | None = None) -> str:
    what = "a description" if isinstance(given, str) else f"{len(given)} texts"
    return f"{what} of {source}" if source else what
