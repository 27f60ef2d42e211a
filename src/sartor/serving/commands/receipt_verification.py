"""Verb receipt verify.

    signature   always: by the given key, the team's own, or one that this machine trusts
    digests     if the texts and the team's HMAC key are available
    text        of a greedy reply, if base and Release are available: the same kind of engine generates it again

A check that fails is an error; a check that could not run states the reason. A reply of another version of the
arithmetic (core/numerics.py) is not generated again, because this version may rightly produce another text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import catalogue, config, model_refs, records, signing, strict_json
from sartor.core.artifacts import Artifact, open_artifact, read_manifest
from sartor.core.errors import ArtifactError, ConfigError, ModelError, SartorError
from sartor.core.installation import upgrade_command
from sartor.core.lineage.receipt_index import ReceiptIndex
from sartor.core.remedies import REPORT
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
from sartor.serving.dispatch.client_turns import fold_system
from sartor.serving.receipts import FAILED, KIND, SCHEMA, RequestDigestInput, digest_by, read_secret
from sartor.serving.registry.user_versions import ADAPTER, folder_of
from sartor.serving.team_config import LocalEngineOptions, Team, load
from sartor.serving.workers.worker_main import open_engine
from sartor.trace.served_replies import ServedReply

MOST_BYTES = 64 << 20
_TEXTS = ("id", "created", "agent", "release", "adapter", "finish")
_PARTS = ("base", "engine", "sampling", "choice", "prompt", "reply", "tokens", "signature")
_CALL = "receipt"


@dataclass(frozen=True)
class CheckedReceipt:
    """Valid receipt.

    checked: the finding of each check, or the reason why it could not run.
    """

    receipt: Mapping[str, Any]
    signer: str
    checked: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        agent, _, version = str(self.receipt["agent"]).partition("@")
        fields = {"valid": True, "agent": agent, "version": version, "receipt": self.receipt["id"]}
        return {**fields, "created": self.receipt["created"], "signer": self.signer, "checked": dict(self.checked)}


@dataclass(frozen=True)
class _Evidence:
    """Data that a receipt is compared with.

    content: None if the request is not available.
    reply: None if the reply's text is not available.
    state: directory of the team's state, which holds the key of the digests; None if it is unknown.
    """

    receipt: Mapping[str, Any]
    content: RequestDigestInput | None
    reply: str | None
    team: Team | None
    release: Artifact | None
    state: Path | None


def verify_receipt(
    file: Path | str,
    *,
    team: Path | str | None = None,
    key: Path | str | None = None,
    messages: Path | str | None = None,
    reply: str | None = None,
    notice: Callable[[str], object] = lambda line: None,
) -> CheckedReceipt:
    """Check a receipt as GET /v1/receipts/{id} returns it, or one with texts: `{"receipt", "messages", "reply"}`.

    team: TEAM.yaml, whose keys and engine are used.
    messages: a file with the messages or the whole body of the request.
    reply: text of the reply.
    Raises ArtifactError (an invalid file, other texts), SignatureError, ConfigError, ModelError.
    """
    document = _json(Path(file))
    if not isinstance(document, dict):
        raise ArtifactError(f"{Path(file)} is no receipt", "give what GET /v1/receipts/ID answered")
    payload = document if isinstance(document.get("receipt"), dict) else {"receipt": document}
    receipt = _form(payload["receipt"], Path(file))
    loaded_team = load(Path(team)) if team else None
    signer = _check_signature(receipt, Path(file), Path(key) if key else None, loaded_team)
    if messages is not None:
        payload = {**payload, **question_in(Path(messages))}
    has_request = payload.get("messages") or payload.get("text") or payload.get("prompt")
    content = RequestDigestInput.of_request(payload) if has_request else None
    text = reply if reply is not None else payload.get("reply")
    release = _release_of(receipt, loaded_team)
    evidence = _Evidence(
        receipt,
        content=_completed(content, receipt, release, loaded_team),
        reply=text if isinstance(text, str) else None,
        team=loaded_team,
        release=release,
        state=Path(loaded_team.state) if loaded_team else None,
    )
    checked = {
        "signature": f"signed by {signer}",
        "digests": _check_digests(evidence),
        "text": _check_text(evidence, notice),
    }
    return CheckedReceipt(receipt, signer, checked)


def check_served_reply(
    file: Path, messages: Sequence[Mapping[str, Any]], reply: str, team: Path | None = None
) -> ServedReply:
    """Return which Release or personal adapter gave a reply, after comparing the words with its receipt.

    messages: turns of the prompt as the client sent them; the Release's own system prompt and tools are added.
    team: TEAM.yaml; without it the team is looked for among those that served on this machine.
    Raises ArtifactError for other words, an invalid receipt, or a version that is no longer here; ConfigError if the
    key of the digests is not here; SignatureError.
    """
    document = _json(file)
    if not isinstance(document, dict):
        raise ArtifactError(f"{file} is no receipt", "give what GET /v1/receipts/ID answered")
    receipt = _form(document["receipt"] if isinstance(document.get("receipt"), dict) else document, file)
    loaded_team = load(team) if team else None
    state = Path(loaded_team.state) if loaded_team else _find_state(receipt["id"])
    if state is None or not (state / "receipts.key").is_file():
        raise ConfigError(
            f"the words cannot be compared with the receipt {receipt['id']}: its digests are keyed, and the key of "
            "its team is not here",
            "--team TEAM.yaml, on the machine that served; without --receipt the words are taken as they are",
        )
    public_key = state / "keys" / "sartor.pub"
    signer = _check_signature(receipt, file, public_key if public_key.is_file() else None, None)
    release = _release_of(receipt, loaded_team)
    evidence = _Evidence(
        receipt,
        content=_completed(RequestDigestInput.of_request({"messages": [*messages]}), receipt, release, loaded_team),
        reply=reply,
        team=loaded_team,
        release=release,
        state=state,
    )
    try:
        compared = _check_digests(evidence)
    except ArtifactError:
        reply = f"{reply}\n"  # one that was read from a file has lost its line end
        compared = _check_digests(replace(evidence, reply=reply))
    return ServedReply(
        receipt=receipt["id"],
        path=_adapter_of(receipt, release, state),
        agent=receipt["agent"],
        signer=signer,
        compared=compared,
        reply=reply,
    )


def _find_state(receipt: str) -> Path | None:
    """Return the state of the team on this machine that wrote a receipt; None if there is none."""
    for folder in catalogue.receipt_folders():
        if folder.is_dir() and ReceiptIndex(folder).find(receipt) is not None:
            return folder.parent
    return None


def _adapter_of(receipt: Mapping[str, Any], release: Artifact | None, state: Path) -> Path:
    """Return the personal adapter or the Release that gave a reply. Raises ArtifactError if it is not here."""
    if person := receipt.get("person"):
        agent = str(receipt["agent"]).partition("@")[0]
        for path in sorted(folder_of(state, str(person), agent).glob(f"*/{ADAPTER}")):
            if adapter_digest(read_manifest(path, ("adapter",))["files"]) == receipt["adapter"]:
                return path
        raise ArtifactError(
            f"the personal version that gave the reply {receipt['id']} is no longer in {state}",
            "it was tuned again or forgotten since: ask for the reply again, and trace that one",
        )
    if release is not None:
        return release.path
    if not receipt["release"]:
        raise ArtifactError(
            f"the base gave the reply {receipt['id']}, which no rows of yours have taught", "trace a reply of an agent"
        )
    raise ArtifactError(
        f"the Release {receipt['release'][:16]} that gave the reply {receipt['id']} is not on this machine",
        "sartor index DIR finds one that was moved",
    )


def _json(file: Path) -> Any:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file.stat().st_size:,} bytes; {MOST_BYTES:,} are the limit")
        return strict_json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is no JSON file: {error}", "give what GET /v1/receipts/ID answered") from None


def question_in(file: Path) -> dict[str, Any]:
    """Return a request's body, or its messages alone, from a JSON file. Raises ArtifactError for other content."""
    document = _json(file)
    if not isinstance(document, (dict, list)):
        raise ArtifactError(f"{file} holds no messages", "give a list of messages, or the body of the request")
    return document if isinstance(document, dict) else {"messages": document}


