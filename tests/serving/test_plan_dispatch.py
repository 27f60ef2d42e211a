from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import serving
from dispatch_fakes import FakeReceipts
from plan_fakes import FakeReplies, ask, asked, opened, planned, told
from sartor.core.errors import (
    BudgetError,
    BusyError,
    ConfigError,
    DeadlineError,
    KeyRefusedError,
    ModelError,
    RequestError,
    UnavailableError,
    UnknownAgentError,
)
from sartor.inference.engine import ReplyDone, ReplyFailed
from sartor.serving.plan_options import ChainPlan, Critic, DividedPlan, Json, ParallelPlan, digest
from sartor.serving.plans.step_messages import DraftFinding, PlanStepInput, read_verdict
from sartor.serving.team_config import load

ROOMS = {"type": "object", "properties": {"room": {"enum": ["hall", "attic"]}}, "required": ["room"]}
CHECKED: dict[str, Any] = {
    "name": "checked",
    "kind": "sequence",
    "steps": "home",
    "check": ["json", {"json": {"schema": ROOMS}}],
    "mend": {"agent": "fixer", "times": 3},
}


def test_load_reads_plans_with_shorthands_and_schemas(tmp_path: Path) -> None:
    """A sequence becomes a ChainPlan, parallel a ParallelPlan; the schema is read from its file."""
    (tmp_path / "rooms.json").write_text(json.dumps(ROOMS))
    (tmp_path / "law.txt").write_text("a railing is 1.1 m high")
    (tmp_path / "team.yaml").write_text(
        """
base: starter
agents: [{name: home, release: r}]
plans:
  - {name: checked, kind: sequence, steps: home, check: [{json: {schema: rooms.json}}, {agent: critic}], mend: home}
  - {name: voted, parallel: {}, kind: parallel, members: [home, base]}
""".replace("parallel: {}, ", "")
    )
    made = load(tmp_path / "team.yaml").plans
    assert isinstance(made[0], ChainPlan) and isinstance(made[1], ParallelPlan)
    assert made[0].check[0] == Json(schema=ROOMS) and isinstance(made[0].check[1], Critic)
    assert made[0].mend and (made[0].mend.agent, made[0].mend.times) == ("home", 1)
    assert made[1].budget.tokens == 8192


@pytest.mark.parametrize(
    ("plans", "problem", "remedy"),
    [
        ([{**CHECKED, "name": "home"}], "'home', which another has", "name: home-plan"),
        ([{**CHECKED, "name": "auto"}], "'auto', which another has", "name: auto-plan"),
        ([CHECKED, CHECKED], "'checked', which another has", "name: checked-plan"),
        ([{**CHECKED, "name": "A b"}], "cannot be a plan's name", "small letters"),
        (
            [{**CHECKED, "steps": "checked"}],
            "comes back to itself: checked -> checked",
            "name an agent instead of 'checked'",
        ),
        (
            [{**CHECKED, "steps": "b"}, {**CHECKED, "name": "b", "mend": "checked"}],
            "checked -> b -> checked",
            "in the plan 'b'",
        ),
        ([CHECKED, {**CHECKED, "name": "outer", "steps": "checked"}], "plans 2 deep", "depth: 2"),
        ([{"name": "p", "kind": "sequence", "steps": "home", "mend": "home"}], "no check", "check: [json]"),
        (
            [{"name": "p", "kind": "parallel", "members": ["home"]}],
            "members names 1; at least 2",
            "members: [base, base]",
        ),
        ([{"name": "p", "kind": "sequence", "steps": []}], "steps names 0", "steps: [base]"),
        ([{**CHECKED, "budget": {"tokens": 0}}], "tokens is 0", "budget: {tokens: 8192"),
        ([{**CHECKED, "check": [{"pattern": "("}]}], "no regular expression", "pattern: '"),
        ([{**CHECKED, "check": [{"json": {"schema": {"type": "lamp"}}}]}], "no JSON Schema", "2020-12"),
        ([{**CHECKED, "mend": {"agent": "home", "times": 0}}], "mend.times is 0", "times: 1"),
        ([{**CHECKED, "mind": "home"}], "no option 'plans[0].mind'; 'mend' was probably meant", "mend"),
        ([{**CHECKED, "kind": "chat"}], "plans[0].kind is 'chat'", "one of sequence, parallel, verify"),
    ],
)
def test_what_cannot_work_is_refused_when_the_file_is_read(
    tmp_path: Path, plans: list[dict[str, Any]], problem: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, *plans, agents=[{"name": "home", "release": "r"}])
    assert problem in caught.value.problem and remedy in caught.value.remedy


