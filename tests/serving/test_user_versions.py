"""For whom a request is: `user`, the header, and for whom a key may speak. Over a scripted house."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import serving
from sartor.core.errors import ConfigError
from sartor.serving.feedback_store import Exchange, FeedbackStore, Memory
from sartor.serving.http.services import UserDirectory
from sartor.serving.receipts import digest_by
from sartor.serving.registry.user_versions import MOST_CHARACTERS, required_user_digest, user_digest
from serving import KEYS, chat

DIGEST = digest_by(b"k" * 32)
ADA = user_digest("ada", DIGEST)
SPEAKS = {
    **KEYS,
    "key-ada": replace(KEYS["key-all"], speaks_for=frozenset({ADA})),
    "key-any": replace(KEYS["key-all"], speaks_for=None),
}


def people() -> UserDirectory:
    return UserDirectory(lambda user: user_digest(user, DIGEST))


async def ask(tmp_path: Path, key: str, header: str = "", **fields: Any) -> tuple[int, str, Memory]:
    """(status, for whom the request came to the agents, what is remembered)."""
    replies, persons = serving.Replies(), people()
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    house = serving.house(replies=replies, people=persons, keys=SPEAKS if key else None)
    async with serving.client(house, serving.team(tmp_path), **headers) as client:
        sent = {"x-sartor-user": header} if header else {}
        answer = await client.post("/v1/chat/completions", json=chat(**fields), headers=sent)
        status, memory = answer.status_code, client.server.app.state.desk.memory
    return status, replies.asked[0].person if replies.asked else "", memory


@pytest.mark.parametrize(
    ("key", "header", "user", "status", "person"),
    [
        ("", "", "ada", 200, ADA),
        ("", "ada", "", 200, ADA),
        ("", "", "", 200, ""),
        ("key-all", "", "ada", 200, ""),
        ("key-all", "ada", "", 403, ""),
        ("key-ada", "", "ada", 200, ADA),
        ("key-ada", "ada", "ada", 200, ADA),
        ("key-ada", "", "ben", 200, ""),
        ("key-ada", "ben", "", 403, ""),
        ("key-any", "", "ada", 200, ADA),
        ("", "ada", "ben", 400, ""),
        ("", "", "x" * (MOST_CHARACTERS + 1), 400, ""),
    ],
)
async def test_whom_a_request_is_for(
    tmp_path: Path, key: str, header: str, user: str, status: int, person: str
) -> None:
    assert (await ask(tmp_path, key, header, **({"user": user} if user else {})))[:2] == (status, person)


async def test_forget_person_removes_their_exchanges_from_memory(tmp_path: Path) -> None:
    """Exchanges that a shared key requested for a user go as well; those of other users stay."""
    _, _, memory = await ask(tmp_path, "key-all", user="ada")
    assert memory.find("r1") is not None and memory.find("r1").person == ADA  # type: ignore[union-attr]
    memory.keep("r2", Exchange("faq@1", [], "of ben", "yes", person=user_digest("ben", DIGEST)))
    memory.forget_person(ADA)
    assert memory.find("r1") is None and memory.find("r2") is not None
    memory.forget_person(user_digest("ben", DIGEST))
    assert memory._bytes == 0


@pytest.mark.parametrize(("user", "by"), [({}, ADA), ({"user": "ada"}, "digest of the team's own key")])
async def test_feedback_on_what_a_user_asked_is_that_users(tmp_path: Path, user: dict[str, str], by: str) -> None:
    async with serving.client(serving.house(people=people()), serving.team(tmp_path)) as client:
        await client.post("/v1/chat/completions", json=chat("hello", user="ada"))
        assert (await client.post("/v1/feedback", json={"receipt": "r1", "rating": 1, **user})).status_code == 200
    (kept,) = FeedbackStore(tmp_path / "inbox").lines()
    assert (
        kept.feedback is not None
        and (kept.feedback.by.user == ADA) == (by == ADA)
        and len(kept.feedback.by.user) == 64
    )


def test_a_person_is_a_keyed_digest_and_no_name() -> None:
    assert len(ADA) == 64 and ADA != user_digest("ada", digest_by(b"l" * 32)) != user_digest("ben", DIGEST)
    assert user_digest("", DIGEST) == "" and required_user_digest("ada", DIGEST) == ADA
    for wrong in ("", "x" * (MOST_CHARACTERS + 1)):
        with pytest.raises(ConfigError, match="cannot be a user's id"):
            required_user_digest(wrong, DIGEST)
