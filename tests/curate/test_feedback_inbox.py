"""`inbox:DIR` as a source: what becomes a row, what does not and why, whom it trusts, and how much one key may give."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sartor.core.errors import ConfigError, SourceError
from sartor.core.lineage.revocation import revoke
from sartor.core.records import Drop, Example, Feedback, FeedbackAuthor
from sartor.core.splits import prompt_group
from sartor.core.statistics import holm_correction
from sartor.curate.pipeline import curate
from sartor.curate.sources import chunk_reader as sources_reading
from sartor.curate.sources import feedback_inbox, planner
from sartor.curate.sources.feedback_lines import FeedbackLine, merge_feedback
from sartor.curate.sources.types import InboxTerms, SourceOptions
from sartor.serving.feedback_store import FeedbackStore

DAY = "2026-11-26"


def said(
    number: int, key: str = "k1", *, day: str = DAY, question: str = "", reply: str = "a", **more: Any
) -> Feedback:
    by = FeedbackAuthor(key, more.pop("user", ""), more.pop("consent", "given"))
    asked = ({"role": "user", "content": question or f"q{number}"},)
    told = {"receipt": f"r{number}", "agent": "faq@1.0", "messages": asked, "reply": reply, **more}
    return Feedback(date=f"{day}T10:00:00Z", by=by, **told)


def read(folder: Path, strict: bool = False, **terms: Any) -> tuple[list[Example], list[Drop]]:
    source = SourceOptions(f"inbox:{folder}", inbox=InboxTerms(**terms))
    (unit,) = planner.plan_reading([source], 1 << 20).chunks
    found = list(sources_reading.read_chunk(unit, source, folder.parent / "media", strict))
    return [one for one in found if isinstance(one, Example)], [one for one in found if isinstance(one, Drop)]


def many(folder: Path, lines: list[Feedback]) -> Path:
    """As `filled`, without a sync a line."""
    inbox = folder / "inbox"
    inbox.mkdir()
    (inbox / f"feedback-{DAY}.jsonl").write_text("".join(json.dumps(line.as_json()) + "\n" for line in lines))
    return inbox


def torn(file: Path, text: str) -> None:
    with file.open("a") as stream:
        stream.write(text)


def filled(folder: Path, *lines: Feedback) -> Path:
    inbox = FeedbackStore(folder / "inbox")
    for line in lines:
        inbox.add(line)
    return inbox.path


def test_correction_becomes_the_reply_and_rating_is_kept(tmp_path: Path) -> None:
    """A corrected reply becomes the rejected one; each row has its line, licence and date."""
    folder = filled(
        tmp_path,
        said(1, correction="better"),
        said(2, rating=1.0),
        said(3, rating=-0.5),
        said(4, correction=" a ", reply="a"),
        said(5, rating=-1.0, correction='[{"on": 1}]'),
        said(6, rating=1.0, messages=(), text='[{"a raw": "text"}'),
    )
    rows, drops = read(folder)
    assert not drops
    better, good, bad, same, as_json, raw = rows
    assert (better.reply, [message.text for message in better.rejected], better.rating) == ("better", ["a"], 0.0)
    assert (good.reply, good.rating, bad.rating) == ("a", 1.0, -0.5)
    assert not same.rejected  # the correction is what was said
    assert (as_json.reply, as_json.rating, bool(as_json.rejected)) == ('[{"on": 1}]', 0.0, True)
    assert [message.text for message in raw.messages] == ['[{"a raw": "text"}', "a"]
    (origin,) = bad.origins
    assert (origin.source, origin.locator, origin.licence) == (
        f"inbox:{folder}",
        f"feedback-{DAY}.jsonl:3",
        "LicenseRef-feedback",
    )
    assert origin.date.startswith(DAY)


def test_unusable_feedback_is_dropped_with_a_reason(tmp_path: Path) -> None:
    """No drop holds words of the feedback; strict stops at the first one that no term of the source explains."""
    folder = filled(
        tmp_path,
        said(1, rating=1.0, messages=(), reply="", consent="refused"),
        said(2, correction="b", messages=(), reply=""),
        said(3, comment="hm"),
        said(4, rating=0.0),
        said(5, rating=1.0, agent="home@2.0"),
        said(6, rating=1.0, consent="assumed"),
        said(7, rating=1.0, reply=""),
        said(8, rating=1.0),
        said(8, rating=-1.0, day="2026-11-27"),
        said(9, rating=1.0),
    )
    torn(folder / f"feedback-{DAY}.jsonl", '{"schema": 2, "receipt": "secret words')
    (folder / "feedback-2026-11-28.jsonl").write_text(
        '{"a": 1}\n{"schema": 9}\n[]\n' + json.dumps({**said(1).as_json(), "rating": 9})
    )
    (folder / "notes.txt").write_text("mine")
    rows, drops = read(folder, agent="faq", consent="given")
    assert [row.origins[0].locator for row in rows] == [f"feedback-{DAY}.jsonl:9", "feedback-2026-11-27.jsonl:1"]
    assert rows[1].rating == -1.0
    assert [(drop.locator.removeprefix("feedback-"), drop.reason) for drop in drops] == [
        *(
            (f"{DAY}.jsonl:{number}", reason)
            for number, reason in (
                (1, "no_consent"),
                (2, "not_remembered"),
                (3, "nothing_to_learn"),
                (4, "nothing_to_learn"),
                (5, "other_agent"),
                (6, "no_consent"),
                (7, "empty_answer"),
                (8, "replaced"),
                (10, "torn_line"),
            )
        ),
        *(
            (f"2026-11-28.jsonl:{number}", reason)
            for number, reason in (
                (1, "newer_schema"),
                (2, "newer_schema"),
                (3, "not_feedback"),
                (4, "not_feedback"),
            )
        ),
        ("notes.txt:1", "not_feedback"),
    ]
    assert all("secret" not in drop.detail and not drop.text for drop in drops)
    with pytest.raises(SourceError, match="empty_answer"):  # the first that is no matter of the source's own terms
        read(folder, strict=True, agent="faq", consent="given")


def test_a_later_line_of_a_key_goes_on_from_the_earlier(tmp_path: Path) -> None:
    later = said(1, day="2026-11-27", correction="better", messages=(), reply="")  # the server had forgotten by then
    folder = filled(tmp_path, said(1, rating=-1.0), said(1, "k2", rating=1.0), later)
    rows, drops = read(folder)
    assert [(row.reply, row.rating) for row in rows] == [("a", 1.0), ("better", 0.0)]
    assert [message.text for message in rows[1].messages] == ["q1", "better"]
    assert [(drop.reason, drop.locator) for drop in drops] == [("replaced", f"feedback-{DAY}.jsonl:1")]
    filled(tmp_path, said(1, day="2026-11-28", rating=1.0, consent="refused", messages=(), reply=""))
    assert [drop.reason for drop in read(folder)[1]] == [
        "replaced",
        "replaced",
        "no_consent",
    ]  # consent can be taken back
    assert merge_feedback(later, said(1, rating=-1.0)) == said(1, day="2026-11-27", rating=-1.0, correction="better")


def test_conversation_is_one_group_by_its_first_prompt(tmp_path: Path) -> None:
    """An equal first prompt in another source has the same group."""
    first = {"role": "user", "content": "where?"}
    longer = (first, {"role": "assistant", "content": "here"}, {"role": "user", "content": "and then?"})
    folder = filled(
        tmp_path, said(1, rating=1.0, messages=(first,)), said(2, rating=1.0, messages=longer), said(3, rating=1.0)
    )
    one, two, other = read(folder)[0]
    assert one.group == two.group == prompt_group(one) != other.group


def test_lines_that_come_while_it_is_read_are_the_next_run_s(tmp_path: Path) -> None:
    folder = filled(tmp_path, said(1, rating=1.0))
    torn(folder / f"feedback-{DAY}.jsonl", '{"schema"')
    source = SourceOptions(f"inbox:{folder}")
    (unit,) = planner.plan_reading([source], 1 << 20).chunks
    torn(folder / f"feedback-{DAY}.jsonl", ": 2}\n")
    filled(tmp_path, said(2, rating=1.0))
    found = list(sources_reading.read_chunk(unit, source, tmp_path / "media"))
    assert [one.reason if isinstance(one, Drop) else one.rating for one in found] == [1.0, "torn_line"]
    FeedbackStore(folder).remove(lambda line: line.receipt == "r1")
    (drop,) = sources_reading.read_chunk(unit, source, tmp_path / "media")
    assert isinstance(drop, Drop) and drop.reason == "changed_file"


def test_a_dataset_of_an_inbox_is_revoked_by_its_source(tmp_path: Path) -> None:
    folder = filled(tmp_path, *(said(number, rating=1.0) for number in range(6)), said(9, comment="x"))
    out = tmp_path / "data"
    made = curate({"sources": [{"path": f"inbox:{folder}", "use": ["commercial"]}], "workers": 1}, out)
    assert made.as_json()["dropped"] == {"nothing_to_learn": 1} and made.as_json()["licences"] == [
        "LicenseRef-feedback"
    ]
    assert len(revoke(out, source=f"inbox:{folder}").examples) == 6
    assert len(revoke(out, source=f"feedback-{DAY}.jsonl").examples) == 6
    with pytest.raises(ConfigError, match="names no file"):
        read(tmp_path / "nowhere")


# --- whom it trusts

REPLIES, KEYS, EACH = 60, 5, 40


def ratings(seed: int, flips: str = "", dissent: str = "", often: float = 0.3) -> list[FeedbackLine]:
    """Keys k0..k4 rate 40 replies each of 60, and err in one of twenty; `flips` says the opposite of what is so: a fifth of
    all that is said. `dissent` honestly finds otherwise in a part of its ratings.
    """
    rng = random.Random(seed)
    is_good = [rng.random() < 0.7 for _ in range(REPLIES)]
    made = []
    for number in range(KEYS * EACH):
        key, reply = f"k{number % KEYS}", rng.randrange(REPLIES)
        errs = rng.random() < (often if key == dissent else 0.05)
        good = not is_good[reply] if key == flips else is_good[reply] != errs
        rating = 1.0 if good else -1.0
        made.append(
            FeedbackLine((0, number), f"r{number}", key, "", "faq@1.0", "given", rating, "", "x", f"reply {reply}", 0)
        )
    return made


def set_aside(lines: list[FeedbackLine]) -> list[str]:
    return [key for key, _ in feedback_inbox.distrusted_raters(feedback_inbox.rate_raters(lines, InboxTerms()))]


def test_a_key_that_flips_its_ratings_is_found_and_nobody_else() -> None:
    assert [set_aside(ratings(seed, flips="k2")) for seed in range(20)] == [["k2"]] * 20


def test_an_honest_minority_is_not_set_aside() -> None:
    assert sum(bool(set_aside(ratings(seed, dissent="k1"))) for seed in range(20)) <= 1
    assert sum(bool(set_aside(ratings(seed))) for seed in range(20)) <= 1
    both = [set_aside(ratings(seed, flips="k2", dissent="k1")) for seed in range(20)]
    assert sum("k1" in found for found in both) <= 1 and sum("k2" in found for found in both) >= 19


def test_rows_of_a_poisoned_key_are_dropped_and_name_it(tmp_path: Path) -> None:
    """All 40 rows of the key that flips its ratings are distrusted, in each run alike."""
    rng = random.Random(0)
    lines = []
    for number in range(200):
        key, reply = f"k{number % 5}", rng.randrange(30)
        rating = (1.0 if reply % 3 else -1.0) * (-1 if key == "k4" else 1)
        lines.append(said(number, key, question=f"q{reply}", rating=rating))
    folder = many(tmp_path, lines)
    rows, drops = read(folder)
    reasons = Counter(drop.reason for drop in drops)
    assert reasons == {"distrusted": 40} and len(rows) == 160
    assert all("the key k4 contradicts the rest on" in drop.detail for drop in drops)
    assert all(row.rating == (1.0 if int(row.messages[0].text[1:]) % 3 else -1.0) for row in rows)
    standings = {one.key: one for one in feedback_inbox.of_folder(folder).standings}
    assert standings["k4"].is_distrusted and standings["k4"].score < 0.1 < 0.8 < standings["k0"].score
    again = read(folder)
    assert again == (rows, drops)


def test_one_user_of_a_key_is_set_aside_without_the_others_of_it() -> None:
    rng = random.Random(0)
    lines = []
    for number in range(300):
        user, reply = f"u{number % 6}", rng.randrange(40)
        rating = (1.0 if reply % 3 else -1.0) * (-1 if user == "u5" else 1)
        lines.append(
            FeedbackLine((0, number), f"r{number}", "app", user, "faq@1", "given", rating, "", "x", f"{reply}", 0)
        )
    assert [(one.key, one.user) for one in feedback_inbox.rate_raters(lines, InboxTerms()) if one.is_distrusted] == [
        ("app", "u5")
    ]


def test_known_answers_tell_which_of_two_keys_is_wrong(tmp_path: Path) -> None:
    """Without known answers neither key is distrusted; a missing file of answers is refused."""

    def lines(agree: int) -> list[Feedback]:
        return [
            said(
                number,
                key,
                question=f"q{number}",
                reply='{"on": 1}',
                rating=1.0 if key == "k1" or number < agree else -1.0,
            )
            for number in range(20)
            for key in ("k1", "k2")
        ]

    folder = many(tmp_path, lines(0))
    assert not any(drop.reason == "distrusted" for drop in read(folder)[1])
    answers = tmp_path / "known.jsonl"
    answers.write_text(
        "".join(json.dumps({"question": f"q{number}", "answer": '{ "on":1 }'}) + "\n" for number in range(12))
    )
    drops = read(folder, known=str(answers))[1]
    assert {drop.detail.partition(" contradicts")[0] for drop in drops} == {"the key k2"} and len(drops) == 20
    answers.write_text(
        "".join(json.dumps({"question": f"q{number}", "answer": '{"on":0}'}) + "\n" for number in range(12))
    )
    drops = read(folder, known=str(answers))[1]
    assert {drop.detail.partition(" contradicts")[0] for drop in drops} == {"the key k1"}
    with pytest.raises(ConfigError, match="holds no question"):
        read(folder, known=str(tmp_path / "nothing.jsonl"))


def test_p_values_of_a_family_are_corrected_together() -> None:
    assert holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


# --- how much one key may give


@pytest.mark.parametrize(
    ("counts", "most"),
    [([60], 60), ([60, 60], 60), ([1000, *[20] * 7], 46), ([1000, 5, 5, 5, 5, 5, 5, 5], 20), ([], 0)],
)
def test_no_key_gives_more_than_its_share(counts: list[int], most: int) -> None:
    assert feedback_inbox.allowed(counts, InboxTerms()) == most


def test_rows_over_the_share_are_drawn_by_the_seed(tmp_path: Path) -> None:
    loud = [said(number, "loud", rating=1.0) for number in range(100)]
    folder = many(tmp_path, [*loud, *(said(1000 + number, f"k{number % 9}", rating=1.0) for number in range(90))])
    rows, drops = read(folder)
    assert {drop.reason for drop in drops} == {"over_share"} and len(drops) == 70  # 30 of 120
    assert "its key gives 100 rows; of 10 that speak, one may give 30" in drops[0].detail
    assert read(folder) == (rows, drops)
    assert read(folder, seed=1) != (rows, drops)
    assert not read(folder, most_fraction=1.0)[1]


@pytest.mark.parametrize("terms", [{"most_fraction": 2.0}, {"alpha": 0.0}, {"disagreement": 1.0}, {"most_rows": -1}])
def test_terms_that_cannot_be_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        InboxTerms(**terms)
