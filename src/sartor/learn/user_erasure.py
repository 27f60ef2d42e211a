"""The verb `personal forget`: erasure of a user's data, with a signed proof.

The order ensures that nothing removed is made again: registry rows, files, feedback, Datasets made of it, receipts. On
the change of the registry a server releases the adapter, forgets remembered words and replaces its workers. Then the
databases are rewritten, and everything is searched for the user's words. What lies beyond this machine's reach is
named.

    STATE/deletions/forgotten-<time>-<digest>.json    the proof: `sartor personal proof` checks it

The proof and the registry's log keep the keyed digest that the user had, and none of the words.
"""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sartor.core import catalogue, home, signing
from sartor.core import parquet_io as stored
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.database import scrub_file
from sartor.core.errors import ArtifactError, BusyError, RefusedError
from sartor.core.filesystem import FileSystem, file_digest, fsync_directory, writer_lock
from sartor.core.lineage.receipt_index import INDEX
from sartor.core.records import Feedback
from sartor.core.signing import PublicKey
from sartor.curate.dataset_writer import write_dataset_from
from sartor.learn.user_data import ScanResult, SearchTerms, is_made_of, open_team_registry, search
from sartor.personalization.erasure_receipt import check_receipt, write_receipt
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.receipts import TeamSigner, erase_receipts, team_digest
from sartor.serving.registry import server_presence
from sartor.serving.registry.registry import ChangeCause
from sartor.serving.registry.user_versions import FOLDER, TUNING, UserVersionStore, folder_of, required_user_digest
from sartor.serving.team_config import OpenAiEngineOptions, Team

WITHIN_S = 300.0
# published files, checked against their digests whenever they are opened: they can hold nothing of a user
SHARED = ("assets", "bases", "towers")
UNREACHED = (
    "copies of the state directory, the registry or the artefacts that somebody made (backups)",
    "snapshots and journals of the file system, and worn blocks of a flash disk",
    "what a client, a proxy or a server of logs has kept of requests and replies",
)
Notice = Callable[[str], object]


@dataclass
class _Done:
    """Data that was removed.

    files: path below the state -> digest and bytes.
    lines: keyed digests of lines of feedback.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    torn_lines: int = 0
    datasets: list[dict[str, Any]] = field(default_factory=list)
    receipts: int = 0
    caches: list[str] = field(default_factory=list)


def forget_personal(
    team: Team | Path | str, user: str, *, by: str = "", within_s: float = WITHIN_S, notice: Notice = lambda line: None
) -> dict[str, Any]:
    """Remove everything of a user that this machine keeps for a team, and sign what was done.

    by: who orders it.
    within_s: seconds that running servers may take. Returns the proof, and its file as `proof`. Raises BusyError if a
    server has not confirmed the release of the adapter, RefusedError if words of the user are still found or files
    could not be searched; the proof states it. Raises ConfigError while a tuning for the user runs: nothing is removed
    then.
    """
    with open_team_registry(team) as (loaded_team, registry), ExitStack() as stack:
        state, store = Path(loaded_team.state).absolute(), UserVersionStore(registry.database)
        digest = team_digest(state)
        person = required_user_digest(user, digest)
        for agent in folder_of(state, person).glob("*"):
            stack.enter_context(writer_lock(agent / TUNING))  # a tuning would write the data again
        inbox = FeedbackStore(state / "inbox")
        words = [*_words(inbox, person), *_rows_of(state, person)]
        done = _Done()
        generation, done.rows = store.forget(person, ChangeCause(by or getpass.getuser(), "sartor personal forget"))
        notice(f"registry: {dict(done.rows)}; waiting for servers")
        confirmed, unconfirmed = server_presence.wait_for(state, generation, within_s)
        _remove_files(state, person, done)
        removed = inbox.remove(lambda feedback: feedback.by.user == person)
        done.lines = [digest("feedback", line.feedback.as_json()) for line in removed if line.feedback is not None]
        done.torn_lines = sum(line.feedback is None for line in removed)
        done.datasets = list(_clean_datasets(state, {line.location for line in removed}))
        done.receipts, _ = erase_receipts(state / "receipts", person)
        if any(line.feedback is not None and _has_media(line.feedback) for line in removed):
            done.caches = _empty_features()
        scrubbed = {registry.database.name: registry.database.scrub("people", "speakers")}
        for database_file in (state / "receipts" / INDEX, home.home() / "catalogue.sqlite"):
            if database_file.is_file():
                scrubbed[str(database_file)] = scrub_file(database_file)
        notice("searching")
        people = {file.name for file in (state / FOLDER).glob("*")}
        others = [*_words(inbox), *(text for item in people for text in _rows_of(state, item))]
        needles = SearchTerms(words, others)
        folders = [state, home.home(), *registry.database.files]
        scan = search(needles, folders, [home.home() / name for name in SHARED], state)
        proof = _proof(loaded_team, person, generation, done) | {
            "servers": {"let_go": confirmed, "not_confirmed": unconfirmed},
            "databases": scrubbed,
            "searched": _searched(needles, scan, folders, store.mentions(person)),
            "complete": not (unconfirmed or scan.found or scan.unread or any(store.mentions(person).values())),
            "by": by or getpass.getuser(),
        }
        TeamSigner.of(state)  # creates the team's keys, if no server did
        folder = state / "deletions"
        folder.mkdir(mode=0o700, exist_ok=True)
        file = write_receipt(FileSystem(), folder, proof, signing.open_private(state / "keys", "proof"))
    _raise_for(file, unconfirmed, scan)
    return {**proof, "proof": str(file)}


def check_proof(file: Path | str, key: Path | str | None = None) -> dict[str, Any]:
    """Return the content of a proof that `key` signed, by default a key in SARTOR_HOME/trusted.

    Raises SignatureError.
    """
    trusted: Sequence[PublicKey] | None = [signing.open_public(Path(key))] if key else None
    return check_receipt(Path(file), trusted)


def _raise_for(file: Path, unconfirmed: Sequence[int], scan: ScanResult) -> None:
    if unconfirmed:
        problem = (
            f"everything was removed, but the servers {unconfirmed} have not confirmed that they let go; {file} says "
            "so"
        )
        raise BusyError(problem, "stop those servers, then sartor personal forget TEAM --user USER again", WITHIN_S)
    if scan.found or scan.unread:
        files = ", ".join([*scan.found, *scan.unread][:5])
        raise RefusedError(
            f"words of that user are still in, or could not be looked for in: {files}; {file} names all",
            "rm FILE, for each, then sartor personal forget TEAM --user USER",
        )


def _words(inbox: FeedbackStore, person: str = "") -> Iterator[str]:
    """Yield the texts of the inbox, of one person or of all; system prompts belong to nobody and are skipped."""
    for line in inbox.lines():
        feedback = line.feedback
        if feedback is not None and person in ("", feedback.by.user):
            yield from (feedback.text, feedback.reply, feedback.correction, feedback.comment)
            for message in feedback.messages:
                yield from _texts(message.get("content", "") if message.get("role") != "system" else "")


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list | tuple):
        yield from (
            str(part["text"]) for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        )


def _rows_of(state: Path, person: str) -> Iterator[str]:
    """Yield texts of the Datasets below the person's folder: files given with --data may have left no other trace."""
    for dataset in folder_of(state, person).glob("*/*/rows"):
        try:
            for example in stored.read_examples(open_artifact(dataset, "dataset")):
                yield from (message.text for message in example.messages if message.role != "system")
        except ArtifactError:
            continue  # damaged: it is removed as it is


