from collections import Counter

from dspy_lora.training.noise import with_noisy_copies

TEXT = " ".join(f"w{number}" for number in range(100))
ROWS = [{"text": TEXT, "title": "A title", "label": "a"}, {"text": "three short words", "title": "B", "label": "b"}]


def copies_of(row, count=300):
    made, _ = with_noisy_copies([row], ["text"], count, seed=0)
    return [each["text"].split() for each in made if each["text"] != row["text"]]


def test_every_row_stays_and_gets_copies_with_its_outputs():
    made, places = with_noisy_copies(ROWS, ["text"], 3, seed=0)
    assert all(row in made for row in ROWS)
    assert [row["title"] for row in made] == [ROWS[place]["title"] for place in places]
    assert Counter((row["title"], row["label"]) for row in made) == {("A title", "a"): 4, ("B", "b"): 4}


def test_without_copies_rows_come_as_they_are():
    assert with_noisy_copies(ROWS, ["text"], 0, seed=0) == (ROWS, [0, 1])


def test_copies_have_the_text_s_own_words_and_fewer():
    for words in copies_of(ROWS[0]):
        assert not Counter(words) - Counter(TEXT.split())
        assert 40 < len(words) < 100  # cut to 60 of 100 at the hardest, of which a fifth is dropped


def test_most_copies_of_a_long_text_are_cut_at_its_ends():
    kept = [{int(word[1:]) for word in words} for words in copies_of(ROWS[0])]
    cut = [numbers for numbers in kept if max(numbers) - min(numbers) < 94]
    assert 0.5 < len(cut) / len(kept) < 0.7


def test_some_words_change_places():
    assert any(words != sorted(words, key=lambda word: int(word[1:])) for words in copies_of(ROWS[0]))


def test_a_text_never_gets_empty():
    assert all(row["text"] for row in with_noisy_copies([{"text": "one"}], ["text"], 200, seed=0)[0])


def test_the_seed_decides():
    first, again, other = (with_noisy_copies(ROWS, ["text"], 3, seed) for seed in (0, 0, 1))
    assert first == again != other