def test_a_file_that_is_named_and_not_there_is_refused(tmp_path: Path) -> None:
    for check in ({"json": {"schema": "gone.json"}}, {"citations": {"sources": ["gone.txt"]}}):
        (tmp_path / "team.yaml").write_text(json.dumps({"base": "starter", "plans": [{**CHECKED, "check": [check]}]}))
        with pytest.raises(ConfigError, match="gone"):
            load(tmp_path / "team.yaml")


def test_a_plans_version_follows_from_all_that_it_declares(tmp_path: Path) -> None:
    outer = {**CHECKED, "name": "outer", "steps": "checked", "budget": {"depth": 2}}
    versions = set()
    for times in (1, 2):
        plans = planned(tmp_path, {**CHECKED, "mend": {"agent": "home", "times": times}}, outer).plans
        known = {plan.name: plan for plan in plans}
        versions |= {digest(plan, known) for plan in plans}
    assert len(versions) == 4  # the outer one changes with the inner
    log = planned(tmp_path, {**CHECKED, "log": "content"}).plans[0]
    assert digest(log, {}) == digest(planned(tmp_path, CHECKED).plans[0], {})


async def test_draft_check_mend(tmp_path: Path) -> None:
    replies = FakeReplies(home="the hall", fixer=['{"room": "cellar"}', '{"room": "hall"}'])
    receipts = FakeReceipts()
    team = planned(tmp_path, CHECKED)
    said = await ask(team, replies, asked("checked", sampling={"seed": 7}), receipts=receipts)
    assert said.text == '{"room": "hall"}'
    assert said.agent == f"checked@{digest(team.plans[0], {})}"
    assert said.reason == (
        "plan checked; home@1 drafts; 0 json found 1 in home@1's draft; fixer@1 mends; 1 json found 1 in fixer@1's draft; "
        "fixer@1 mends; nothing was found in fixer@1's draft"
    )
    # of all three steps: 10 each, of which 2 were cached; 2 words each
    assert said.end == ReplyDone(said.receipt, "stop", 30, 6, 6) and sum(piece.tokens for piece in said.pieces) == 6
    first, second = replies.of("fixer")
    told = json.loads(first.messages[0]["content"])
    assert (told["request"], told["draft"]) == ("light in the hall", "the hall") and told["task"].startswith(
        "Mend the draft"
    )
    assert told["findings"] == [{"check": "0 json", "says": "it is not JSON"}]
    found = json.loads(second.messages[0]["content"])["findings"]
    assert "'cellar' is not one of ['hall', 'attic']" in found[0]["says"]
    assert [request.sampling["seed"] for request in replies.asked] == [7, 8, 9]
    (kept,) = receipts.kept
    assert (kept.receipt, kept.agent, kept.steps) == (said.receipt, said.agent, ("r1", "r2", "r3"))
    assert kept.text == said.text and kept.release_id == ""


async def test_valid_draft_is_not_mended(tmp_path: Path) -> None:
    """The plan answers with one call by its name and by its name with the digest."""
    replies = FakeReplies(home='{"room": "attic"}')
    team = planned(tmp_path, CHECKED)
    for name in ("checked", f"checked@{digest(team.plans[0], {})}"):
        assert (await ask(team, replies, asked(name))).text == '{"room": "attic"}'
    assert [request.model for request in replies.asked] == ["home", "home"]


