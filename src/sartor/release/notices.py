"""Notices of a Release or export: licences, obligations, prescribed sentences.

The sentences are those of Llama's community licences (1.b.i, 1.b.iii), Gemma's terms of use (3.1) and Qwen's licence
agreement, read on 2026-11-29 (`core/licences/licence_families.py`). This is no legal advice.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from sartor.core import model_refs
from sartor.core.errors import HubError, ModelError
from sartor.core.licences import compliance
from sartor.core.licences.licence_families import Obligation

FILE = "NOTICE.md"
_LEGAL = re.compile(r"(licen[cs]e|notice|use_policy|copying).*$", re.IGNORECASE)
# obligation -> sentence that its licence requires to be displayed
_SENTENCES: Mapping[Obligation, str] = {
    "built-with-llama": "Built with Llama",
    "built-with-llama-3": "Built with Meta Llama 3",
    "built-with-qwen": "Built with Qwen",
}
# (pattern of a licence, notice that must accompany copies)
_NOTICES = (
    (
        r"LicenseRef-.*llama-?2\b.*",
        "Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
    ),
    (
        r"LicenseRef-.*llama-?3[.-]1\b.*",
        "Llama 3.1 is licensed under the Llama 3.1 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    ),
    (
        r"LicenseRef-.*llama-?3[.-]2\b.*",
        "Llama 3.2 is licensed under the Llama 3.2 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    ),
    (
        r"LicenseRef-.*llama-?3[.-]3\b.*",
        "Llama 3.3 is licensed under the Llama 3.3 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    ),
    (
        r"LicenseRef-.*llama-?3\b.*",
        "Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    ),
    (
        r"LicenseRef-.*llama-?4\b.*",
        "Llama 4 is licensed under the Llama 4 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    ),
    (
        r"LicenseRef-.*gemma\b.*",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
)


def sentences(manifest: Mapping[str, Any]) -> list[str]:
    """Return the sentences that the licences of an artefact's sources and base prescribe, word for word."""
    duties = compliance.duties_by_licence(compliance.made_from(manifest))
    lines = []
    for licence, duties_of_licence in duties.items():
        lines += [_SENTENCES[duty] for duty in duties_of_licence if duty in _SENTENCES]
        lines += [text for pattern, text in _NOTICES if re.fullmatch(pattern, licence, re.IGNORECASE)][:1]
    return list(dict.fromkeys(lines))


def missing_texts(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """Return (problem, remedy) if a base's use restrictions are not passed on; empty strings if they are.

    Everybody who gets a model made from such a base must get the text of its licence. The text is copied into the
    Release
    if it is in the base's directory.
    """
    base = manifest["base"]
    duties = compliance.duties_by_licence([{"source": compliance.base_source(base), "licence": base["licence"]}])
    binding = sorted(licence for licence, of_licence in duties.items() if "use-policy" in of_licence)
    if not binding:
        return "", ""
    binds = f"{' and '.join(binding)} binds whoever gets it to its use restrictions"
    folder = base_folder(manifest)
    if folder is None:
        problem = f"{binds}, and the base, beside which its text would stand, is not on this machine"
        return problem, f"put the base back as {base['name']}, with the text of its licence as LICENSE"
    # a NOTICE file names the authors, not the use restrictions
    if any(not file.name.lower().startswith("notice") for file in legal_texts(folder)):
        return "", ""
    problem = f"{binds}, and no copy of its text stands in {folder}"
    return problem, f"save the text of the licence as {folder / 'LICENSE'}: it then goes out with the Release"


def base_folder(manifest: Mapping[str, Any]) -> Path | None:
    """Return the directory of the base that an artefact was tuned on; None if it is not on this machine."""
    try:
        folder = model_refs.locate_base(manifest["base"]["name"]).path
    except (ModelError, HubError):
        return None
    return folder if folder.is_dir() else None


def legal_texts(folder: Path) -> list[Path]:
    """Return the non-empty licences, notices and use policies in a base's directory."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _LEGAL.match(file.name)]
    return [file for file in files if file.read_bytes().strip()]


def write_notice(manifest: Mapping[str, Any], licence: str, part: Path, base: Path | None) -> None:
    """Write NOTICE.md with every licence involved and its obligations; copy the legal texts of the base.

    part: output directory. base: directory of the base, or None.
    """
    sources = [{**source, "source": _short(source)} for source in compliance.made_from(manifest)]
    obligations = compliance.obligations(sources) or ["nothing"]
    rows = [
        f"- {source['source']}: {source['licence']}" + (f", sha256 {source['sha256']}" if source.get("sha256") else "")
        for source in sources
    ]
    wanted = sentences(manifest)
    lines = [
        f"# Licences of {manifest['name']} {manifest['version']}",
        "",
        *(line for sentence in wanted for line in (sentence, "")),
        f"Together: {licence}. Meant for {manifest.get('use', 'commercial')} use.",
        "",
        "What whoever hands it on has to do:",
        "",
        *(f"- {line}" for line in obligations),
        "",
        "Made from:",
        "",
        *rows,
        "",
    ]
    (part / FILE).write_text("\n".join(lines), encoding="utf-8")
    for file in legal_texts(base) if base else ():
        shutil.copyfile(file, part / f"base-{file.name}")


def _short(source: Mapping[str, Any]) -> str:
    """Return the name of a source without the directories of the machine on which it was read."""
    if not source.get("path"):
        return str(source["source"])
    name = PurePath(str(source["source"])).name
    return name if name == PurePath(source["path"]).name else f"{name}/{source['path']}"
