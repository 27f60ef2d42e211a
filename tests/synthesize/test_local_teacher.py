"""A base as a teacher: answers of one batch are those of each alone, and obey the schema. The real base in the circle tier."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sartor
from sample_data import write_jsonl
from sartor.synthesize.generator import texts
from sartor.synthesize.local_teacher import LocalTeacher
from sartor.synthesize.teacher import TeacherQuestion

SCHEMA = json.dumps(texts("question"))


def question(text: str, schema: str = "", seed: int = 0) -> TeacherQuestion:
    return TeacherQuestion((("user", text),), seed, 24, 0.8, schema)


def test_answers_do_not_depend_on_who_asks_at_once(tiny_base: Path) -> None:
    teacher = LocalTeacher(str(tiny_base), 3)
    asked = [
        question(f"what colour is {thing}", seed=number)
        for number, thing in enumerate(("the sky", "red", "light", "on", "turn"))
    ]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(teacher.answer, asked))
    assert together == [LocalTeacher(str(tiny_base), 1).answer(one) for one in asked]
    assert all(answer.tokens_in and answer.tokens_out for answer in together)
    assert teacher.name.startswith(f"{tiny_base.name}@") and str(tiny_base.parent) not in teacher.name


def test_a_question_that_does_not_fit_is_refused_alone(tiny_base: Path) -> None:
    teacher = LocalTeacher(str(tiny_base), 1)
    assert teacher.answer(question("sky " * 2000)).finish == "refused"
    assert teacher.answer(question("sky")).finish != "refused"


def test_a_schema_is_obeyed_or_the_answer_was_cut(tiny_base: Path) -> None:
    teacher = LocalTeacher(str(tiny_base), 1)
    answer = teacher.answer(question("what colour is the sky", SCHEMA))
    assert answer.text.lstrip().startswith("{")
    if answer.finish == "stop":
        assert set(json.loads(answer.text)) == {"question"}


@pytest.mark.circle
def test_offline_end_to_end_with_the_starter(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"turn {state} the {room} light", "completion": f"{state}:{room}"}
        for state, room in (("on", "hall"), ("off", "den"))
    ]
    write_jsonl(tmp_path / "seeds.jsonl", rows)
    (tmp_path / "delivery.txt").write_text(
        "Delivery to Berlin takes two days and costs 4 euros. Returns are free for 14 days."
    )
    sources = [{"path": str(tmp_path / name), "licence": "MIT"} for name in ("seeds.jsonl", "delivery.txt")]
    ways = [{"vary": {"per_row": 3}}, {"questions": {"per_document": 2}}]
    said = {"sources": sources, "teacher": "local", "ways": ways, "max_tokens": 96}
    result = sartor.synthesize(said, tmp_path / "out")
    assert result.made >= 3 and result.made + sum(result.dropped.values()) == 8
    assert all(row.is_synthetic and "starter@" in row.origins[0].made_by for row in result.examples())
    assert result.as_json()["calls"] >= 8