async def test_a_loop_is_stopped_and_the_best_draft_is_answered(tmp_path: Path) -> None:
    replies = FakeReplies(home='{"room": "cellar"}', fixer="the attic")
    said = await ask(planned(tmp_path, CHECKED), replies, asked("checked"))
    # no JSON is worse than JSON with a wrong room, so the draft is; and the same mend twice ends it, of three that may be
    assert said.text == '{"room": "cellar"}' and len(replies.of("fixer")) == 2
    assert "stopped at mend.2: what is said was said before" in said.reason
    assert said.reason.endswith("answered although 1 json found 1")
    patient = {
        **CHECKED,
        "mend": {"agent": "fixer", "times": 3, "repeats": 5, "gets": ["request"], "temperature": 0.5},
    }
    replies = FakeReplies(home="x", fixer=["x", "x", '{"room": "hall"}'])
    assert (await ask(planned(tmp_path, patient), replies, asked("checked"))).text == '{"room": "hall"}'
    assert [request.sampling["seed"] for request in replies.of("fixer")] == [1, 2, 3]
    assert all(request.messages == replies.asked[0].messages for request in replies.of("fixer"))


async def test_critic_verdict_counts_and_a_missing_one_is_skipped(tmp_path: Path) -> None:
    """The critic's findings go to the mending agent; its reply is not cut by the client's sampling."""
    plan = {**CHECKED, "check": ["json", {"kind": "agent", "agent": "critic", "temperature": 0.0}], "mend": "fixer"}
    verdicts = ['{"right": false, "findings": ["the hall was meant"]}', '{"right": true, "findings": []}']
    replies = FakeReplies(home='{"room": "attic"}', critic=verdicts, fixer='{"room": "hall"}')
    said = await ask(
        planned(tmp_path, plan), replies, asked("checked", sampling={"temperature": 0.9, "max_tokens": 5})
    )
    assert said.text == '{"room": "hall"}' and "1 agent found 1" in said.reason
    request = replies.of("critic")[0]
    assert json.loads(request.schema)["required"] == ["right", "findings"]
    assert request.sampling == {
        "temperature": 0.0,
        "seed": 0,
    }  # a verdict is not cut where the client wants short replies
    assert "the hall was meant" in replies.of("fixer")[0].messages[0]["content"]
    for nothing in ("fine by me", ModelError("it broke", "tune again")):
        replies = FakeReplies(home='{"room": "attic"}', critic=nothing)
        said = await ask(planned(tmp_path, plan), replies, asked("checked"))
        assert said.text == '{"room": "attic"}'
        assert "no verdict at check.0.1" in said.reason or "critic is left out of check.0.1: it broke" in said.reason


def test_a_verdict_that_contradicts_itself_is_a_finding() -> None:
    verdict = read_verdict('{"right": true, "findings": ["no"]}')
    assert verdict and not verdict.right
    assert read_verdict('{"right": true}') is None and read_verdict("true") is None


def test_step_input_has_the_declared_parts_and_form(tmp_path: Path) -> None:
    """Request, draft and findings are JSON or turns, with media first."""
    media = {"type": "image", "image": "data:image/png;base64,AA=="}
    turns = (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [media, {"type": "text", "text": "hi"}]},
    )
    whole = PlanStepInput(turns, "yo", (DraftFinding("0 json", "no JSON"),))
    step = Critic("c")
    (message,) = whole.messages(step, "mend")
    assert message["content"][0] == media
    assert json.loads(message["content"][1]["text"])["request"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]
    assert whole.messages(Critic("c", gets=("request",)), "mend") == turns
    own = whole.messages(Critic("c", gets=("request",), system="repair"), "mend")
    assert own == ({"role": "system", "content": "repair"}, turns[1])
    on = whole.messages(Critic("c", form="turns"), "mend")
    assert on[2] == {"role": "assistant", "content": "yo"} and on[3]["content"].endswith(
        "any more. Answer with the mended draft alone.\nno JSON"
    )
    (blind,) = whole.messages(Critic("c", gets=("draft",)), "check")
    assert set(json.loads(blind["content"])) == {"task", "draft"}


