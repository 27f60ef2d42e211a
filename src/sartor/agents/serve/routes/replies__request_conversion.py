"""Part of agents.serve.routes.replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from fastapi import Request

from sartor.agents.asking import Request as Question
from sartor.agents.serve.desk import USER_HEADER, desk_of, entry_of
from sartor.agents.serve.replies import Answers, Terms, open_answers
from sartor.agents.serve.running import while_there
from sartor.agents.serve.turns import choices


async def opened_for(request: Request, questions: Sequence[Question], user: str = "", count: int = 1) -> Answers:
    """The Answers to these questions, `count` each, by the rules of who asks: names, persons, times, receipts.

    user: whom the client names. Raises what `open_answers` raises, GoneError when the client goes.
    """
    desk, entry = desk_of(request), entry_of(request)
    header, visitor = request.headers.get(USER_HEADER, ""), entry.visitor
    person = desk.person(user, header)
    terms = Terms(entry, desk.shift, count, partial(desk.remember, visitor.key, person))
    own, deadline_s = desk.spoken_for(person, header, visitor), desk.limits.deadline_s
    every = [
        replace(choice, openable=visitor.agents, deadline_s=deadline_s, person=own)
        for question in questions
        for choice in choices(question, terms.per_prompt)
    ]
    return await while_there(request.receive, open_answers(desk.house.replies, every, terms))
