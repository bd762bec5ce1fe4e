import pytest
from dspy_lora.optimizers.proposers import RIGHT_ANSWER, Row, RuleProposer, gold_in_feedback, telling_words


def record(text, gold, given="other"):
    feedback = "Right." if given == gold else f"The right answer is {gold}."
    return {
        "Inputs": {"text": text},
        "Generated Outputs": {"label": given},
        "Feedback": feedback,
        "Score": given == gold,
    }


REFUNDS = [f"customer {n} wants a refund for the order" for n in range(6)]
LOGINS = [f"user {n} forgot the password of the account" for n in range(6)]
RECORDS = [record(text, "money") for text in REFUNDS] + [record(text, "access", "access") for text in LOGINS]


@pytest.mark.parametrize(
    ("feedback", "gold"),
    [
        ("The right answer is refund request.", "refund request"),
        ("Wrong. Expected: 'pump; line'\nTry again.", "pump; line"),
        ("The correct label was Dispute Resolution. You said: Other.", "Dispute Resolution"),
        ("expected answer = 42", "42"),
        ("The expected value is 4.2. You said 5.", "4.2"),
        ("The right answer is A. You said B.", "A"),
        ("The right answer is U.S. law.", "U.S. law"),
        ("The right answer is U.S. Look at the country.", "U.S"),
        ("Wrong: the correct place is 'St. Louis'. You said 'Dallas'.", "St. Louis"),
        ("The right answer is She got lost.", "She got lost"),
        ("Incorrect: expected refund, got billing.", "refund"),
        ("Incorrect: the right label is refund.", "refund"),
        ("Not right: expected refund but got billing.", "refund"),
        ("Expected: refund. got: billing", "refund"),
        ("The right answer is refund, but you said billing.", "refund"),
        ("That is incorrect: try again.", None),
        ("This trajectory got a score of 0.", None),
    ],
)
def test_the_right_answer_is_read_from_feedback(feedback, gold):
    assert gold_in_feedback(feedback) == gold


@pytest.mark.parametrize("label", ["St. Louis", "No. 5. Or 6", "a, but you said b", "U.S."])
def test_a_right_answer_that_the_record_holds_is_not_read_from_feedback(label):
    told = record("where is it", label, given=label) | {"Feedback": f"The right answer is {label}."}
    row = RuleProposer().row_of(told | {RIGHT_ANSWER: label})
    assert row == Row("where is it", label, True)


def test_words_that_tell_labels_apart_are_found_and_others_are_not():
    rows = [Row(text, "money", False) for text in REFUNDS] + [Row(text, "access", True) for text in LOGINS]
    words = telling_words(rows, threshold=1.0)
    assert {"refund", "order"} & {part for word in words["money"] for part in word.split()}
    assert {"password", "account"} & {part for word in words["access"] for part in word.split()}
    assert not set(words["money"]) & set(words["access"])


def test_rules_name_labels_and_keep_the_task():
    proposer, told = RuleProposer(), {"self": "Route the ticket."}
    written = set()
    for at in range(2, len(RECORDS)):
        written |= {*proposer(told, {"self": RECORDS[: at + 1]}, ["self"]).values()}
    assert len(written) > 1
    assert all(text.startswith("Route the ticket.\n\n") for text in written)
    final = [text for text in written if "answer money" in text and "answer access" in text]
    assert final


def test_a_new_proposal_replaces_the_rules_of_the_old_one():
    proposer = RuleProposer()
    first = proposer({"self": "Route it."}, {"self": RECORDS}, ["self"])["self"]
    second = proposer({"self": first}, {"self": RECORDS}, ["self"])["self"]
    assert second.count("Use these rules:") <= 1
    assert second.count("Answer with one of:") <= 1


def test_answers_that_are_no_labels_get_hints_on_their_form():
    records = [record(f"the pump{n} leaks oil", f"pump{n}") for n in range(8)]
    text = RuleProposer()({"self": "List the parts."}, {"self": records}, ["self"])["self"]
    assert "Copy the answer from the text" in text
    assert "at most 1 word." in text


def test_nothing_is_written_without_evidence():
    assert RuleProposer()({"self": "Do it."}, {"self": []}, ["self"]) == {}
    unknown = [{"Inputs": {"text": "x"}, "Generated Outputs": "garbage", "Feedback": "no"}]
    assert RuleProposer()({"self": "Do it."}, {"self": unknown}, ["self"]) == {}