async def test_failed_step_is_left_out_unless_nothing_remains(tmp_path: Path) -> None:
    """Request, busy and deadline errors, and a plan without any draft, raise."""
    team = planned(tmp_path, CHECKED)
    for fault in (
        UnavailableError("in quarantine", "later"),
        ReplyFailed("c", "ModelError", "a logit is not finite", "tune again"),
    ):
        replies = FakeReplies(home="the hall", fixer=fault)
        said = await ask(team, replies, asked("checked"))
        assert said.text == "the hall" and "fixer" in said.reason and "is left out of mend.1" in said.reason
    with pytest.raises(UnavailableError, match="no step of the plan checked gave anything: it broke") as caught:
        await ask(team, FakeReplies(home=ModelError("it broke", "tune again")), asked("checked"))
    assert caught.value.remedy
    for error in (RequestError("too long", "less"), BusyError("full", "later"), DeadlineError("late", "more")):
        with pytest.raises(type(error), match=error.problem):
            await ask(team, FakeReplies(home=error), asked("checked"))


async def test_sequence_passes_drafts_on_and_skips_failed_steps(tmp_path: Path) -> None:
    """The next step gets the request and the last draft."""
    plan = {"name": "chain", "kind": "sequence", "steps": ["english", "home", "polite"]}
    replies = FakeReplies(english="hall light", home=ModelError("it broke", "-"), polite="please: hall light")
    said = await ask(planned(tmp_path, plan), replies, asked("chain", "ljus i hallen"))
    assert said.text == "please: hall light" and "home is left out of steps.1" in said.reason
    told = json.loads(replies.of("polite")[0].messages[0]["content"])
    assert (told["request"], told["draft"]) == ("ljus i hallen", "hall light")


async def test_last_step_streams_only_if_the_client_does(tmp_path: Path) -> None:
    """A stream that breaks ends with ReplyFailed; a step that never begins leaves the previous draft."""
    plan = {"name": "chain", "kind": "sequence", "steps": ["home", "polite"]}
    team = planned(tmp_path, plan)
    said = await ask(team, FakeReplies(home="hall light", polite="a b c"), asked("chain", streams=True))
    assert [piece.text for piece in said.pieces] == ["", "a ", "b ", "c"] and [
        piece.tokens for piece in said.pieces
    ] == [
        2,
        1,
        1,
        1,
    ]
    assert said.end == ReplyDone(said.receipt, "stop", 20, 5, 4) and said.reason.endswith("polite@1 answers")
    whole = await ask(team, FakeReplies(home="hall light", polite="a b c"), asked("chain"))
    assert [piece.text for piece in whole.pieces] == ["a b c"] and whole.end.reply_tokens == 5
    broken = ReplyFailed("c", "ModelError", "it broke", "-")
    cut = await ask(team, FakeReplies(home="hall light", polite=broken), asked("chain", streams=True))
    assert cut.text == "half a " and isinstance(cut.end, ReplyFailed)
    assert (await ask(team, FakeReplies(home="hall light", polite=broken), asked("chain"))).text == "hall light"
    refused = FakeReplies(home="hall light", polite=ModelError("it broke", "-"))
    assert (await ask(team, refused, asked("chain", streams=True))).text == "hall light"


