"""The domain classifier: what it learns from, what it says of text it cannot place, its files, its speed."""

import copy
import errno
import json
import math
import pickle
from pathlib import Path

import dspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_lora.detection import classifier as domain_classifier
from dspy_lora.detection.calibration import make_eager
from dspy_lora.detection.classifier import PACKAGED, DomainClassifier
from dspy_lora.detection.ngrams import LONGEST, ngrams
from dspy_lora.detection.record import RECORD_FILE
from dspy_lora.detection.softmax import Model, Row, calibration_error, fit, softmax, temperature
from dspy_lora.errors import ConfigError, DataError, PublishError

THINGS = {
    "garden": "rose tulip hedge compost seedling pruning soil lawn weed orchard".split(),
    "kitchen": "saucepan recipe oven flour whisk butter simmer garlic roast pastry".split(),
    "harbour": "anchor tide mooring sail crew cargo lighthouse quay vessel rope".split(),
}
ASIDES = "the election was close; she opened the window; a train to the north; music in the hall; two old coins".split(
    "; "
)


def sentences(words, count, seed):
    random = np.random.default_rng(seed)
    frames = [
        "how do I use the {} with a {}",
        "tell me about {} and {}",
        "my {} needs a new {}",
        "is {} better than {}?",
    ]
    return [random.choice(frames).format(*random.choice(words, 2, replace=False)) for _ in range(count)]


@pytest.fixture(scope="module")
def texts():
    return {name: sentences(words, 80, seed) for seed, (name, words) in enumerate(THINGS.items())}


@pytest.fixture(scope="module")
def classifier(texts):
    return DomainClassifier.train(texts)


@pytest.fixture(scope="module")
def wary(texts):
    return DomainClassifier.train(texts, background=[f"{aside}, number {n}" for aside in ASIDES for n in range(16)])


def accuracy(classifier, count=60):
    asked = [(name, text) for name, words in THINGS.items() for text in sentences(words, count, 99)]
    choices = classifier.choose_all([text for _, text in asked])
    return np.mean([choice.domain == name for choice, (name, _) in zip(choices, asked, strict=True)])


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_texts_are_sent_to_their_domain(classifier):
    assert accuracy(classifier) >= 0.95
    assert classifier.calibrated


def test_a_choice_says_how_sure_it_is_and_why(classifier):
    choice = classifier.choose("prune the rose and the hedge in the orchard")
    assert (choice.domain, choice.best) == ("garden", "garden")
    assert choice.runner_up in {"kitchen", "harbour"}
    assert 0.9 < choice.probability <= 1
    assert 0 < choice.margin <= choice.probability
    assert "garden" in choice.reason


def test_below_the_margin_the_base_model_answers(classifier):
    choice = classifier.choose("rose oven", threshold=0.9999)
    assert choice.domain is None
    assert choice.best in THINGS
    assert "margin" in choice.reason
    assert classifier.choose("rose hedge lawn", threshold=0).domain == "garden"


def test_background_is_a_class_of_its_own(wary):
    choice = wary.choose("she opened the window, number 40")
    assert (choice.domain, choice.best) == (None, None)
    assert choice.runner_up in THINGS
    assert accuracy(wary) >= 0.95
    assert wary.domains == tuple(THINGS)


@pytest.mark.parametrize("query", ["", "  \n", None, 7])
def test_an_empty_query_is_an_error(classifier, query):
    with pytest.raises(DataError, match="nothing to choose a domain by"):
        classifier.choose(query)


def test_the_empty_one_of_several_is_named(classifier):
    with pytest.raises(DataError, match="number 1"):
        classifier.choose_all(["rose", " "])


@pytest.mark.parametrize("query", ["?!...", "🙂🙂", "---"])
def test_a_query_without_words_is_left_to_the_base_model(classifier, query):
    choice = classifier.choose(query)
    assert (choice.domain, choice.probability) == (None, 0.0)
    assert "no words" in choice.reason
    assert set(classifier.probabilities(query).values()) == {0.0}


@pytest.mark.parametrize("query", ["今日は天気がいいですね", "Где находится вокзал?", "x" * 3, "\ud800 broken"])
def test_a_query_in_another_language_is_left_to_the_base_model(wary, query):
    assert wary.choose(query).domain is None