def _remove_files(state: Path, person: str, done: _Done) -> None:
    folder = folder_of(state, person)
    for file in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if file.is_file() and file.name != f".{TUNING}.lock":
            done.files[str(file.relative_to(state))] = {"sha256": file_digest(file), "bytes": file.stat().st_size}
    done.artifacts = catalogue.forget(folder)
    if folder.is_dir():
        shutil.rmtree(folder)
        fsync_directory(folder.parent)


def _clean_datasets(state: Path, line_locators: set[str]) -> Iterator[dict[str, Any]]:
    """Remove rows made of these lines of the inbox from every Dataset in the catalogue; yield the changes."""
    for path in catalogue.existing("dataset") if line_locators else []:
        try:
            dataset = open_artifact(path, "dataset")
        except ArtifactError:
            continue
        if any(is_made_of(source, state) for source in dataset.manifest["sources"]):
            yield from _remove_rows(dataset, line_locators)


def _remove_rows(dataset: Artifact, line_locators: set[str]) -> Iterator[dict[str, Any]]:
    def is_of(locators: Sequence[str]) -> bool:
        return all(locator.rpartition("/")[2] in line_locators for locator in locators)

    examples, drops = list(stored.read_examples(dataset)), list(stored.read_drops(dataset))
    remaining = []
    for example in examples:
        if not is_of([origin.locator for origin in example.origins]):
            remaining.append(example)
    remaining_drops = [drop for drop in drops if not is_of([drop.locator])]
    if (len(remaining), len(remaining_drops)) == (len(examples), len(drops)):
        return
    descendants = [asdict(item) for item in catalogue.descendants(dataset.id)]
    fields = {
        "path": str(dataset.path),
        "id": dataset.id,
        "rows": len(examples) - len(remaining),
        "drops": len(drops) - len(remaining_drops),
    }
    if remaining:
        step = {"forgotten": {"rows": fields["rows"], "drops": fields["drops"]}}
        fields["became"] = write_dataset_from(
            dataset.path, [dataset], remaining, remaining_drops, step=step, replace=True
        ).id
    else:
        catalogue.forget(dataset.path)
        shutil.rmtree(dataset.path)
    # weights cannot be searched for words: their owner decides
    yield {**fields, "tuned_on_it": [descendant for descendant in descendants if descendant["state"] == "stands"]}


def _has_media(feedback: Feedback) -> bool:
    return any(not isinstance(message.get("content", ""), str) for message in feedback.messages)


def _empty_features() -> list[str]:
    """Delete the cached features of pictures and recordings, and return the deleted folder.

    They are stored under digests of their bytes, and computed again on demand.
    """
    folder = home.home() / "features"
    if not folder.is_dir():
        return []
    shutil.rmtree(folder)
    return [str(folder)]


def _proof(team: Team, person: str, generation: int, done: _Done) -> dict[str, Any]:
    not_reached = [*UNREACHED]
    if isinstance(team.engine, OpenAiEngineOptions):
        not_reached.append(f"caches of the server at {team.engine.url}, which is not this team's")
    if not team.registry_url.startswith("sqlite"):
        not_reached.append("state directories of other machines that share this registry: forget the user there, too")
    return {
        "person": person,
        "team": team.state,
        "registry_change": generation,
        "removed": asdict(done),
        "not_reached": not_reached,
        "backups": list(team.personal.backups),
    }


def _searched(
    needles: SearchTerms, scan: ScanResult, folders: Sequence[Path], rows: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "texts": needles.texts,
        "too_short": needles.too_short,
        "said_by_others_too": needles.said_by_others,
        "folders": [str(folder) for folder in folders],
        "left_out": {str(home.home() / name): "published files, checked by their digests" for name in SHARED},
        "rows_of_tables": dict(rows),
        **asdict(scan),
    }