async def test_a_vote_and_a_merge(tmp_path: Path) -> None:
    voted = {"name": "voted", "kind": "parallel", "members": ["a", "b", "c"]}
    replies = FakeReplies(a='{"room":"attic"}', b='{"room": "hall"}', c='{ "room":"hall" }')
    said = await ask(planned(tmp_path, voted), replies, asked("voted", sampling={"seed": 3}))
    assert said.text == '{"room": "hall"}' and said.reason.endswith("2 of 3 say what b@1 says")
    assert sorted(request.sampling["seed"] for request in replies.asked) == [3, 4, 5]
    tie = FakeReplies(a="Yes.", b="no", c=ModelError("it broke", "-"))
    said = await ask(planned(tmp_path, voted), tie, asked("voted"))
    assert said.text == "Yes." and "c is left out of members.2: it broke" in said.reason
    merged = {**voted, "name": "merged", "join": {"kind": "merge", "fields": [{"name": "rooms", "rule": "union"}]}}
    replies = FakeReplies(
        a='{"rooms": ["hall"], "on": true}', b='{"rooms": ["attic", "hall"], "on": false}', c='{"on": true}'
    )
    said = await ask(planned(tmp_path, merged), replies, asked("merged"))
    assert json.loads(said.text) == {"rooms": ["hall", "attic"], "on": True} and "merged from 3 of 3" in said.reason
    strict = json.dumps({"type": "object", "properties": {"rooms": {"maxItems": 1}}})
    replies = FakeReplies(a='{"rooms": ["hall"]}', b='{"rooms": ["attic"]}', c='{"rooms": ["hall"]}')
    said = await ask(planned(tmp_path, merged), replies, asked("merged", schema=strict))
    assert said.text == '{"rooms": ["hall"]}' and "a vote instead of a merge: at $.rooms" in said.reason
    words = FakeReplies(a="x", b="y", c="y")
    assert (await ask(planned(tmp_path, merged), words, asked("merged"))).text == "y"


async def test_a_request_is_divided_answered_and_put_together(tmp_path: Path) -> None:
    plan = {"name": "divided", "kind": "verify", "plan": "base", "members": ["home", "law"], "answer": "writer"}
    parts = {"parts": [{"agent": "law", "task": "how high is a railing?"}, {"agent": "home", "task": "light on"}]}
    replies = FakeReplies(base=json.dumps(parts), law="1.1 m", home="on", writer="It is on; 1.1 m.")
    team = planned(tmp_path, plan)
    said = await ask(team, replies, asked("divided"))
    assert said.text == "It is on; 1.1 m."
    assert json.loads(replies.of("base")[0].schema)["properties"]["parts"]["items"]["properties"]["agent"] == {
        "enum": ["home", "law"]
    }
    assert replies.of("law")[0].messages == ({"role": "user", "content": "how high is a railing?"},)
    told = json.loads(replies.of("writer")[0].messages[0]["content"])
    assert [one["says"] for one in told["findings"]] == ["1.1 m", "on"] and "draft" not in told
    without = FakeReplies(
        base=json.dumps(parts), law=ModelError("it broke", "-"), home="on", writer=ModelError("it broke", "-")
    )
    said = await ask(team, without, asked("divided"))
    assert (
        said.text == "on"
        and "law is left out of parts.0" in said.reason
        and "writer is left out of answer" in said.reason
    )
    whole = FakeReplies(base="no idea", home="on")
    said = await ask(team, whole, asked("divided"))
    assert said.text == "on" and "not divided: all of it is for home" in said.reason
    assert whole.of("home")[0].messages == asked("divided").messages
    joined = planned(tmp_path, {name: value for name, value in plan.items() if name != "answer"})
    assert isinstance(joined.plans[0], DividedPlan)
    replies = FakeReplies(base=json.dumps(parts), law="1.1 m", home="on")
    assert (await ask(joined, replies, asked("divided"))).text == "1.1 m\n\non"
    with pytest.raises(RequestError, match="obey no schema"):
        await ask(joined, replies, asked("divided", schema="{}"))