def test_of_a_long_query_the_beginning_decides(classifier):
    long = "the rose and the hedge. " * 400
    assert classifier.choose(long + "anchor tide sail " * 200_000).domain == "garden"
    assert classifier.choose(long[:LONGEST]).margin == classifier.choose(long + "anchor").margin


@settings(max_examples=60)
@given(st.text(min_size=1).filter(str.strip))
def test_probabilities_of_any_text_are_probabilities(wary, text):
    shares = wary.probabilities(text)
    assert set(shares) == set(THINGS)
    assert all(0 <= share <= 1 for share in shares.values())
    assert sum(shares.values()) <= 1 + 1e-5
    choice = wary.choose(text)
    assert (choice.domain is None) == (choice.best is None or choice.margin < wary.margin)


def test_several_texts_are_answered_as_one_by_one(classifier):
    asked = ["rose hedge", "oven flour", "?"]
    assert classifier.choose_all(asked) == [classifier.choose(text) for text in asked]


# -- what it learns from -----------------------------------------------------------------------------------------------


def test_few_example_queries_are_enough_but_not_calibrated(caplog):
    few = DomainClassifier.train({name: sentences(words, 9, 1) for name, words in THINGS.items()})
    assert not few.calibrated
    assert "not calibrated" in caplog.text
    assert accuracy(few) >= 0.7


def test_a_description_alone_is_enough():
    described = DomainClassifier.train({name: f"Questions about {', '.join(words)}." for name, words in THINGS.items()})
    assert accuracy(described) >= 0.9
    assert described.trained_on["garden"] == "a description"


def test_the_same_seed_gives_the_same_classifier(texts, classifier):
    again = DomainClassifier.train(texts)
    assert again.probabilities("rose oven") == classifier.probabilities("rose oven")


def test_one_domain_is_not_enough(texts):
    with pytest.raises(DataError, match=r"two domains or more.*garden"):
        DomainClassifier.train({"garden": texts["garden"]})
    with pytest.raises(DataError, match="two domains or more"):
        DomainClassifier.train({})
    assert DomainClassifier.train({"garden": texts["garden"]}, background=texts["harbour"]).domains == ("garden",)


@pytest.mark.parametrize(("given", "problem"), [([], "has no text"), ([" "], "has no text"), ([3], "not a text")])
def test_a_domain_without_text_is_named(texts, given, problem):
    with pytest.raises(DataError, match=f"'desert'.*{problem}"):
        DomainClassifier.train({**texts, "desert": given})


# -- one more domain ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True])
def test_a_domain_is_added_without_the_old_texts(wary, tmp_path, loaded):
    before = DomainClassifier.load(wary.save(tmp_path)) if loaded else wary
    words = "court verdict lawsuit attorney judge clause statute appeal plaintiff contract".split()
    more = before.add("law", sentences(words, 60, 5))
    assert more.domains == (*THINGS, "law")
    assert before.domains == tuple(THINGS)
    asked = sentences(words, 50, 6)
    assert np.mean([choice.domain == "law" for choice in more.choose_all(asked)]) >= 0.9
    assert accuracy(more) >= 0.93
    assert more.choose("she opened the window, number 41").domain is None
    assert more.trained_on["law"] == "60 texts"


def test_no_row_is_calibrated_on_after_a_class_was_trained_on_it(wary, monkeypatch):
    trained, counts, fit_one_more, calibrated = [], [], domain_classifier.fit_one_more, domain_classifier.calibrated

    def fit(model, rows, labels, seed):
        trained.extend(rows)
        return fit_one_more(model, rows, labels, seed)

    def calibrate(record, model, rows, labels):
        counts.append((len(rows), sum(row is each for row in rows for each in trained)))
        return calibrated(record, model, rows, labels)

    monkeypatch.setattr(domain_classifier, "fit_one_more", fit)
    monkeypatch.setattr(domain_classifier, "calibrated", calibrate)
    grown = wary
    for number, count in enumerate((31, 41, 12)):
        grown = grown.add(f"domain {number}", sentences([f"{number}{letter}" for letter in "abcdefgh"], count, number))
    assert [both for _, both in counts] == [0, 0, 0]
    assert all(rows >= 16 for rows, _ in counts)


def test_domains_are_added_by_description_one_after_another(classifier):
    more = classifier.add("law", "court, verdict, lawsuit, attorney, judge").add(
        "sky", "planet, comet, star, orbit, moon"
    )
    assert more.choose("the judge and the attorney in court").domain == "law"
    assert more.choose("a comet in orbit of the star").domain == "sky"
    assert accuracy(more) >= 0.93


