"""Verb receipt verify.

    signature   always: by the key given, the team's own, or one that this machine trusts
    digests     where the words and the team's HMAC key are at hand
    text        of a greedy reply, where base and Release are: the reply is made anew by the engine that made it

What is checked and wrong is an error; what could not be checked says why. A reply that another arithmetic made
(core/numerics.py) is not made anew: this version would be right to say something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import catalogue, config, model_refs, records, signing
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ArtifactError, ConfigError, ModelError, SartorError
from sartor.inference.engine import (
    BASE,
    Engine,
    EngineInfo,
    GenerateCall,
    ReplyFailed,
    Sampling,
    TextDelta,
    adapter_digest,
    numerics_difference,
)
from sartor.serving.receipts import FAILED, KIND, SCHEMA, RequestDigestInput, digest_by, read_secret
from sartor.serving.team_config import LocalEngineOptions, Team, load
from sartor.serving.workers.worker_main import open_engine

MOST_BYTES = 64 << 20
_TEXTS = ("id", "created", "agent", "release", "adapter", "finish")
_PARTS = ("base", "engine", "sampling", "choice", "prompt", "reply", "tokens", "signature")
_CALL = "receipt"


@dataclass(frozen=True)
class CheckedReceipt:
    """A receipt that is valid. checked: what was looked at and found, or why it could not be."""

    receipt: Mapping[str, Any]
    signer: str
    checked: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        agent, _, version = str(self.receipt["agent"]).partition("@")
        said = {"valid": True, "agent": agent, "version": version, "receipt": self.receipt["id"]}
        return {**said, "created": self.receipt["created"], "signer": self.signer, "checked": dict(self.checked)}


@dataclass(frozen=True)
class _Evidence:
    """What a receipt is held against. content: None where the question is not at hand, reply: None where its text is not."""

    receipt: Mapping[str, Any]
    content: RequestDigestInput | None
    reply: str | None
    team: Team | None
    release: Artifact | None


def verify_receipt(
    file: Path | str,
    *,
    team: Path | str | None = None,
    key: Path | str | None = None,
    messages: Path | str | None = None,
    reply: str | None = None,
    notice: Callable[[str], object] = lambda line: None,
) -> CheckedReceipt:
    """Check a receipt, as GET /v1/receipts/{id} gives it, or with its words: `{"receipt", "messages", "reply"}`.

    team: TEAM.yaml, whose keys and engine are used. messages: a file with the messages or the whole body of the request. reply:
    its text. Raises ArtifactError (a file that is none, other words), SignatureError, ConfigError, ModelError.
    """
    said = _read(Path(file))
    asked = said if isinstance(said.get("receipt"), dict) else {"receipt": said}
    receipt = _form(asked["receipt"], Path(file))
    opened = load(Path(team)) if team else None
    signer = _check_signature(receipt, Path(file), Path(key) if key else None, opened)
    if messages is not None:
        asked = {**asked, **question_in(Path(messages))}
    content = (
        RequestDigestInput.of_request(asked) if asked.get("messages") or asked.get("text") or asked.get("prompt") else None
    )
    text = reply if reply is not None else asked.get("reply")
    release = _release_of(receipt, opened)
    evidence = _Evidence(
        receipt, _completed(content, receipt, release), text if isinstance(text, str) else None, opened, release
    )
    checked = {"signature": f"signed by {signer}", "digests": _check_digests(evidence), "text": _check_text(evidence, notice)}
    return CheckedReceipt(receipt, signer, checked)


def _read(file: Path) -> dict[str, Any]:
    said = _json(file)
    if not isinstance(said, dict):
        raise ArtifactError(f"{file} is no receipt", "give what GET /v1/receipts/ID answered")
    return said


def _json(file: Path) -> Any:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file.stat().st_size:,} bytes; {MOST_BYTES:,} are the limit")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is no JSON file: {error}", "give what GET /v1/receipts/ID answered") from None


def question_in(file: Path) -> dict[str, Any]:
    """A request's body, or its messages alone, in a JSON file. Raises ArtifactError where it holds neither."""
    said = _json(file)
    if not isinstance(said, (dict, list)):
        raise ArtifactError(f"{file} holds no messages", "give a list of messages, or the body of the request")
    return said if isinstance(said, dict) else {"messages": said}