async def test_a_plan_within_a_plan_shares_its_budget_and_its_log(tmp_path: Path) -> None:
    outer = {"name": "outer", "kind": "parallel", "members": ["checked", "base"], "budget": {"depth": 2}}
    replies = FakeReplies(home="x", fixer='{"room": "hall"}', base='{"room":"hall"}')
    team = planned(tmp_path, CHECKED, outer)
    said = await ask(team, replies, asked("outer", openable=frozenset({"outer"})))
    assert said.text == '{"room": "hall"}' and said.end.prompt_tokens == 30
    lines = [json.loads(line) for line in next((tmp_path / "state/plans").iterdir()).read_text().splitlines()]
    places = {line["step"] for line in lines}
    assert {"members.0/steps.0", "members.0/check.1.1", "members.0/mend.1", "members.1"} <= places
    assert {request.openable for request in replies.asked} == {None}


async def test_budgets_of_tokens_and_seconds(tmp_path: Path) -> None:
    tight = planned(tmp_path, {**CHECKED, "budget": {"tokens": 20}})
    replies = FakeReplies(home="the hall", fixer=["x y", "z"])
    said = await ask(tight, replies, asked("checked"))
    assert [request.sampling["max_tokens"] for request in replies.asked] == [20, 8]
    assert "the budget of 20 tokens is used up" in said.reason and said.text == "the hall" and len(replies.asked) == 2
    own = await ask(tight, FakeReplies(home='{"room":"hall"}'), asked("checked", sampling={"max_tokens": 3}))
    assert own.text == '{"room":"hall"}'
    slow = planned(tmp_path, {**CHECKED, "mend": {"agent": "fixer", "seconds": 0.05}})
    said = await ask(slow, FakeReplies(home="the hall", fixer=5.0), asked("checked"))
    assert said.text == "the hall" and "fixer@1 is left out of mend.1: it took longer than 0.05 s" in said.reason
    with pytest.raises(DeadlineError):
        await ask(planned(tmp_path, {**CHECKED, "budget": {"seconds": 0.05}}), FakeReplies(home=5.0), asked("checked"))
    with pytest.raises(DeadlineError):
        await ask(planned(tmp_path, CHECKED), FakeReplies(home=5.0), asked("checked", deadline_s=0.05))
    assert issubclass(DeadlineError, BudgetError)


async def test_unsupported_plan_requests_are_refused(tmp_path: Path) -> None:
    """Versions that no plan has, closed agents, tools, logprobs and raw text raise; agents pass through."""
    replies = FakeReplies(home="hi")
    team = planned(tmp_path, CHECKED)
    assert (await ask(team, replies, asked("home@1"))).agent == "home@1"
    for request, error in (
        (asked("checked@1"), UnknownAgentError),
        (asked("checked", openable=frozenset({"home"})), KeyRefusedError),
        (asked("checked", tools=({"a": 1},)), RequestError),
        (asked("checked", top_logprobs=1), RequestError),
        (type(asked("checked"))("checked", text="raw"), RequestError),
    ):
        with pytest.raises(error):
            await ask(team, replies, request)
    assert len(replies.asked) == 1


async def test_client_schema_applies_unless_the_step_has_one(tmp_path: Path) -> None:
    schema = json.dumps({"type": "object"})
    replies = FakeReplies(home="x", fixer='{"room": "hall"}')
    own = {**CHECKED, "mend": {"agent": "fixer", "schema": ROOMS}}
    await ask(planned(tmp_path, own), replies, asked("checked", schema=schema))
    assert replies.of("home")[0].schema == schema and json.loads(replies.of("fixer")[0].schema) == ROOMS


async def test_auto_within_a_plan_chooses_among_the_clients_agents(tmp_path: Path) -> None:
    replies = FakeReplies(auto='{"room": "hall"}')
    opens = frozenset({"checked", "home"})
    await ask(planned(tmp_path, {**CHECKED, "steps": "auto"}), replies, asked("checked", openable=opens))
    assert replies.asked[0].openable == opens


