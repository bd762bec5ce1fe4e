"""The playbook: operations that commute where they should and lose no counter, the file, edits by hand, threads."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import dspy
import hypothesis.strategies as st
import pydantic
import pytest
from hypothesis import given

from dspy_lora.context.bullets import Bullet, bullet_id
from dspy_lora.context.deltas import Add, Delta, Merge, Remove, Update, ordered
from dspy_lora.context.playbook import Playbook
from dspy_lora.context.taught import CLOSING, OPENING, told_bullets, with_playbook, without_playbook
from dspy_lora.errors import DataError, PublishError

SECTIONS, TEXTS = ("Rules", "Facts"), ("one", "two", "three", "four")
ADDS = [Add(section=section, text=text) for section in SECTIONS for text in TEXTS]
IDS = [bullet_id(add.section, add.text) for add in ADDS]

some_id = st.sampled_from(IDS)
adds = st.sampled_from(ADDS)
counts = st.builds(Update, id=some_id, helpful=st.integers(0, 5), harmful=st.integers(0, 5))
texts = st.builds(Update, id=some_id, text=st.sampled_from(TEXTS))
merges = st.builds(Merge, ids=st.tuples(some_id, some_id), text=st.just("merged"))
removes = st.builds(Remove, id=some_id)
anything = st.one_of(adds, counts, texts, merges, removes)
words = st.text(min_size=1, max_size=40).map(lambda text: " ".join(text.split())).filter(bool)


def full():
    """A playbook that has had every id that the strategies know."""
    playbook = Playbook()
    playbook.apply(ADDS)
    return playbook


def counted(playbook):
    every = [*playbook.bullets, *playbook.removed]
    return sum(b.helpful for b in every), sum(b.harmful for b in every)


def content(playbook):
    """Everything but the version and its digest."""
    return playbook.render().split("---\n", 2)[2]


# -- operations --------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(anything, max_size=4), max_size=8), st.integers(1, 60), st.integers(0, 9))
def test_no_counter_is_ever_lost(batches, budget, at):
    playbook, helpful, harmful = full(), 0, 0
    for place, batch in enumerate(batches):
        playbook.apply(batch)
        helpful += sum(delta.helpful for delta in batch if isinstance(delta, Update))
        harmful += sum(delta.harmful for delta in batch if isinstance(delta, Update))
        if place == at:
            playbook.refine()
            playbook.trim(budget, len)
        assert counted(playbook) == (helpful, harmful)
        assert all(playbook[id].section for id in IDS)


@given(st.lists(anything, max_size=10), st.randoms())
def test_inside_a_batch_the_order_never_matters(batch, rng):
    one, other, shuffled = full(), full(), list(batch)
    rng.shuffle(shuffled)
    one.apply(batch)
    other.apply(shuffled)
    assert one.render() == other.render()


@given(st.lists(st.one_of(adds, counts, merges), max_size=10), st.randoms())
def test_additions_counts_and_merges_commute_one_by_one(deltas, rng):
    one, other, shuffled = full(), full(), list(deltas)
    rng.shuffle(shuffled)
    for each in deltas:
        one.apply([each])
    for each in shuffled:
        other.apply([each])
    assert content(one) == content(other)


@given(st.lists(st.one_of(counts, texts, removes), max_size=10), st.randoms())
def test_operations_on_different_bullets_commute_one_by_one(deltas, rng):
    first_of_each = list({delta.id: delta for delta in deltas}.values())
    one, other, shuffled = full(), full(), list(first_of_each)
    rng.shuffle(shuffled)
    for each in first_of_each:
        one.apply([each])
    for each in shuffled:
        other.apply([each])
    assert content(one) == content(other)


@given(st.lists(st.lists(anything, max_size=4), max_size=6))
def test_the_file_reads_back_exactly(batches):
    playbook = full()
    for batch in batches:
        playbook.apply(batch)
    assert Playbook.parse(playbook.render()).render() == playbook.render()


@given(st.lists(st.builds(Add, section=words, text=words), max_size=6))
def test_any_text_reads_back_exactly(deltas):
    playbook = Playbook()
    playbook.apply(deltas)
    assert Playbook.parse(playbook.render()).render() == playbook.render()


def test_an_added_bullet_is_one_however_often_and_comes_back_with_its_counters():
    playbook, add = Playbook(), Add(section="Rules", text="Check\n the  units.")
    playbook.apply([add, add])
    [bullet] = playbook.bullets
    assert bullet.text == "Check the units."
    playbook.apply([Update(id=bullet.id, helpful=3)])
    playbook.apply([Remove(id=bullet.id)])
    assert playbook.bullets == []
    assert playbook.prompt() == ""
    playbook.apply([add])
    assert playbook.bullets == [Bullet(bullet.id, "Rules", "Check the units.", helpful=3)]


def test_a_merged_bullet_s_id_means_the_one_it_became():
    playbook = full()
    a, b, c = sorted(IDS[:3])
    playbook.apply([Update(id=b, helpful=2), Update(id=a, harmful=1)])
    playbook.apply([Merge(ids=(b, c), text="both")])
    playbook.apply([Merge(ids=(a, b), text="all")])
    playbook.apply([Update(id=c, helpful=1), Remove(id=b)])
    assert playbook[a] is playbook[b] is playbook[c]
    assert playbook[c] == Bullet(a, "Rules", "all", helpful=3, harmful=1)


def test_a_curator_that_merges_and_removes_the_parts_only_merges():
    playbook = full()
    a, b = sorted(IDS[:2])
    assert ordered([Remove(id=a), Remove(id=b), Merge(ids=(b, a), text="x")]) == [Merge(ids=(b, a), text="x")]
    playbook.apply([Remove(id=a), Remove(id=b), Merge(ids=(b, a), text="x")])
    assert not playbook[b].removed


def test_an_unknown_bullet_is_refused_and_nothing_of_the_batch_happens():
    playbook = full()
    before = playbook.render()
    batch = [Add(section="Rules", text="five"), Update(id=IDS[0][:-1], helpful=1)]
    with pytest.raises(DataError, match=f"UPDATE of '{IDS[0][:-1]}'.*Did you mean.*{IDS[0]}.*Nothing was changed"):
        playbook.apply(batch)
    assert playbook.render() == before
    assert [reason is None for reason in playbook.refusals(batch)] == [True, False]
    new = bullet_id("Rules", "five")
    assert playbook.refusals([batch[0], Update(id=new, helpful=1)]) == [None, None]
    with pytest.raises(DataError, match="has no bullet 'x'"):
        playbook["x"]


def test_the_version_grows_with_changes_alone():
    playbook = Playbook()
    assert playbook.apply([]) == 0
    assert playbook.apply(ADDS[:1]) == 1
    assert playbook.apply(ADDS[:1]) == 1


@pytest.mark.parametrize(
    "nonsense",
    [
        {"op": "ADD", "section": "", "text": "x"},
        {"op": "ADD", "section": "x", "text": " \n"},
        {"op": "MERGE", "ids": ["a"], "text": "x"},
        {"op": "UPDATE", "id": "a", "helpful": -1},
        {"op": "UPDATE", "id": "a", "harmful": 10**18},
        {"op": "DELETE", "id": "a"},
        {"op": "REMOVE", "id": "a", "text": "x"},
    ],
)
def test_an_operation_that_means_nothing_is_no_operation(nonsense):
    with pytest.raises(pydantic.ValidationError):
        pydantic.TypeAdapter(Delta).validate_python(nonsense)


# -- grow and refine, the budget ---------------------------------------------------------------------------------------


def test_bullets_that_say_the_same_become_one_and_others_stay():
    playbook = Playbook()
    texts = ["Check the units.", "check the units", "Check  the Units!", "Answer A1.", "Answer A2.", "\u2603", "\u2604"]
    playbook.apply([Add(section="Rules", text=text) for text in texts])
    playbook.apply([Update(id=bullet_id("Rules", "check the units"), helpful=2)])
    playbook.apply([Add(section="Facts", text="Check the units.")])
    assert playbook.refine() == 2
    assert [b.text for b in playbook.bullets] == [
        "Check the units.",
        "Answer A1.",
        "Answer A2.",
        "check the units",
        "\u2603",
        "\u2604",
    ]
    assert playbook.refine() == 0


def test_marks_that_change_what_a_rule_says_keep_bullets_apart():
    playbook = Playbook()
    for pair in (
        "If the score is < 0.5, answer A. | If the score is > 0.5, answer A.",
        "The label is C | The label is C++ | The label is C#",
        "A change of -5 % is a loss | A change of +5 % is a loss",
        "Take .5 | Take 5 | Take 5 %",
        "Keep a = b | Keep a != b | Keep a == b",
        "Split at `,`. | Split at `;`. | Split at `.`.",
    ):
        playbook.apply([Add(section="Rules", text=text) for text in pair.split(" | ")])
    assert playbook.refine() == 0
    playbook.apply([Add(section="Rules", text=text) for text in ("Answer A!", "answer 'a'.", "\u201cANSWER A\u201d")])
    assert playbook.refine() == 2


def test_an_embedder_finds_what_says_the_same_in_other_words():
    vectors = {"Be brief.": [1.0, 0.0], "Keep it short.": [0.99, 0.1], "Cite sources.": [0.0, 2.0]}
    playbook = Playbook()
    playbook.apply([Add(section="Rules", text=text) for text in vectors])
    assert playbook.refine(lambda texts: [vectors[text] for text in texts], 0.9) == 1
    assert len(playbook) == 2


def test_the_budget_evicts_in_the_stated_order():
    playbook = Playbook()
    worth = {"bad": (1, 3), "fresh": (0, 0), "fresher, and longer": (0, 0), "mixed": (4, 4), "good": (5, 0)}
    playbook.apply([Add(section="S", text=text) for text in worth])
    playbook.apply([Update(id=bullet_id("S", t), helpful=h, harmful=n) for t, (h, n) in worth.items()])
    assert playbook.trim(10_000, len) == []
    gone = playbook.trim(len("S:\n- good"), len)
    assert [bullet.text for bullet in gone] == ["bad", "fresher, and longer", "fresh", "mixed"]
    assert playbook.prompt() == "S:\n- good"
    assert {bullet.text for bullet in playbook.removed} == worth.keys() - {"good"}
    assert playbook.trim(1, len)[0].text == "good"


# -- in an instruction, in a program -----------------------------------------------------------------------------------


def test_the_prompt_has_sections_and_no_bookkeeping():
    playbook = Playbook()
    playbook.apply([Add(section="sort / Rules", text="b"), Add(section="sort / Rules", text="a"), ADDS[4]])
    assert playbook.prompt() == "Facts:\n- one\nRules:\n- a\n- b"
    assert f"- [{IDS[4]}] helpful=0 harmful=0 :: one" in playbook.listing()


@given(words, words, words)
def test_an_instruction_gets_one_playbook_and_loses_it_again(instruction, first, second):
    told = with_playbook(with_playbook(instruction, f"S:\n- {first}"), f"S:\n- {second}")
    assert told == f"{instruction}\n\n{OPENING}\nS:\n- {second}\n{CLOSING}"
    assert without_playbook(told) == with_playbook(told, "") == instruction


def test_an_instruction_s_bullets_are_read_back():
    told = with_playbook("Answer.", "Facts:\n- one\n- two: 2\nRules:\n- three:")
    assert told_bullets(told) == [("Facts", "one"), ("Facts", "two: 2"), ("Rules", "three:")]
    assert told_bullets("Answer.") == []
    for line in ("- homeless", "prose"):
        with pytest.raises(DataError, match=f"the line '{line}'.*dspy_lora.load"):
            told_bullets(with_playbook("Answer.", line))


def test_a_program_s_state_holds_it(tmp_path):
    class Program(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer, self.playbook = dspy.Predict("a -> b"), Playbook()

    program, again = Program(), Program()
    program.playbook.apply(ADDS)
    program.save(tmp_path / "program.json")
    again.load(tmp_path / "program.json")
    assert again.playbook.render() == program.playbook.render()
    assert len(program.reset_copy().playbook) == 0
    assert len(copy.deepcopy(program).playbook) == len(program.playbook) == len(ADDS)
    assert [name for name, _ in program.named_predictors()] == ["answer"]


# -- the file ----------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    playbook, file = full(), tmp_path / "playbook.md"
    playbook.save(file)
    playbook.apply([Update(id=IDS[0], helpful=1), Remove(id=IDS[1]), Merge(ids=(IDS[2], IDS[3]), text="x")])
    playbook.save(file)
    assert Playbook.load(file).render() == playbook.render() == file.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"playbook.md", ".lock"}


def test_edits_by_hand_are_taken_up(tmp_path):
    playbook, file = full(), tmp_path / "playbook.md"
    playbook.save(file)
    text = file.read_text().replace(":: one", ":: another one", 1).replace("## Rules\n", "## Rules\n\n-  Be  kind.\n")
    file.write_text(text)
    with pytest.raises(DataError, match="edited by hand"):
        playbook.save(file)
    assert file.read_text() == text
    edited = Playbook.load(file)
    assert {b.text for b in edited.bullets} == {*TEXTS, "another one", "Be kind."}
    edited.save(file)
    assert Playbook.load(file).render() == edited.render()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format: dspy-lora playbook 1", "format: 2", "begin with the lines"),
        ("version: 1", "version: soon", "begin with the lines"),
        ("version: 1", "version: 2\nversion: 3", "begin with the lines"),
        ("helpful=0", "helpful=-1", r"line \d+ is no '- \[id\] helpful=NUMBER"),
        ("helpful=0", "helpful=", "helpful=NUMBER"),
        ("helpful=0", f"helpful={'9' * 5_000}", r"line \d+ is no '- \[id\] helpful=NUMBER"),
        ("harmful=0", f"harmful={'9' * 19}", "at most 18 digits"),
        ("version: 1", f"version: {'9' * 5_000}", r"'version: NUMBER' \(at most 18 digits\)"),
        (":: one", "::", "helpful=NUMBER"),
        ("## Facts", "Facts", "line 8 stands neither under"),
        ("# Playbook\n", "", "stands neither under"),
        (f"[{IDS[0]}]", f"[{IDS[1]}]", "of an earlier line"),
        ("# Removed", "# Merged", r"is no '- \[id\] -> \[id\]'"),
    ],
)
def test_nonsense_is_an_error_that_names_the_line_and_loses_nothing(tmp_path, old, new, message):
    playbook, file = full(), tmp_path / "playbook.md"
    playbook.apply([Remove(id=IDS[7])])
    playbook.version = 1
    playbook.save(file)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    state = {"playbook": file.read_text()}
    with pytest.raises(DataError, match=message):
        Playbook.load(file)
    with pytest.raises(DataError):
        playbook.save(file)
    with pytest.raises(DataError, match=message):
        playbook.load_state(state)
    assert file.read_text() == text.replace(old, new, 1)
    assert playbook.render() == text


def added(text):
    return [Add(section="Rules", text=text)]


@pytest.mark.parametrize("path", ["playbook.md", "folder/../playbook.md", "link.md", "linked/playbook.md"])
def test_two_that_learn_into_one_file_lose_nothing_of_each_other(tmp_path, path):
    file, path = tmp_path / "playbook.md", tmp_path / path
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.md").symlink_to("playbook.md")
    (tmp_path / "linked").symlink_to(tmp_path)
    full().save(file)
    one, other = Playbook.load(file), Playbook.load(path)
    a, b, c, d = IDS[:4]
    one.apply([*added("mine"), Update(id=a, helpful=2), Merge(ids=(b, c), text="both")])
    other.apply([*added("yours"), Update(id=a, helpful=3, harmful=1), Update(id=c, helpful=1), Remove(id=d)])
    assert not one.save(file)
    assert other.save(file)
    assert Playbook.load(path).render() == other.render()
    assert {"mine", "yours", "both"} <= {bullet.text for bullet in other.bullets}
    assert (other[a].helpful, other[a].harmful) == (5, 1)
    assert other[b] is other[c]
    assert other[c].helpful == 1
    assert other[d].removed
    assert one.save(path)
    assert one.render() == other.render() == file.read_text()
    assert (tmp_path / "link.md").is_symlink()
    shared = Playbook()
    shared.share(path)
    assert shared.save(file)


def test_only_what_was_done_since_the_last_save_is_brought_in(tmp_path):
    file, elsewhere = tmp_path / "playbook.md", tmp_path / "other.md"
    full().save(file)
    one, other = Playbook.load(file), Playbook.load(file)
    for playbook in (one, other, one, copy.deepcopy(other), pickle.loads(pickle.dumps(one))):  # noqa: S301
        playbook.save(elsewhere)
        playbook.apply([Update(id=IDS[0], helpful=1)])
        playbook.save(file)
    assert Playbook.load(file)[IDS[0]].helpful == 5


def test_one_that_never_read_the_file_or_was_loaded_another_state_replaces_it_unless_it_shares_it(tmp_path):
    file, fresh, reset = tmp_path / "playbook.md", Playbook(), full()
    reset.save(file)
    full().save(file)
    reset.reset()
    for playbook in (fresh, reset, Playbook.parse(full().render())):
        assert not playbook.save(file)
        assert Playbook.load(file).render() == playbook.render()
        full().save(file)
    shared = Playbook()
    shared.share(file)
    shared.apply(added("new"))
    assert shared.save(file)
    assert {bullet.text for bullet in shared.bullets} == {*TEXTS, "new"}


def test_what_an_edit_by_hand_took_out_stays_out_of_the_other_s_learning(tmp_path):
    file = tmp_path / "playbook.md"
    full().save(file)
    one = Playbook.load(file)
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if IDS[0] not in line))
    Playbook.load(file).save(file)
    one.apply([Update(id=IDS[0], helpful=1), *added("new")])
    one.save(file)
    assert "new" in [bullet.text for bullet in one.bullets]
    with pytest.raises(DataError, match="has no bullet"):
        one[IDS[0]]


def test_what_the_disk_refuses_leaves_the_playbook_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "playbook.md"
    full().save(file)
    one, other = Playbook.load(file), Playbook.load(file)
    one.apply(added("mine"))
    one.save(file)
    other.apply(added("yours"))
    before = other.render()
    with monkeypatch.context() as patch, pytest.raises(PublishError):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        other.save(file)
    assert other.render() == before
    other.save(file)
    assert {"mine", "yours"} <= {bullet.text for bullet in Playbook.load(file).bullets}


@pytest.mark.parametrize("state", [{}, {"playbook": None}, {"plybook": ""}])
def test_a_state_without_a_playbook_is_refused(state):
    playbook = full()
    with pytest.raises(DataError, match=r"state with the text 'playbook', and this one has \["):
        playbook.load_state(state)
    assert content(playbook) == content(full())


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    playbook, file = full(), tmp_path / "playbook.md"
    file.write_text(playbook.render(), encoding="utf-8-sig")
    assert Playbook.load(file).render() == playbook.render()
    playbook.save(file)
    file.write_text(file.read_text().replace(":: one", ":: two more", 1), encoding="utf-8-sig")
    edited = Playbook.load(file)
    edited.save(file)
    assert file.read_bytes() == edited.render().encode()


@given(st.integers(0, 10_000), st.text(max_size=8))
def test_a_file_with_anything_in_it_is_read_or_refused(place, junk):
    text = full().render()
    place %= len(text)
    try:
        found = Playbook.parse(text[:place] + junk + text[place + len(junk) :])
    except DataError:
        return
    assert Playbook.parse(found.render()).render() == found.render()


def test_every_bad_line_is_counted():
    text = full().render().replace("- [", "* [")
    with pytest.raises(DataError, match=r"and 3 more\. Mend these lines"):
        Playbook.parse(text)


def test_what_the_disk_refuses_is_said(tmp_path):
    with pytest.raises(DataError, match="cannot read the playbook"):
        Playbook.load(tmp_path / "none.md")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PublishError):
        full().save(tmp_path / "file" / "playbook.md")
    (tmp_path / "bytes.md").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"bytes\.md"):
        Playbook.load(tmp_path / "bytes.md")


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy():
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_lose_nothing(busy, tmp_path):
    playbook, file = full(), tmp_path / "playbook.md"

    def work(seed):
        rng = Random(seed)
        for step in range(40):
            playbook.apply([Update(id=rng.choice(IDS), helpful=1), Add(section="New", text=f"{seed} {step}")])
            playbook.apply([Merge(ids=tuple(rng.sample(IDS, 2)), text="merged"), Remove(id=rng.choice(IDS))])
            playbook.refine()
            playbook.prompt()
            if step % 20 == 0:
                playbook.save(file)
                Playbook.load(file)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert counted(playbook) == (8 * 40, 0)
    assert sum(bullet.section == "New" for bullet in playbook.bullets) == 8 * 40
    assert playbook.version >= 8 * 40


def test_writers_of_one_file_at_once_lose_nothing(busy, tmp_path):
    file = tmp_path / "playbook.md"
    full().save(file)

    def work(writer):
        playbook = Playbook.load(file)
        for step in range(10):
            playbook.apply([Update(id=IDS[0], helpful=1), Add(section="New", text=f"{writer} {step}")])
            playbook.save(file)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    found = Playbook.load(file)
    assert found[IDS[0]].helpful == 4 * 10
    assert sum(bullet.section == "New" for bullet in found.bullets) == 4 * 10