def test_a_domain_is_added_once(classifier):
    with pytest.raises(DataError, match="'garden' is there already"):
        classifier.add("garden", ["rose"])


def test_an_unknown_domain_gets_near_names(classifier):
    with pytest.raises(ConfigError, match=r"Did you mean 'garden'"):
        classifier.check_domain("gardens")


# -- an embedder -------------------------------------------------------------------------------------------------------


def embed(texts):
    """Counts of each domain's words, and noise."""
    found = [[sum(word in text for word in words) for words in THINGS.values()] + [0.1] for text in texts]
    return np.array(found, np.float32)


def test_an_embedder_takes_the_place_of_ngrams(texts, tmp_path):
    embedder = dspy.Embedder(embed, caching=False)
    classifier = DomainClassifier.train(texts, embedder=embedder)
    assert accuracy(classifier) >= 0.95
    loaded = DomainClassifier.load(classifier.save(tmp_path), embedder=embedder)
    assert loaded.choose("rose hedge").domain == "garden"
    assert loaded.add("law", ["court"] * 3).domains == (*THINGS, "law")
    with pytest.raises(ConfigError, match="needs the embedder"):
        DomainClassifier.load(tmp_path)


def test_an_embedder_is_refused_where_none_was_trained_with(classifier, tmp_path):
    with pytest.raises(ConfigError, match="without an embedder"):
        DomainClassifier.load(classifier.save(tmp_path), embedder=dspy.Embedder(embed))


def test_an_embedder_that_gives_another_shape_is_an_error(texts):
    with pytest.raises(DataError, match="shape"):
        DomainClassifier.train(texts, embedder=lambda texts: np.zeros(3))


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_saved_classifier_says_the_same(wary, tmp_path):
    loaded = DomainClassifier.load(wary.save(tmp_path / "new" / "folder"))
    for text in ("rose hedge", "oven flour", "she opened the window", "rose oven"):
        assert loaded.choose(text).domain == wary.choose(text).domain
        assert loaded.choose(text).probability == pytest.approx(wary.choose(text).probability, abs=0.02)
    assert (loaded.margin, loaded.trained_on) == (wary.margin, wary.trained_on)
    assert sorted(path.suffix for path in (tmp_path / "new" / "folder").iterdir()) == [".json", ".npz"]


def test_a_classifier_that_cannot_be_saved_leaves_the_one_that_was_there(classifier, wary, tmp_path, monkeypatch):
    classifier.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = Path.replace

    def replace(path, target):
        if path.name == RECORD_FILE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, target)

    with monkeypatch.context() as patch, pytest.raises(PublishError, match=r"No space left .* Nothing was changed"):
        patch.setattr(Path, "replace", replace)
        wary.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "classifier_rows.npz").write_bytes(b"somebody else's")
    wary.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "classifier_rows.npz").read_bytes() == b"somebody else's"
    assert DomainClassifier.load(tmp_path).margin == wary.margin


def test_no_pickle_is_read(classifier, tmp_path):
    classifier.save(tmp_path)
    [weights] = tmp_path.glob("*.npz")
    weights.write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(ConfigError, match="are not the ones"):
        DomainClassifier.load(tmp_path)
    np.savez(weights, weights=np.array([{}], dtype=object))
    record = json.loads((tmp_path / RECORD_FILE).read_text())
    import hashlib

    record["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (tmp_path / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="holds no classifier that can be read"):
        DomainClassifier.load(tmp_path)


@pytest.mark.parametrize("damage", ["{", '{"format": 1}', '{"format": 9}', "[]"])
def test_a_damaged_record_is_an_error(classifier, tmp_path, damage):
    classifier.save(tmp_path)
    (tmp_path / RECORD_FILE).write_text(damage)
    with pytest.raises(ConfigError, match="holds no classifier that can be read"):
        DomainClassifier.load(tmp_path)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="holds no classifier"):
        DomainClassifier.load(tmp_path / "nowhere")


def test_a_disk_that_refuses_is_an_error(classifier, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match="cannot save the classifier"):
        classifier.save(tmp_path / "file")


def test_copies_are_the_same_object(classifier):
    assert copy.deepcopy(classifier) is classifier