async def test_leaving_client_cancels_each_step(tmp_path: Path) -> None:
    """No call stays open, and both logs end with the outcome cancelled."""
    team = planned(tmp_path, {"name": "p", "kind": "parallel", "members": ["a", "b"]})
    replies = FakeReplies(a=5.0, b=5.0)
    plans = opened(team, replies)
    waiting = asyncio.ensure_future(plans.open(asked("p")))
    while replies.live < 2:
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert replies.live == 0
    chain = planned(tmp_path, {"name": "c", "kind": "sequence", "steps": ["a", "b"]})
    plans_too = opened(chain, FakeReplies(a="x", b="y z"))
    answer = await plans_too.open(asked("c", streams=True))
    await anext(answer.events)
    await answer.events.aclose()
    await plans.close()
    await plans_too.close()
    logs = sorted((tmp_path / "state/plans").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    ends = [json.loads(file.read_text().splitlines()[-1]) for file in logs]
    assert [end["outcome"] for end in ends] == ["cancelled", "cancelled"]


def test_what_is_listed_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    team = planned(tmp_path, CHECKED, {"name": "law", "kind": "sequence", "steps": "base"})
    plans = opened(team, FakeReplies(), known=lambda: {"home", "law"})
    checked, _ = plans.listed
    assert checked.name == "checked" and checked.versions == (checked.live,) and checked.is_ready
    assert plans.troubles == {
        "checked": "nobody of its steps is called fixer",
        "law": "an agent has its name too, and the plan answers",
    }


async def test_a_served_plan_is_a_name_like_any_other(tmp_path: Path) -> None:
    made = planned(tmp_path, CHECKED)
    replies = FakeReplies(home='{"room": "hall"}', base="hello")

    plans = opened(made, replies)
    house = serving.house(replies=plans, plans=plans.listed, keys=serving.KEYS)
    version = plans.listed[0].live
    async with serving.client(house, serving.team(tmp_path), authorization="Bearer key-all") as client:
        listed = {model["id"]: model["root"] for model in (await client.get("/v1/models")).json()["data"]}
        assert listed["checked"] == listed[f"checked@{version}"] == f"checked@{version}"
        body = {
            "model": "checked",
            "messages": [{"role": "user", "content": "light in the hall"}],
            "n": 2,
            "seed": 4,
        }
        said = await client.post("/v1/chat/completions", json=body)
        assert [choice["message"]["content"] for choice in said.json()["choices"]] == ['{"room": "hall"}'] * 2
        assert said.json()["model"] == f"checked@{version}"
        assert said.json()["usage"] == {
            "prompt_tokens": 10,
            "completion_tokens": 4,
            "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        stream = await client.post("/v1/chat/completions", json={**body, "n": 1, "stream": True})
        assert stream.text.endswith("data: [DONE]\n\n") and replies.asked[-1].sampling == {"seed": 4}
        gone = await client.post("/v1/chat/completions", json={**body, "model": "checked@0"})
        assert gone.status_code == 404
    async with serving.client(house, serving.team(tmp_path), authorization="Bearer key-faq") as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 403
        assert "checked" not in {model["id"] for model in (await client.get("/v1/models")).json()["data"]}
    await plans.close()
    assert [request.sampling["seed"] for request in replies.asked] == [4, 5, 4]


async def test_unwritable_state_loses_log_and_receipt_but_no_answer(tmp_path: Path) -> None:
    """The troubles count the lost runs and receipts."""
    (tmp_path / "state").write_text("a file where the folder would be")
    team = planned(tmp_path, CHECKED)

    plans = opened(team, FakeReplies(home='{"room": "hall"}'), receipts=FakeReceipts(OSError("full")))
    assert (await told(plans, asked("checked"))).text == '{"room": "hall"}'
    assert plans.troubles["plans"] == "1 runs and 1 receipts could not be written"
