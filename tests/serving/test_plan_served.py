"""A plan on a real server, by real workers on the tiny base; then its log, made again."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

import sartor
from server_process import address, serve

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"room": {"enum": ["hall", "attic"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}
PLANS: list[dict[str, Any]] = [
    {
        "name": "checked",
        "kind": "sequence",
        "steps": {"agent": "base", "max_tokens": 12},
        "check": ["json", {"json": {"schema": SCHEMA}}],
        "mend": {"agent": "base", "schema": SCHEMA, "temperature": 0.7},
    },
    {
        "name": "twice",
        "kind": "sequence",
        "steps": [{"agent": "base", "max_tokens": 4}, {"agent": "base", "max_tokens": 6}],
    },
    {"name": "lost", "kind": "parallel", "members": ["base", "nobody-at-all"]},
]


def posted(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "light in the hall"}], "seed": 3, **fields}
    return client.post("/v1/chat/completions", json=body)


@pytest.mark.services
@pytest.mark.alone
def test_a_plan_is_served_logged_and_made_again(tiny_base: Path, tmp_path: Path, commands: dict[str, str]) -> None:
    state = tmp_path / "state"
    with serve(state, str(tiny_base), "--plans", json.dumps(PLANS), commands=commands) as (process, _):
        with httpx.Client(base_url=address(process), timeout=60) as client:
            listed = {model["id"]: model["root"] for model in client.get("/v1/models").json()["data"]}
            version = listed["checked"]
            assert version.startswith("checked@") and listed[version] == version and {"twice", "lost"} <= set(listed)

            answer = posted(client, "checked")
            said = answer.json()
            assert set(json.loads(said["choices"][0]["message"]["content"])) == {"room", "on"}
            assert said["model"] == answer.headers["x-sartor-agent"] == version
            assert (
                "0 json found 1" in answer.headers["x-sartor-reason"]
                and "mends; nothing was found" in answer.headers["x-sartor-reason"]
            )
            receipt = client.get(f"/v1/receipts/{answer.headers['x-sartor-receipt']}").json()
            steps = [client.get(f"/v1/receipts/{one}").json() for one in receipt["steps"]]
            assert receipt["agent"] == version and [step["agent"].partition("@")[0] for step in steps] == [
                "base",
                "base",
            ]
            for kind, name in (("prompt", "prompt_tokens"), ("reply", "completion_tokens")):
                assert said["usage"][name] == sum(step["tokens"][kind] for step in steps) == receipt["tokens"][kind]
            (state / "receipt.json").write_text(json.dumps(receipt))

            assert posted(client, version).json()["choices"] == said["choices"]  # by its seed
            assert posted(client, "checked@0").status_code == 404
            assert posted(client, "checked", logprobs=True).status_code == 400
            streamed = posted(client, "twice", stream=True, stream_options={"include_usage": True})
            chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
            # in how many pieces it comes is a matter of time: what has not been sent when more is there goes out with it
            pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
            assert "".join(pieces) == posted(client, "twice").json()["choices"][0]["message"]["content"] != ""
            assert chunks[-1]["usage"]["completion_tokens"] == 10
            lost = posted(client, "lost", max_tokens=4)
            assert (
                lost.status_code == 200 and "nobody-at-all is left out of members.1" in lost.headers["x-sartor-reason"]
            )
            assert "nobody-at-all" in client.get("/health").json()["troubles"]["lost"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    team = state / "team.yaml"
    team.write_text(json.dumps({"base": str(tiny_base), "plans": PLANS}))
    checked = sartor.verify_receipt(state / "receipt.json", team=team).as_json()
    assert "in steps that have receipts" in checked["checked"]["text"]
    (log,) = (state / ".team/plans").iterdir()
    (state / "asked.json").write_text(json.dumps([{"role": "user", "content": "light in the hall"}]))
    replay = sartor.replay_plans(team, log, messages=state / "asked.json").as_json()
    assert replay["same"] and [one["steps"] for one in replay["runs"]] == [5, 5, 2, 2, 2]
