import random

import pytest

from dspy_lora.seedling.work_orders import Tagger, enlarged, exchanged, items, tags

PARTS = ["pump", "hose", "seal", "drill rod", "mast light", "fan belt"]
ROWS = [
    {"text": f"{verb} {one} {place} {other}", "label": f"{one}; {other}"}
    for verb, place in (("replace", "on"), ("check", "near"), ("repair", "at"))
    for one in PARTS
    for other in PARTS
    if one != other
]


def test_tags_say_where_items_begin_and_end():
    words = "replace Mast Light on mast".split()
    assert tags(words, "mast light; mast") == ["O", "B", "I", "O", "B"]
    assert items(words, tags(words, "mast light; mast")) == ["Mast Light", "mast"]


@pytest.mark.parametrize(("label", "found"), [("pump", ["B", "O", "O"]), ("pump; pump", ["B", "O", "B"])])
def test_an_item_is_sought_behind_the_one_before(label, found):
    assert tags("pump to pump".split(), label) == found


@pytest.mark.parametrize("label", ["belt", "hose; pump", "pump hose"])
def test_an_item_that_is_not_in_the_text_is_refused(label):
    with pytest.raises(ValueError, match="is not in 'pump and hose'"):
        tags("pump and hose".split(), label)


def test_items_that_touch_stay_two_and_an_end_without_a_beginning_is_one():
    assert items(["fan", "belt", "pump"], ["B", "I", "B"]) == ["fan belt", "pump"]
    assert items(["the", "fan", "belt"], ["O", "I", "I"]) == ["fan belt"]
    assert items(["the", "end"], ["O", "O"]) == []


def test_only_items_are_exchanged():
    row, rng = {"text": "replace fan belt on mast light", "label": "fan belt; mast light"}, random.Random(0)
    texts = {exchanged(row, ["winch"], rng) for _ in range(50)}
    assert texts == {
        "replace fan belt on mast light",
        "replace winch on mast light",
        "replace fan belt on winch",
        "replace winch on winch",
    }


@pytest.fixture(scope="module")
def tagger():
    return Tagger(ROWS)


def test_the_tagger_finds_items_in_texts_it_has_not_seen(tagger):
    assert tagger.label("inspect drill rod on pump") == "drill rod; pump"
    assert tagger.label("repair") == ""


def test_labelled_rows_count_three_times_and_new_ones_once(tagger):
    known, texts = {row["text"] for row in ROWS}, ["XY123 Check SEAL near hose", "nothing"]
    rows = enlarged(ROWS, texts, known | {"check pump near pump"}, tagger)
    found = [row["text"] for row in rows]
    new = [text for text in found if text not in known]
    assert all(found.count(text) == 3 for text in known)
    assert len(set(new)) == len(new) > 10
    assert "ITEM_ID check seal near hose" in new
    assert not {"check pump near pump", "nothing"} & set(new)
    assert rows == enlarged(ROWS, texts, known | {"check pump near pump"}, tagger)
    assert rows != enlarged(ROWS, texts, known | {"check pump near pump"}, tagger, seed=1)
