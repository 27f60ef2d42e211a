"""What travels with every export: tokenizer, chat template, sampling defaults, a card, licences and what they demand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from sartor.core import model_refs
from sartor.core.artifacts import Artifact
from sartor.core.errors import GateError
from sartor.core.licences import compliance
from sartor.models.base import Base, open_chat

# as transformers names them: the tokenizer, whole
_TOKENIZER = re.compile(
    r"(tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.model|.*\.tiktoken)$"
)
_LEGAL = re.compile(r"(licen[cs]e|notice|use_policy|copying).*$", re.IGNORECASE)
_TEMPLATE = "chat_template.jinja"


def write_tokenizer(base: Base, part: Path) -> None:
    """The base's tokenizer files as they are, and the chat template that the Release is bound to.

    Raises GateError if what transformers then opens has another template.
    """
    for file in sorted(base.ref.path.iterdir()):
        if file.is_file() and _TOKENIZER.match(file.name):
            shutil.copyfile(file, part / file.name)
    write_template(base, part)
    if (found := open_chat(part).template_digest) != base.chat.template_digest:
        raise GateError(
            f"transformers would use the chat template {found[:12]} here, and the Release is bound to "
            f"{base.chat.template_digest[:12]}",
            f"remove the chat template from the tokenizer_config.json of {base.ref.path}, and tune again",
        )


def write_template(base: Base, part: Path) -> None:
    """The chat template, byte for byte."""
    (part / _TEMPLATE).write_bytes(base.chat.template.encode())


def write_generation_config(release: Artifact, base: Base, part: Path) -> None:
    """The Release's sampling as transformers takes it by default, and the tokens that end a reply."""
    sampling = release.manifest["sampling"]
    drawn = {"do_sample": True, "temperature": sampling["temperature"], "top_p": sampling["top_p"]}
    said: dict[str, Any] = {
        "eos_token_id": list(base.chat.stops),
        "pad_token_id": base.chat.pad,
        "max_new_tokens": sampling["max_tokens"],
        **(drawn if sampling["temperature"] else {"do_sample": False}),
    }
    bos = base.chat.tokenizer.bos_token_id
    (part / "generation_config.json").write_text(
        json.dumps({**said, **({} if bos is None else {"bos_token_id": bos})}, indent=1) + "\n"
    )


def write_card(release: Artifact, base: Base, form: str, part: Path, use: str) -> None:
    """README.md: what this is, how it is loaded (`use`), what it was made of; its front matter names the licence."""
    manifest = release.manifest
    name = f"{manifest['name']} {manifest['version']}"
    system, bias = manifest["system_prompt"], manifest["gate"].get("bias")
    lines = [
        "---",
        f"license: {_as_hub_spells(release.licence)}",
        "tags: [sartor]",
        "---",
        "",
        f"# {name} ({form})",
        "",
        f"A tune of the base `{manifest['base']['name']}` (digest `{manifest['base']['digest']}`), exported from the signed "
        f"Release `{release.id}`. How alike it answers in other runtimes was measured: `parity.json`.",
        "",
        *use.splitlines(),
        "",
        f"Greedy replies (temperature 0) of at most {manifest['sampling']['max_tokens']} tokens are what was evaluated."
        if not manifest["sampling"]["temperature"]
        else f"Replies are drawn at temperature {manifest['sampling']['temperature']}, top_p {manifest['sampling']['top_p']}.",
        "It was tuned with this system prompt, which is to go first:" if system else "It was tuned without a system prompt.",
        *(["", *(f"> {line}" for line in system.splitlines())] if system else []),
        "",
        f"Meant for {manifest.get('use', 'commercial')} use. Licences, and what they demand: `NOTICE.md`.",
        *(["", f"Audit of bias: {bias['outcome']}. {bias['detail']}"] if bias else []),
        "",
    ]
    (part / "README.md").write_text("\n".join(lines), encoding="utf-8")


def write_notice(release: Artifact, base: Base, part: Path) -> None:
    """NOTICE.md: every licence that this was made from, and what each demands of who hands it on; texts beside the base too."""
    manifest = release.manifest
    made_from = [{**source, "source": _short(source)} for source in compliance.made_from(manifest)]
    owed = compliance.obligations(made_from) or ["nothing"]
    rows = [
        f"- {source['source']}: {source['licence']}" + (f", sha256 {source['sha256']}" if source.get("sha256") else "")
        for source in made_from
    ]
    lines = [
        f"# Licences of {manifest['name']} {manifest['version']}",
        "",
        f"Together: {release.licence}. Meant for {manifest.get('use', 'commercial')} use.",
        "",
        "What whoever hands it on has to do:",
        "",
        *(f"- {line}" for line in owed),
        "",
        "Made from:",
        "",
        *rows,
        "",
    ]
    (part / "NOTICE.md").write_text("\n".join(lines), encoding="utf-8")
    for file in sorted(base.ref.path.iterdir()):
        if file.is_file() and _LEGAL.match(file.name):
            shutil.copyfile(file, part / f"base-{file.name}")


def _short(source: Mapping[str, Any]) -> str:
    """A source without the folders of the machine that it was read on."""
    if not source.get("path"):
        return str(source["source"])
    name = PurePath(str(source["source"])).name
    return name if name == PurePath(source["path"]).name else f"{name}/{source['path']}"


def readable(part: Path) -> None:
    """Give every file the rights that a new file has here: some writers keep theirs from all other users."""
    usual = (part / "README.md").stat().st_mode
    for file in part.rglob("*"):
        if file.is_file():
            file.chmod(usual)


def _as_hub_spells(licence: str) -> str:
    """The hub's spelling of the licences that `bases` reads back; other expressions as they are."""
    return licence.lower() if licence in model_refs.HUB_LICENCES.values() else licence