# -- the packaged one --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "domain"),
    [
        ("This Agreement shall be governed by the laws of the State of Delaware.", "legal"),
        ("What was the percentage change in net sales from 2020 to 2021?", "financial"),
        ("Analyze the cash flow implications of this merger", "financial"),
        ("replace cracked windscreen on cab", "manufacturing"),
        ("I am looking for a two bedroom apartment in Oakland.", "real_estate"),
        ("My card was swallowed by the machine, what now?", "customer_service"),
        ("The malware writes itself to a registry run key to start at every log-on.", "specialized"),
        ("play some jazz in the living room please", None),
    ],
)
def test_the_packaged_classifier_places_plain_questions(query, domain):
    assert DomainClassifier.packaged().choose(query).domain == domain


def test_the_packaged_classifier_is_small_and_knows_all_domains():
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) <= 1.5e6
    assert len(DomainClassifier.packaged().domains) == 12


# -- its parts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.text(), st.integers(4, 20))
def test_ngrams_are_columns_each_once(text, bits):
    columns = ngrams(text, bits)
    assert np.all(np.diff(columns) > 0)
    assert np.all((columns >= 0) & (columns < 2**bits))


def test_ngrams_see_neither_case_nor_spaces_nor_which_digit():
    assert np.array_equal(ngrams("Sales  ROSE,\nby 12%", 16), ngrams("sales rose , by 93 %", 16))
    assert not np.array_equal(ngrams("dog bites man", 16), ngrams("man bites dog", 16))
    assert set(ngrams("rose", 16)) <= set(ngrams("a rose is", 16))


def test_a_word_is_hashed_by_all_its_bytes():
    words = {f"{'a' * place}b{'a' * (30 - place)}" for place in range(31)}
    assert len({tuple(ngrams(word, 24)) for word in words}) == len(words)


def test_fit_learns_what_a_column_means():
    rows = [Row(np.array([column]), np.ones(1, np.float32)) for column in (0, 1, 2)] * 20
    labels = np.array([0, 1, 2] * 20)
    model = fit(rows, labels, columns=3, classes=3, seed=0)
    assert [int(model.logits(row).argmax()) for row in rows[:3]] == [0, 1, 2]


def test_temperature_mends_overconfidence():
    random = np.random.default_rng(0)
    truth = random.normal(size=(3000, 4)).astype(np.float32)
    labels = (softmax(truth).cumsum(axis=1) < random.random((3000, 1))).sum(axis=1).clip(max=3)
    assert temperature(truth * 5, labels) == pytest.approx(5, rel=0.1)
    shares = softmax(truth * 5)
    right = shares.argmax(1) == labels
    assert calibration_error(shares.max(1), right) > 0.2
    assert calibration_error(softmax(truth).max(1), right) < 0.03


def test_calibration_error_of_a_known_case():
    assert calibration_error(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False])) == pytest.approx(0.1)


def test_softmax_of_large_logits():
    assert softmax(np.array([1000.0, 0.0], np.float32)).tolist() == [1.0, 0.0]
    assert math.isclose(float(softmax(np.zeros(7, np.float32)).sum()), 1, rel_tol=1e-6)
    assert Model(np.ones((2, 2), np.float32), np.zeros(2, np.float32)).logits(
        Row(np.array([1]), np.ones(1, np.float32))
    ).tolist() == [1.0, 1.0]


# -- few texts among many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "about", ["court, verdict, lawsuit, attorney, judge, clause, statute, appeal", ["the court, the judge"] * 5]
)
def test_a_scarce_domain_among_rich_ones_is_still_chosen(texts, about):
    mixed = DomainClassifier.train({"law": about, **texts}, sources={"garden": "a garden book"})
    assert set(mixed.domains) == {"law", *THINGS}
    assert mixed.choose("the court, the judge, the attorney").domain == "law"
    assert accuracy(mixed) >= 0.93
    assert mixed.calibrated
    assert mixed.trained_on["garden"] == "80 texts of a garden book"


def test_a_class_is_made_as_eager_as_it_may_be():
    model = Model(np.zeros((1, 2), np.float32), np.array([5.0, 0.0], np.float32))
    others = [Row(np.array([0]), np.ones(1, np.float32))] * 200
    make_eager(model, 1, others)
    assert model.bias.tolist() == [5.0, 5.0]
    make_eager(model, 1, others)
    make_eager(Model(model.weights, np.array([9.0, 0.0], np.float32)), 1, others[:99])
    assert model.bias.tolist() == [5.0, 5.0]
