"""Review: findings about rows one after the other, decided by keyboard, under the user's name.

Decisions are appended to the queue that `sartor review` uses, beside those of others. Nobody sees the verdicts of
others before their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import sartor
from sartor.core.artifacts import Artifact
from sartor.core.errors import ConfigError
from sartor.core.text_differences import differences
from sartor.studio.dataset_rows import EXAMPLES, RowTable, row_media
from sartor.studio.page_renderer import redirect, render
from sartor.studio.visitor import PostedForm, Reviewer, studio_of, text_field

router = APIRouter()
MAX_LISTED = 5000
REVIEW_FILE = "review.jsonl"
VERDICTS = ("accept", "edit", "reject")
LABEL_EVIDENCE = "evidence/suspicious_labels.parquet"


@router.get("/review")
def queues(request: Request, visitor: Reviewer) -> Response:
    """List the Datasets that have findings, with their counts."""
    found = []
    artifacts, _ = studio_of(request).folder.scan()
    for item in artifacts:
        if item.kind == "dataset" and item.artifact and _has_findings(item.artifact):
            found.append((item, sartor.review_counts(item.artifact.path)))
    return render(request, visitor, "review_queues", found=found)


def _has_findings(dataset: Artifact) -> bool:
    return (dataset.path / REVIEW_FILE).is_file() or LABEL_EVIDENCE in dataset.manifest["files"]


@router.get("/review/{name:path}")
def review(
    request: Request,
    visitor: Reviewer,
    name: str,
    after: str = "",
    item: str = "",
    decided: str = "",
    settle: str = "",
) -> Response:
    """Show a finding: the one that is asked for, or the next one that the user has not decided.

    after: the finding that was shown last, decided or skipped. decided: the one whose decision was just stored.
    settle: not empty to settle a disagreement, which shows what the others decided.
    """
    assert visitor.user is not None
    dataset = studio_of(request).folder.artifact(name, ("dataset",))
    listed = sartor.review_list(dataset.path, by=visitor.user.name, most=MAX_LISTED)
    waiting = [line["id"] for line in listed["items"]]
    chosen = item or _next(waiting, after)
    finding = sartor.review_show(dataset.path, chosen) if chosen else None
    return render(
        request,
        visitor,
        "review",
        title=name,
        name=name,
        counts={key: listed[key] for key in ("open", "conflicts", "accepted", "edited", "rejected")},
        waiting=len(waiting) + listed["more"],
        finding=finding,
        reply=_reply_of(finding) if finding else "",
        suggested=_suggested(finding) if finding else None,
        mine=_own(finding, visitor.user.name) if finding else "",
        decided=decided,
        settles=bool(settle and finding and finding["state"] == "conflict"),
        # a finding of personal data is shown masked, and a picture cannot be
        media=_media(dataset, finding["rows"]) if finding and finding["kind"] != "personal" else {},
        arguments=["review", "accept", str(dataset.path), chosen, f"--by={visitor.user.name}"] if chosen else [],
    )


def _next(waiting: Sequence[str], after: str) -> str:
    """Return the first finding that waits after another one; from the beginning again at the end."""
    if after in waiting:
        position = waiting.index(after) + 1
        return waiting[position % len(waiting)]
    return waiting[0] if waiting else ""


def _reply_of(finding: Mapping[str, Any]) -> str:
    """Return the last reply of a finding's only row; empty for several rows."""
    if len(finding["rows"]) != 1:
        return ""
    return str(finding["rows"][0]["messages"][-1].get("text", ""))


def _media(dataset: Artifact, rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, list[dict[str, Any]]]]:
    """Return {id: (position, pictures and recordings)} of the rows that name some and are in the Dataset."""
    ids = [row["id"] for row in rows if any(message.get("media") for message in row["messages"])]
    examples = RowTable(dataset, EXAMPLES)
    positions = examples.find(ids)
    shown = examples.take(list(positions.values()), ["messages", "rejected"])
    return {
        identity: (position, row_media(row))
        for (identity, position), row in zip(positions.items(), shown, strict=True)
    }


def _suggested(finding: Mapping[str, Any]) -> Any:
    """Return (pieces of the reply, pieces of the suggested one) with the differing words marked; None without one."""
    suggestion = finding.get("suggestion") or {}
    if not isinstance(suggestion.get("reply"), str) or not _reply_of(finding):
        return None
    return differences(_reply_of(finding), suggestion["reply"])


def _own(finding: Mapping[str, Any], user: str) -> str:
    """Return the newest verdict of a user; empty if there is none."""
    verdicts = [decision["verdict"] for decision in finding["decisions"] if decision["by"] == user]
    return str(verdicts[-1]) if verdicts else ""


@router.post("/review/{name:path}")
def decide(request: Request, visitor: Reviewer, name: str, form: PostedForm) -> Response:
    """Store the user's decision, and show the next finding."""
    assert visitor.user is not None
    dataset = studio_of(request).folder.artifact(name, ("dataset",))
    item, verdict = text_field(form, "item"), text_field(form, "verdict")
    if verdict not in VERDICTS:
        raise ConfigError(f"there is no verdict {verdict[:40]!a}", f"one of {', '.join(VERDICTS)}")
    change = None
    if verdict == "edit" and (reply := text_field(form, "reply", max_chars=1_000_000)):
        change = {"reply": reply}
    opinion = sartor.Opinion(
        verdict,
        visitor.user.name,
        reason=text_field(form, "reason"),
        change=change,
        settles=bool(text_field(form, "settle")),
    )
    sartor.review_decide(dataset.path, [item], opinion)
    return redirect(request, f"/review/{name}", after=item, decided=item)


@router.get("/agreement/{name:path}")
def agreement(request: Request, visitor: Reviewer, name: str) -> Response:
    """Show how far each two reviewers agree. Of a disagreement it names the finding, not the verdicts."""
    dataset = studio_of(request).folder.artifact(name, ("dataset",))
    measured = sartor.review_agreement(dataset.path)
    return render(
        request,
        visitor,
        "review_agreement",
        title=name,
        name=name,
        pairs=measured["pairs"],
        conflicts=measured["conflicts"],
        path=str(dataset.path),
    )