def _form(receipt: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """Return the receipt if it has a receipt's form. Its content is verified by the signature."""
    if receipt.get("kind") != KIND or not all(isinstance(receipt.get(name), str) for name in _TEXTS):
        raise ArtifactError(f"{file} is no receipt", "give what GET /v1/receipts/ID answered")
    if receipt.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{file} has schema {receipt.get('schema')!r:.20}; this version of Sartor reads {SCHEMA}",
            upgrade_command(),
        )
    if not all(isinstance(receipt.get(name), dict) for name in _PARTS):
        raise ArtifactError(f"{file} lacks a part of a receipt", "give what GET /v1/receipts/ID answered, whole")
    return receipt


def _check_signature(receipt: Mapping[str, Any], file: Path, key: Path | None, team: Team | None) -> str:
    team_key = Path(team.state) / "keys" / "sartor.pub" if team else None
    trusted = key or (team_key if team_key and team_key.is_file() else None)
    try:
        document = records.canonical({name: value for name, value in receipt.items() if name != "signature"})
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{file} holds what no receipt can: {error}", "give what GET /v1/receipts/ID answered"
        ) from None
    keys = [signing.open_public(trusted)] if trusted else None
    return signing.check_signature(
        document,
        receipt["signature"],
        file=file,
        subject=f"the receipt {receipt['id']}",
        trusted=keys,
        purpose="receipt",
    )