def _form(receipt: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """The receipt, if it has the form of one: what is signed is decided by the signature."""
    if receipt.get("kind") != KIND or not all(isinstance(receipt.get(name), str) for name in _TEXTS):
        raise ArtifactError(f"{file} is no receipt", "give what GET /v1/receipts/ID answered")
    if receipt.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{file} has schema {receipt.get('schema')!r:.20}; this version of Sartor reads {SCHEMA}",
            "use the version that wrote it",
        )
    if not all(isinstance(receipt.get(name), dict) for name in _PARTS):
        raise ArtifactError(f"{file} lacks a part of a receipt", "give what GET /v1/receipts/ID answered, whole")
    return receipt


def _check_signature(receipt: Mapping[str, Any], file: Path, key: Path | None, team: Team | None) -> str:
    own = Path(team.state) / "keys" / "sartor.pub" if team else None
    trusted = key or (own if own and own.is_file() else None)
    try:
        document = records.canonical({name: value for name, value in receipt.items() if name != "signature"})
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} holds what no receipt can: {error}", "give what GET /v1/receipts/ID answered") from None
    keys = [signing.open_public(trusted)] if trusted else None
    return signing.check_signature(document, receipt["signature"], file, f"the receipt {receipt['id']}", keys)


def _release_of(receipt: Mapping[str, Any], team: Team | None) -> Artifact | None:
    """The Release that answered: the team's own copy, or where the catalogue knows it; None where it is nowhere."""
    if not receipt["release"]:
        return None
    hint = str(Path(team.state) / "adapters" / receipt["release"]) if team else ""
    path = catalogue.locate(receipt["release"], hint)
    with suppress(ArtifactError):  # of a damaged one the receipt says nothing
        return open_artifact(path, "release") if path else None
    return None


def _completed(
    content: RequestDigestInput | None, receipt: Mapping[str, Any], release: Artifact | None
) -> RequestDigestInput | None:
    """The question with what the Release added to it: its system prompt and its tools, where the client gave none."""
    if content is None or release is None:
        return content
    prompt, tools = release.manifest["system_prompt"], release.manifest.get("tools", [])
    if prompt and content.messages and not content.system and all(one.get("role") != "system" for one in content.messages):
        content = replace(content, system=({"role": "system", "content": prompt},))
    if tools and not content.tools and receipt["prompt"].get("tools"):
        content = replace(content, tools=tuple(tools))
    return content


def _check_digests(given: _Evidence) -> str:
    """Raise ArtifactError where words are not those of the receipt; say what was compared."""
    file = Path(given.team.state) / "receipts.key" if given.team else None
    if given.content is None and given.reply is None:
        return "not checked: give the messages and the reply"
    if file is None or not file.is_file():
        return "not checked: they are keyed, and the key is the team's (--team TEAM.yaml)"
    digest = digest_by(read_secret(file))
    compared = []
    if given.content is not None:
        for name, found in given.content.digests(digest).items():
            wanted = given.receipt["prompt"].get(name, "")
            if name == "system" and not found and wanted and given.release is None:
                continue  # the Release's own, which is not here
            if found != wanted:
                raise _other(given, f"the {name} of the question" if name != "system" else "the system prompt")
            compared += [name] if found else []
    if given.reply is not None:
        if digest("reply", given.reply) != given.receipt["reply"].get("text", ""):
            raise _other(given, "the reply")
        compared.append("reply")
    return f"the same: {', '.join(compared)}"


def _other(given: _Evidence, what: str) -> ArtifactError:
    return ArtifactError(f"{what} is not what the receipt {given.receipt['id']} was written for", "give the words as they were")


