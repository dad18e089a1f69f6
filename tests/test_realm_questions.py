"""Question sets: the same questions from every form, and one line that names the place of what is wrong."""

import json
from collections import Counter

import pytest

pytest.importorskip("transformers")

from realm_model.openqa.questions import Question, read_questions, split_by_article, write_questions

HAMLET = Question("h", "who wrote hamlet", ("William Shakespeare", "Shakespeare"), "Hamlet (play)#1")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_every_form_gives_the_same_question(tmp_path):
    record = {"id": "h", "question": HAMLET.question, "paragraph": HAMLET.document_id}
    lines = write(tmp_path / "a.jsonl", record | {"answers": list(HAMLET.answers)})
    nq = write(tmp_path / "b.jsonl", record | {"answer": list(HAMLET.answers)})
    answers = [{"text": text, "answer_start": 0} for text in (*HAMLET.answers, "Shakespeare")]
    unanswerable = {"id": "no", "question": "?", "answers": [], "is_impossible": True}
    qas = [unanswerable, {"id": "h", "question": HAMLET.question, "answers": answers}]
    paragraphs = [{"context": "-", "qas": []}, {"context": "-", "qas": qas}]
    squad = tmp_path / "c.json"
    squad.write_text(json.dumps({"data": [{"title": "Hamlet_(play)", "paragraphs": paragraphs}]}))
    write_questions([HAMLET], tmp_path / "d.jsonl")
    for path in (lines, nq, squad, tmp_path / "d.jsonl"):
        assert list(read_questions(path)) == [HAMLET]


def test_questions_without_an_id_are_numbered(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"question": "q", "answer": ["a"]} for _ in range(3)))
    assert [question.id for question in read_questions(path)] == ["0", "1", "2"]


def test_regular_expressions_are_answers_where_the_caller_says_so(tmp_path):
    path = write(tmp_path / "trec.txt", {"question": "when", "answer": [r"(July \d,? )?1776"]})
    (plain,), (regex,) = read_questions(path), read_questions(path, is_regex=True)
    assert regex.exact_match("july 4 1776, a Thursday") and not plain.exact_match("July 4 1776")
    # Anchored at the start of a prediction, anywhere in a block.
    assert not regex.exact_match("in 1776") and regex.is_answered_by(b"it was in 1776.")
    assert regex.f1("1776") is None and plain.f1("1776") == pytest.approx(2 / 4)  # one word of three


def test_a_block_answers_byte_by_byte():
    assert HAMLET.is_answered_by(b"by William Shakespeare")
    assert not HAMLET.is_answered_by(b"by william shakespeare")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answers": ["a"]', "line 2: must be JSON"),
        ('["q"]', "line 2: must be an object with question and answers"),
        ('{"question": " ", "answers": ["a"]}', "line 2: question must be a text that is not empty, got ' '"),
        ('{"question": "q"}', "line 2: answers must be a list of texts, got None"),
        ('{"question": "q", "answers": []}', r"line 2: answers must be a list of texts, got \[\]"),
        ('{"question": "q", "answers": ["a", ""]}', "line 2: an answer must be a text that is not empty"),
        ('{"question": "q", "answers": ["a"], "id": "first"}', "line 2: id 'first' comes twice"),
        (
            r'{"question": "q", "answers": ["a\ud83d"]}',
            r"line 2: answers must be Unicode, got a lone \\ud83d at 1",
        ),
        ('{"question": "q", "answers": ["("]}', r"line 2: '\(' is no regular expression"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"id": "first", "question": "q", "answers": ["a"]}}\n{line}\n')
    with pytest.raises(ValueError, match=f"questions.jsonl, {message}"):
        list(read_questions(path, is_regex="regular" in message))


def test_files_that_hold_no_question_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*nowhere.jsonl: No such file"):
        list(read_questions(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl holds no question"):
        list(read_questions(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl, line 1: must be UTF-8"):
        list(read_questions(tmp_path / "latin.jsonl"))
    (tmp_path / "squad.json").write_text('{"data": [{"title": "t"}]}')
    with pytest.raises(ValueError, match="squad.json: must be SQuAD's .*paragraphs"):
        list(read_questions(tmp_path / "squad.json"))


def test_a_split_by_article_shares_no_article():
    titles = {f"{article}#{n}": article for article in "ABCDE" for n in range(2)}
    questions = [Question(name, "q", ("a",), name) for name in titles]
    train, held_out = split_by_article(questions, titles, 3, seed=1)
    articles = [{titles[question.document_id] for question in side} for side in (train, held_out)]
    assert list(map(len, articles)) == [3, 2] and not articles[0] & articles[1]
    assert Counter(train + held_out) == Counter(questions)
    assert split_by_article(questions, titles, 3, seed=1) == (train, held_out)
    assert {titles[q.document_id] for q in split_by_article(questions, titles, None, seed=1)[0]} == articles[
        0
    ]
    with pytest.raises(ValueError, match=r"articles must be in \[1, 4\].* 5 articles, got 5"):
        split_by_article(questions, titles, 5, seed=1)
    with pytest.raises(ValueError, match="question 'x' names 'F#0'"):
        split_by_article([*questions, Question("x", "q", ("a",), "F#0")], titles, 3, seed=1)