def _release_of(receipt: Mapping[str, Any], team: Team | None) -> Artifact | None:
    """Return the Release that answered: the team's own copy, or one in the catalogue; None if it is absent."""
    if not receipt["release"]:
        return None
    hint = str(Path(team.state) / "adapters" / receipt["release"]) if team else ""
    path = catalogue.locate(receipt["release"], hint)
    with suppress(ArtifactError):  # a damaged Release cannot be compared with the receipt
        return open_artifact(path, "release") if path else None
    return None


def _completed(
    content: RequestDigestInput | None, receipt: Mapping[str, Any], release: Artifact | None, team: Team | None
) -> RequestDigestInput | None:
    """Return the request with the Release's system prompt and tools, if the client sent none or they are fixed."""
    if content is None or release is None:
        return content
    prompt, tools = release.manifest["system_prompt"], release.manifest.get("tools", [])
    options = team.agent(str(receipt["agent"]).partition("@")[0]) if team else None
    if options is not None and options.fixes_system:
        content = replace(content, system=(), messages=fold_system((*content.system, *content.messages)))
    if (
        prompt
        and content.messages
        and not content.system
        and all(message.get("role") != "system" for message in content.messages)
    ):
        content = replace(content, system=({"role": "system", "content": prompt},))
    if tools and not content.tools and receipt["prompt"].get("tools"):
        content = replace(content, tools=tuple(tools))
    return content


def _check_digests(evidence: _Evidence) -> str:
    """Compare the texts with the receipt's digests, and return what was compared.

    Raises ArtifactError if a text differs.
    """
    file = evidence.state / "receipts.key" if evidence.state else None
    if evidence.content is None and evidence.reply is None:
        return "not checked: give the messages and the reply"
    if file is None or not file.is_file():
        return "not checked: they are keyed, and the key is the team's (--team TEAM.yaml)"
    digest = digest_by(read_secret(file))
    compared = []
    if evidence.content is not None:
        for name, value in evidence.content.digests(digest).items():
            expected = evidence.receipt["prompt"].get(name, "")
            if name == "system" and not value and expected and evidence.release is None:
                continue  # the system prompt of the Release, which is absent
            if value != expected:
                raise _mismatch(evidence, f"the {name} of the question" if name != "system" else "the system prompt")
            compared += [name] if value else []
    if evidence.reply is not None:
        if digest("reply", evidence.reply) != evidence.receipt["reply"].get("text", ""):
            raise _mismatch(evidence, "the reply")
        compared.append("reply")
    return f"the same: {', '.join(compared)}"


def _mismatch(evidence: _Evidence, part: str) -> ArtifactError:
    return ArtifactError(
        f"{part} is not what the receipt {evidence.receipt['id']} was written for",
        "--messages with the body of the request, --reply with the text of the reply, both as they were",
    )


