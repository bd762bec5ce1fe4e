"""Which domain a text belongs to, or none: what the router and ``LoRALM(domain="auto")`` ask.

Softmax regression over hashed n-grams, or over the vectors of a ``dspy.Embedder``; calibrated on held-out rows. It
stands for itself: NumPy alone, no download, no pickle.
"""

import dataclasses
import hashlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dspy_lora.adapters.disk import staging, writing
from dspy_lora.errors import ConfigError, DataError, near
from dspy_lora.ngrams import ngrams
from dspy_lora.softmax import Floats, Ints, Model, Row, fit, fit_one_more, softmax, temperature

if TYPE_CHECKING:
    import dspy

logger = logging.getLogger(__name__)

PACKAGED = Path(__file__).parent / "seedling" / "router"
RECORD_FILE = "classifier.json"
WEIGHTS_FILE = "classifier.npz"
BITS = 16  # 65,536 columns: with half as many, 0.2 points of accuracy are lost on twelve domains

_FORMAT = 1
_NO_DOMAIN = "no domain"
_HELD_OUT = 0.1
_MOST_HELD_OUT = 300
_FEWEST_TO_HOLD_OUT = 10  # texts; of fewer all are trained on
_GIVEN_UP = 0.005  # share of the right answers on held-out rows that the margin may cost
_MOST_MARGIN = 0.5  # a text that is three times as likely of one domain as of the next is always sent there
_UNCALIBRATED_MARGIN = 0.1
_TAKEN = 0.01  # share of the other domains' rows that a domain added with few texts may take
_MEMORY = 6000  # rows kept for `add`, over all domains
_MOST_REMEMBERED = 60  # of one domain
_FEWEST_REMEMBERED = 4
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

    def __init__(self, record: "_Record", model: Model, scale: Floats, memory: "_Memory", embedder: Any = None) -> None:
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
        rows = _rows(texts, self._record.bits, self._scale, self._embedder)
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
        scarce = [name for name, given in domains.items() if isinstance(given, str) or len(given) < _FEWEST_TO_HOLD_OUT]
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
        held = _held_out(labels, seed)
        bits = 0 if embedder is not None else bits
        if bits:
            found = [ngrams(text, bits) for text in texts]
            scale = _rarity([columns for columns, out in zip(found, held, strict=True) if not out], 2**bits)
            rows = [_scaled(columns, scale) for columns in found]
        else:
            scale = np.ones(0, np.float32)
            rows = _rows(texts, bits, scale, embedder)
        width = 2**bits if bits else len(rows[0].columns)
        classes = int(labels.max()) + 1
        model = fit(_where(rows, ~held), labels[~held], width, classes, seed)
        record = _Record(names, bits, width, classes > len(names), trained_on)
        memory = _remember(rows, labels, held, classes)
        record = _calibrated(record, model, _where(rows, held), labels[held])
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
        new = _rows(found, self._record.bits, self._scale, self._embedder)
        # The new class stands before "none", which stays the last.
        place = len(self.domains)
        old_labels = self._memory.labels + (self._memory.labels >= place)
        held = _held_out(np.zeros(len(new), np.int64), seed)
        rows = [*self._memory.rows, *new]
        labels = np.concatenate([old_labels, np.full(len(new), place)])
        # Every other remembered row is kept from training, to calibrate on.
        out = np.concatenate([self._memory.held & (np.arange(len(old_labels)) % 2 == 1), held])
        model = self._with_class(place, _where(rows, ~out), labels[~out], seed)
        if held.sum() < _FEWEST_TO_HOLD_OUT:
            _make_eager(model, place, _where(rows, out & (labels != place)))
        trained_on = {**self.trained_on, name: _described(texts, source)}
        record = dataclasses.replace(self._record, domains=[*self.domains, name], trained_on=trained_on)
        record = _calibrated(record, model, _where(rows, out), labels[out])
        kept = np.concatenate([self._memory.held, held])
        memory = _remember(rows, labels, kept, int(labels.max()) + 1)
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
        """Writes classifier.json and classifier.npz; weights are rounded to 8 bits.

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
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        record = {"format": _FORMAT, **dataclasses.asdict(self._record)}
        record["sha256"] = hashlib.sha256(content.getvalue()).hexdigest()
        with writing("save the classifier", folder), staging(folder) as hidden:
            (hidden / WEIGHTS_FILE).write_bytes(content.getvalue())
            (hidden / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            for name in (WEIGHTS_FILE, RECORD_FILE):
                (hidden / name).replace(folder / name)
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
            record, arrays = _read(folder)
            peak, scale = arrays["peak"], arrays["scale"].astype(np.float32)
            model = Model(arrays["weights"].astype(np.float32) * peak, arrays["bias"])
            memory = _Memory.of(arrays, record.bits, scale)
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


@dataclasses.dataclass(frozen=True)
class _Record:
    """What classifier.json says; the defaults are those before calibration."""

    domains: list[str]
    bits: int  # 0: vectors of an embedder
    width: int
    background: bool
    trained_on: dict[str, str]
    temperature: float = 1.0
    margin: float = _UNCALIBRATED_MARGIN
    calibrated: bool = False


@dataclasses.dataclass(frozen=True)
class _Memory:
    """Some rows of every class, from which a later domain learns what it is not.

    Attributes:
        rows: The rows, as trained on.
        labels: Their classes.
        held: Which of them no weight was trained on.
    """

    rows: list[Row]
    labels: Ints
    held: NDArray[np.bool_]

    def arrays(self, bits: int) -> dict[str, NDArray[Any]]:
        """As arrays: of n-grams the columns alone (the rest follows), of vectors the values."""
        kept: dict[str, NDArray[Any]] = {"labels": self.labels.astype(np.int32), "held": self.held}
        if bits:
            joined = np.concatenate([row.columns for row in self.rows])
            lengths = np.array([len(row.columns) for row in self.rows], np.int32)
            return kept | {"lengths": lengths, "columns": joined.astype(np.uint16 if bits <= 16 else np.uint32)}
        return kept | {"vectors": np.stack([row.values for row in self.rows]).astype(np.float16)}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]], bits: int, scale: Floats) -> "_Memory":
        """Reads ``arrays``."""
        if bits:
            ends = np.cumsum(arrays["lengths"])[:-1]
            rows = [_scaled(part, scale) for part in np.split(arrays["columns"].astype(np.int64), ends)]
        else:
            rows = [_dense_row(vector) for vector in arrays["vectors"].astype(np.float32)]
        return cls(rows, arrays["labels"].astype(np.int64), arrays["held"])


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


def _rows(texts: Sequence[str], bits: int, scale: Floats, embedder: Any) -> list[Row]:
    if bits:
        return [_scaled(ngrams(text, bits), scale) for text in texts]
    vectors = np.asarray(embedder(list(texts)), np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise DataError(f"the embedder gave an array of shape {vectors.shape} for {len(texts)} texts.")
    return [_dense_row(vector) for vector in vectors]


def _scaled(columns: Ints, scale: Floats) -> Row:
    """A row of length 1 in which a rare n-gram weighs more."""
    values = scale[columns]
    return Row(columns, values / max(float(np.sqrt(values @ values)), 1e-9))


def _dense_row(vector: Floats) -> Row:
    return Row(np.arange(len(vector)), vector / max(float(np.linalg.norm(vector)), 1e-9))


def _rarity(found: list[Ints], width: int) -> Floats:
    """Inverse document frequency, log((1 + texts) / (1 + texts with it)), a column."""
    counts = np.bincount(np.concatenate(found), minlength=width)
    return np.log((1 + len(found)) / (1 + counts)).astype(np.float16).astype(np.float32)  # as it is saved


def _held_out(labels: Ints, seed: int) -> NDArray[np.bool_]:
    """A tenth of each class that has rows enough."""
    random = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if len(places) >= _FEWEST_TO_HOLD_OUT:
            count = min(_MOST_HELD_OUT, max(1, round(len(places) * _HELD_OUT)))
            held[random.choice(places, count, replace=False)] = True
    return held


def _where(rows: Sequence[Row], chosen: NDArray[np.bool_]) -> list[Row]:
    return [rows[i] for i in np.flatnonzero(chosen)]


def _make_eager(model: Model, place: int, others: list[Row]) -> None:
    """Raises the bias of a class until it takes a hundredth of rows that are not its own, and were not trained on."""
    if len(others) < 1 / _TAKEN:
        return  # of so few rows one is more than may be taken
    logits = np.stack([model.logits(row) for row in others])
    lead = np.delete(logits, place, axis=1).max(axis=1) - logits[:, place]
    model.bias[place] += max(0.0, float(np.quantile(lead, _TAKEN)))


def _remember(rows: list[Row], labels: Ints, held: NDArray[np.bool_], classes: int) -> _Memory:
    """Keeps some rows of each class, held-out ones first."""
    most = max(_FEWEST_REMEMBERED, min(_MOST_REMEMBERED, _MEMORY // classes))
    order = np.argsort(~held, kind="stable")
    by_class = [order[labels[order] == label][:most] for label in range(classes)]
    kept = np.concatenate(by_class)
    return _Memory([rows[i] for i in kept], labels[kept], held[kept])


def _calibrated(record: _Record, model: Model, rows: list[Row], labels: Ints) -> _Record:
    """Sets temperature and margin by rows that were not trained on, where there are any."""
    inside = labels < len(record.domains)
    if not inside.any():
        logger.warning("no domain has %d texts to hold some out: probabilities are not calibrated", _FEWEST_TO_HOLD_OUT)
        return record
    logits = np.stack([model.logits(row) for row in rows])
    degree = temperature(logits, labels)
    shares = softmax(logits / np.float32(degree))
    top = np.sort(shares, axis=1)
    right = inside & (shares.argmax(1) == labels)
    margins = (top[:, -1] - top[:, -2])[right]
    margin = min(_MOST_MARGIN, float(np.quantile(margins, _GIVEN_UP))) if len(margins) else _UNCALIBRATED_MARGIN
    return dataclasses.replace(record, temperature=degree, margin=round(margin, 4), calibrated=True)


def _read(folder: Path) -> tuple[_Record, dict[str, NDArray[Any]]]:
    """The record and the arrays, checked against each other."""
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    if record.pop("format") != _FORMAT:
        raise ValueError(f"{RECORD_FILE} is of another format than {_FORMAT}")
    content = (folder / WEIGHTS_FILE).read_bytes()
    if hashlib.sha256(content).hexdigest() != record.pop("sha256"):
        raise ValueError(f"{WEIGHTS_FILE} is not the one that {RECORD_FILE} was written with")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = dict(file)
    found = _Record(**record)
    shape = (found.width, len(found.domains) + found.background)
    if arrays["weights"].shape != shape or arrays["bias"].shape != shape[1:]:
        raise ValueError(f"weights of shape {arrays['weights'].shape} where {shape} is needed")
    return found, arrays
