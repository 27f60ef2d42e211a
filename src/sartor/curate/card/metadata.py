"""Metadata of a Dataset: Croissant JSON-LD and the Hugging Face Hub header.

Specification: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html and its RAI vocabulary. Fields that
nobody stated (creator, address, date of publication) are left out; whoever publishes the Dataset adds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.core.filesystem import file_digest
from sartor.core.html import escape_control, flat, format_value
from sartor.core.licences.spdx import UNKNOWN
from sartor.curate.card.card_data import Contents
from sartor.curate.card.sections import file_name, known_languages

# SPDX id -> the Hub's id, if that is not the SPDX id in lower case
_RENAMED = {
    "ODC-By-1.0": "odc-by",
    "ODbL-1.0": "odbl",
    "PDDL-1.0": "pddl",
    "BSL-1.0": "bsl-1.0",
}
for _name in ("GPL-2.0", "GPL-3.0", "LGPL-2.1", "LGPL-3.0", "AGPL-3.0"):
    _RENAMED |= {f"{_name}-only": _name.lower(), f"{_name}-or-later": _name.lower()}
_KNOWN = """
    apache-2.0 mit afl-3.0 artistic-2.0 bsl-1.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0
    gpl-2.0 gpl-3.0 lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl
"""
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
)


def head(contents: Contents) -> dict[str, Any]:
    """Return the YAML head of the card: name, licence, languages, size, tasks and data files."""
    result: dict[str, Any] = {"pretty_name": contents.name[:120], **licence_fields(contents.licence, "manifest.json")}
    if languages := known_languages(contents):
        result["language"] = languages
    result["size_categories"] = [next((word for limit, word in _SIZES if contents.rows_kept < limit), "100B<n<1T")]
    result["task_categories"] = _tasks(contents)
    result["tags"] = ["sartor", "fine-tuning"]
    configs = [{"config_name": "default", "data_files": _example_files(contents.folder), "default": True}]
    if contents.drops.total:
        drop_files = [{"split": "train", "path": "drops/*.parquet"}]
        configs.append({"config_name": "drops", "data_files": drop_files})
    result["configs"] = configs
    return result


def _example_files(folder: Path) -> list[dict[str, str]]:
    """Return the files of each split, if they are named by it (`train-00000.parquet`); else all as `train`."""
    splits = {file.name.rpartition("-")[0] for file in (folder / "examples").glob("*-*.parquet")} - {"part"}
    if not splits:
        return [{"split": "train", "path": "examples/*.parquet"}]
    by_use = sorted(splits, key=lambda split: (split != "train", split))
    return [{"split": split, "path": f"examples/{split}-*.parquet"} for split in by_use]


def licence_fields(expression: str, link: str) -> dict[str, Any]:
    """Return the Hub's licence fields for an SPDX expression.

    An expression that the Hub does not know is given as `other`, with the expression as name.
    link: file of the repository that states the terms of such a licence.
    """
    if expression == UNKNOWN:
        return {"license": "unknown"}
    words = [_RENAMED.get(part, part.lower()) for part in conjuncts(expression)]
    if words and set(words) <= set(_KNOWN.split()):
        unique = list(dict.fromkeys(words))
        return {"license": unique[0] if len(unique) == 1 else unique}
    return {"license": "other", "license_name": expression[:200], "license_link": link}


def conjuncts(expression: str) -> Sequence[str]:
    """Return the ids that an expression joins by AND; the whole expression if it contains OR."""
    return [expression] if " OR " in expression else expression.split(" AND ")


def _tasks(contents: Contents) -> list[str]:
    media = contents.rows.media
    tasks = ["text-generation"]
    if media["image"]:
        tasks.append("image-text-to-text")
    if media["audio"]:
        tasks.append("audio-text-to-text")
    return tasks


_PARQUET = "application/x-parquet"
_TERMS = (
    "citeAs column conformsTo equivalentProperty extract field fileProperty fileObject fileSet format includes "
    "isArray "
    "isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate "
    "separator "
    "source subField transform arrayShape"
)
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    **{term: f"cr:{term}" for term in _TERMS.split()},
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
}
# column -> (type, description); the columns of `core/parquet_io.py`
_EXAMPLES = {
    "id": ("sc:Text", "Digest of the content: 32 hex digits."),
    "split": ("sc:Text", "train or eval; a group stands in one only."),
    "group": ("sc:Text", "What may never straddle a split."),
    "weight": ("sc:Float", "Weight of the row in tuning."),
    "rating": ("sc:Float", "What people made of the reply: -1 (bad) to 1 (good); 0 where nobody said."),
    "tools": ("sc:Text", "JSON text of the tools that the row may call; empty where there are none."),
}
# list column -> (description, {field: (JSON path inside an item, description)})
_LISTS = {
    "messages": (
        "The conversation, in the OpenAI form. Content is a list of parts; here stands the first.",
        {
            "role": ("role", "system, user, assistant or tool."),
            "text": ("content[0].text", "Text of the message's first part."),
            "image": ("content[0].image", "Path below media/ where the first part is an image."),
            "audio": ("content[0].audio", "Path below media/ where the first part is sound."),
        },
    ),
    "origins": (
        "Where the row came from; a row that two sources hold has two.",
        {
            "source": ("source", "The source as the recipe names it."),
            "locator": ("locator", "The place inside it."),
            "licence": ("licence", "SPDX expression."),
        },
    ),
}
_DROPS = {
    "reason": "Why the row was dropped, one word.",
    "detail": "Why, in a sentence.",
    "step": "The step that dropped it.",
    "source": "The source as the recipe names it.",
    "locator": "The place inside it.",
    "id": "Digest of the content.",
    "kept": "Of a duplicate: the id of the row that stands in its place.",
    "method": "By what measure the two are alike.",
    "text": "The start of the row.",
}


def describe(contents: Contents) -> dict[str, Any]:
    """Return the Croissant JSON-LD of a Dataset."""
    record_sets = [_examples()]
    if contents.drops.total:
        record_sets.append(_drops())
    result: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": escape_control(contents.name)[:200],
        "description": _description(contents),
        "license": [_licence_url(part) for part in conjuncts(contents.licence)],
        "isLiveDataset": False,
        "keywords": ["fine-tuning", "language model"],
        **_responsible(contents),
        "distribution": _distribution(contents.folder),
        "recordSet": record_sets,
    }
    if languages := known_languages(contents):
        result["inLanguage"] = languages
    return result


def _description(contents: Contents) -> str:
    if contents.made_by:
        return (
            f"{contents.rows_kept:,} synthetic rows for tuning a language model, made by "
            f"{escape_control(contents.made_by)} with Sartor; "
            f"what could not be used is in drops/. "
            f"Licence: {escape_control(contents.licence)}."
        )
    return (
        f"{contents.rows_kept:,} rows for tuning a language model, curated by Sartor from {contents.rows_read:,} rows "
        "read; "
        f"{sum(contents.dropped.values()):,} dropped, each with its reason, in drops/. "
        f"Licence: {escape_control(contents.licence)}."
    )


def _licence_url(part: str) -> str:
    """Return the SPDX address of a single licence id; any other expression as it is."""
    is_single_id = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", part)
    if is_single_id and part != UNKNOWN and not part.startswith("LicenseRef"):
        return f"https://spdx.org/licenses/{part}.html"
    return escape_control(part)


def _distribution(folder: Path) -> list[dict[str, Any]]:
    """Return every Parquet file with its digest, and the file sets.

    Media are one set without digests, since their names are digests.
    """
    entries: list[dict[str, Any]] = []
    for group in ("examples", "drops", "evidence"):
        files = sorted((folder / group).glob("*.parquet"))
        entries += [_file(file, f"{group}/{file.name}") for file in files]
        if files and group != "evidence":
            entries.append(_set(f"{group}-files", f"{group}/*.parquet", [_PARQUET]))
    if any((folder / "media").glob("*")):
        entries.append(_set("media-files", "media/*", ["image/*", "audio/*"]))
    return entries


def _file(file: Path, name: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{file.stat().st_size} B",
        "encodingFormat": _PARQUET,
        "sha256": file_digest(file),
    }


def _set(key: str, pattern: str, formats: list[str]) -> dict[str, Any]:
    return {"@type": "cr:FileSet", "@id": key, "name": key, "encodingFormat": formats, "includes": pattern}


def _field(record_set: str, name: str, kind: str, description: str) -> dict[str, Any]:
    source = {"fileSet": {"@id": f"{record_set}-files"}, "extract": {"column": name}}
    key = f"{record_set}/{name}"
    return {
        "@type": "cr:Field",
        "@id": key,
        "name": name,
        "description": description,
        "dataType": kind,
        "source": source,
    }


def _examples() -> dict[str, Any]:
    fields = [_field("examples", name, kind, description) for name, (kind, description) in _EXAMPLES.items()]
    for column, (description, parts) in _LISTS.items():
        inner = []
        for name, (path, part_description) in parts.items():
            part = _field("examples", column, "sc:Text", part_description)
            part |= {"@id": f"examples/{column}/{name}", "name": name}
            part["source"]["transform"] = {"jsonPath": path}
            inner.append(part)
        key = f"examples/{column}"
        listed = {
            "@type": "cr:Field",
            "@id": key,
            "name": column,
            "description": description,
            "repeated": True,
            "subField": inner,
        }
        fields.append(listed)
    return {
        "@type": "cr:RecordSet",
        "@id": "examples",
        "name": "examples",
        "description": "The rows that were kept.",
        "key": {"@id": "examples/id"},
        "field": fields,
    }


def _drops() -> dict[str, Any]:
    fields = [_field("drops", name, "sc:Text", description) for name, description in _DROPS.items()]
    fields.append(_field("drops", "score", "sc:Float", "How alike the two are, 0..1."))
    description = "The rows that were dropped, and why."
    return {"@type": "cr:RecordSet", "@id": "drops", "name": "drops", "description": description, "field": fields}


def _responsible(contents: Contents) -> dict[str, Any]:
    """Return the fields of Croissant's RAI vocabulary that the facts can fill."""
    collection = "Read from existing files."
    if contents.sources:
        sources = "; ".join(f"{file_name(file)} ({file.get('licence') or UNKNOWN})" for file in contents.sources[:20])
        suffix = f"; and {len(contents.sources) - 20:,} more files" if len(contents.sources) > 20 else ""
        collection = f"Read from existing files: {escape_control(sources)}{suffix}."
    personal = "No step that looks for personal data was run."
    if contents.steps.get("personal_data"):
        facts = flat(contents.steps["personal_data"])
        counted = escape_control(", ".join(f"{key} {format_value(value)}" for key, value in facts.items()))
        personal = f"Looked for by pattern, masked or dropped before anything was written. Counts: {counted}."
    unusable = sum(count for (step, _), count in contents.drops.by_step.items() if step == "read")
    queued = sum(contents.evidence.files[name] for name in contents.evidence.queues)
    annotation = f"{queued:,} rows are queued for a look as perhaps wrongly labelled (evidence/)." if queued else ""
    fields = {
        "rai:dataCollection": collection,
        "rai:dataCollectionType": "Software Generated" if contents.made_by else "Secondary data analysis",
        "rai:dataCollectionMissingData": f"{unusable:,} of {contents.rows_read:,} rows could not be used as they "
        "stood.",
        "rai:dataPreprocessingProtocol": _protocol(contents.facts.get("recipe") or {}),
        "rai:dataUseCases": "Fine-tuning of language models.",
        "rai:personalSensitiveInformation": personal,
        "rai:dataLimitations": [escape_control(str(line)) for line in contents.facts.get("licence_conflicts") or ()],
        "rai:dataAnnotationAnalysis": annotation,
    }
    return {key: value for key, value in fields.items() if value}


def _protocol(recipe: Mapping[str, Any]) -> list[str]:
    lines = []
    for step in recipe.get("steps") or ():
        text = str(step)
        if isinstance(step, Mapping):
            text = ", ".join(f"{key} {format_value(value)}" for key, value in flat(step).items())
        lines.append(escape_control(text))
    return lines