def _check_text(evidence: _Evidence, notice: Callable[[str], object]) -> str:
    """Generate a greedy reply again and compare it; return the finding, or why it was not generated.

    Raises ArtifactError if the text differs on an equal engine.
    """
    receipt = evidence.receipt
    try:
        sampling = Sampling(**receipt["sampling"])
    except (ConfigError, TypeError) as error:
        raise ArtifactError(
            f"the receipt has no sampling of a reply: {error}", "the file as GET /v1/receipts/ID answered it"
        ) from None
    if reason := _not_checkable(evidence, sampling):
        return f"not checked: {reason}"
    try:
        opening = _engine_opening(evidence)
        notice("making the reply anew")
        engine = open_engine(opening)
    except SartorError as error:
        return f"not checked: {error.problem}"
    try:
        differs = _engine_differences(receipt, engine.about)
        text = _regenerate(engine, evidence, sampling)
    finally:
        engine.close()
    assert evidence.reply is not None  # guaranteed by _not_checkable
    is_same = text.startswith(evidence.reply) if receipt["finish"] == "cancelled" else text == evidence.reply
    if is_same:
        return "made anew, the same"
    if differs:
        return f"made anew, and another; but {differs}"
    raise ArtifactError(
        f"{receipt['agent']} does not say this again: it says {text[:80]!a}, the reply is {evidence.reply[:80]!a}",
        "this engine did not give that reply to that question",
    )


def _not_checkable(evidence: _Evidence, sampling: Sampling) -> str:
    receipt = evidence.receipt
    if receipt.get("steps"):
        return "a plan made the reply, in steps that have receipts of their own (sartor agents replay makes them anew)"
    if not sampling.is_greedy:
        return "the reply was sampled"
    if receipt["finish"] == FAILED or receipt["reply"].get("tool_calls"):
        return "the reply failed" if receipt["finish"] == FAILED else "the reply calls tools"
    if receipt.get("person"):
        return "a personal version made the reply, and its adapter is its person's"
    if difference := numerics_difference(receipt):
        return f"made by {difference}"
    if evidence.content is None or evidence.reply is None:
        return "give the messages and the reply"
    if receipt["release"] and evidence.release is None:
        return (
            f"the Release {receipt['release'][:16]} is not on this machine (sartor index DIR finds one that was moved)"
        )
    return ""


def _engine_opening(evidence: _Evidence) -> dict[str, Any]:
    """Return the options of the engine to open: the team's, else this package's own.

    Raises a SartorError if it is not the kind of engine or the base that answered.
    """
    recorded, base = evidence.receipt["engine"], evidence.receipt["base"]
    engine = evidence.team.engine if evidence.team else LocalEngineOptions()
    if recorded.get("kind") != engine.kind:
        raise ConfigError(
            f"the engine {recorded.get('kind')!r:.40} made the reply, and {engine.kind!r} is here", "--team TEAM.yaml"
        )
    name = evidence.team.base if evidence.team else str(base.get("name", ""))
    option = "base" if evidence.team else "--base"
    if (base_ref := model_refs.locate_base(name, option=option)).digest != base.get("digest"):
        raise ModelError(
            f"the reply was made on the base {base.get('digest')!r:.14}, and {name!r} is {base_ref.short_digest}",
            f"--team TEAM.yaml, whose base has the digest {str(base.get('digest'))[:12]}",
        )
    return {"engine": config.dump(engine), "base": name}


def _engine_differences(receipt: Mapping[str, Any], about: EngineInfo) -> str:
    """Return the differences of this machine's engine from the one that answered, on the same base."""
    recorded = {**receipt["engine"], "template": receipt["base"].get("template_digest")}
    current = {"dtype": about.dtype, "device": about.device, "template": about.template_digest}
    return ", ".join(
        f"{name} was {recorded.get(name)} and is {value}"
        for name, value in current.items()
        if recorded.get(name) != value
    )


def _regenerate(engine: Engine, evidence: _Evidence, sampling: Sampling) -> str:
    content, adapter = evidence.content, BASE
    assert content is not None
    if evidence.release is not None:
        adapter = adapter_digest(evidence.release.manifest["files"])
        if adapter != evidence.receipt["adapter"]:
            raise ArtifactError(
                f"the Release has the adapter {adapter[:16]}, the receipt {evidence.receipt['adapter'][:16]}",
                f"fetch it anew by GET /v1/receipts/ID; if that says the same: {REPORT}",
            )
        engine.attach(adapter, evidence.release.path)
    call = GenerateCall(
        id=_CALL,
        adapter=adapter,
        messages=(*content.system, *content.messages),
        text=content.text,
        sampling=sampling,
        schema=content.schema,
        tools=content.tools,
        must_call=content.must_call,
    )
    engine.submit(call)
    pieces = []
    while engine.busy:
        for event in engine.step():
            if isinstance(event, ReplyFailed):
                raise ModelError(f"the reply could not be made anew: {event.problem}", event.remedy)
            pieces.append(event.text if isinstance(event, TextDelta) else "")
    return "".join(pieces)