def _check_text(given: _Evidence, notice: Callable[[str], object]) -> str:
    """Raise ArtifactError where a greedy reply, made anew, is another; else what was found, or why it was not made."""
    receipt = given.receipt
    try:
        sampling = Sampling(**receipt["sampling"])
    except (ConfigError, TypeError) as error:
        raise ArtifactError(f"the receipt has no sampling of a reply: {error}", "give it as it was") from None
    if why := _unfit(given, sampling):
        return f"not checked: {why}"
    try:
        frame = _engine_frame(given)
        notice("making the reply anew")
        engine = open_engine(frame)
    except SartorError as error:
        return f"not checked: {error.problem}"
    try:
        differs = _elsewhere(receipt, engine.about)
        made = _again(engine, given, sampling)
    finally:
        engine.close()
    assert given.reply is not None  # else it would have been unfit
    is_same = made.startswith(given.reply) if receipt["finish"] == "cancelled" else made == given.reply
    if is_same:
        return "made anew, the same"
    if differs:
        return f"made anew, and another; but {differs}"
    raise ArtifactError(
        f"{receipt['agent']} does not say this again: it says {made[:80]!a}, the reply is {given.reply[:80]!a}",
        "this engine did not give that reply to that question",
    )


def _unfit(given: _Evidence, sampling: Sampling) -> str:
    receipt = given.receipt
    if receipt.get("steps"):
        return "a plan made the reply, in steps that have receipts of their own (sartor agents replay makes them anew)"
    if not sampling.is_greedy:
        return "the reply was sampled"
    if receipt["finish"] == FAILED or receipt["reply"].get("tool_calls"):
        return "the reply failed" if receipt["finish"] == FAILED else "the reply calls tools"
    if receipt.get("person"):
        return "a personal version made the reply, and its adapter is its person's"
    if found := numerics_difference(receipt):
        return f"made by {found}"
    if given.content is None or given.reply is None:
        return "give the messages and the reply"
    if receipt["release"] and given.release is None:
        return f"the Release {receipt['release'][:16]} is not on this machine (sartor index DIR finds one that was moved)"
    return ""


def _engine_frame(given: _Evidence) -> dict[str, Any]:
    """Which engine to open: the team's, else this package's own. Raises a SartorError where it is not the one that answered."""
    made, base = given.receipt["engine"], given.receipt["base"]
    engine = given.team.engine if given.team else LocalEngineOptions()
    if made.get("kind") != engine.kind:
        raise ConfigError(
            f"the engine {made.get('kind')!r:.40} made the reply, and {engine.kind!r} is here", "--team TEAM.yaml"
        )
    name = given.team.base if given.team else str(base.get("name", ""))
    if (found := model_refs.locate_base(name)).digest != base.get("digest"):
        raise ModelError(f"the reply was made on the base {base.get('digest')!r:.14}, and {name!r} is {found.short_digest}", "")
    return {"engine": config.dump(engine), "base": name}


def _elsewhere(receipt: Mapping[str, Any], about: EngineInfo) -> str:
    """In what this machine's engine is another than the one that answered, though it has the same base."""
    made = {**receipt["engine"], "template": receipt["base"].get("template_digest")}
    here = {"dtype": about.dtype, "device": about.device, "template": about.template_digest}
    return ", ".join(f"{name} was {made.get(name)} and is {value}" for name, value in here.items() if made.get(name) != value)


def _again(engine: Engine, given: _Evidence, sampling: Sampling) -> str:
    content, adapter = given.content, BASE
    assert content is not None
    if given.release is not None:
        adapter = adapter_digest(given.release.manifest["files"])
        if adapter != given.receipt["adapter"]:
            raise ArtifactError(
                f"the Release has the adapter {adapter[:16]}, the receipt {given.receipt['adapter'][:16]}", "report it"
            )
        engine.attach(adapter, given.release.path)
    call = GenerateCall(
        _CALL,
        adapter,
        (*content.system, *content.messages),
        content.text,
        sampling,
        content.schema,
        content.tools,
        content.must_call,
    )
    engine.submit(call)
    said = []
    while engine.busy:
        for event in engine.step():
            if isinstance(event, ReplyFailed):
                raise ModelError(f"the reply could not be made anew: {event.problem}", event.remedy)
            said.append(event.text if isinstance(event, TextDelta) else "")
    return "".join(said)
