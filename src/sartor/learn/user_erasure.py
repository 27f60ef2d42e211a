"""The verb `personal forget`: erasure of a user's data, with a signed proof.

The order ensures that nothing removed is made again: registry rows, files, feedback, Datasets made of it, receipts. On
the change of the registry a server releases the adapter, forgets remembered words and replaces its workers. Then the
databases are rewritten, and everything is searched for the user's words, also in compressed files. What lies beyond
this machine's reach is named.

What an erasure has begun is written down first (`deletion_intent.py`): one that is killed, or that finds words left,
is ended by the next. The proof (`deletion_proof.py`) and the registry's log keep the keyed digest that the user had,
and none of the words.
"""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sartor.core import catalogue, home, signing, trace_store
from sartor.core import parquet_io as stored
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.database import scrub_file
from sartor.core.errors import ArtifactError, BusyError, RefusedError
from sartor.core.filesystem import FileSystem, file_digest, fsync_directory, writer_lock
from sartor.core.lineage.receipt_index import INDEX
from sartor.core.records import Feedback
from sartor.curate.dataset_writer import write_dataset_from
from sartor.learn.deletion_intent import FOLDER as DELETIONS
from sartor.learn.deletion_intent import DeletionIntent, Descended
from sartor.learn.deletion_proof import STANDS, Verdict, descended_from, tuned_on_user, verdict_of
from sartor.learn.user_data import ScanResult, SearchTerms, is_made_of, open_team_registry, search
from sartor.personalization.erasure_receipt import write_receipt
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.plans.plan_log import erase_runs
from sartor.serving.receipts import Digest, TeamSigner, erase_receipts, team_digest
from sartor.serving.registry import server_presence
from sartor.serving.registry.registry import ChangeCause
from sartor.serving.registry.user_versions import FOLDER, TUNING, UserVersionStore, folder_of, required_user_digest
from sartor.serving.team_config import OpenAiEngineOptions, Team

WITHIN_S = 300.0
_TRIES = 5
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
    runs: number of lines of plans' logs.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    torn_lines: int = 0
    datasets: list[dict[str, Any]] = field(default_factory=list)
    receipts: int = 0
    runs: int = 0
    caches: list[str] = field(default_factory=list)


def forget_personal(
    team: Team | Path | str, user: str, *, by: str = "", within_s: float = WITHIN_S, notice: Notice = lambda line: None
) -> dict[str, Any]:
    """Remove everything of a user that this machine keeps for a team, and sign what was done.

    by: who orders it.
    within_s: seconds that running servers may take. Returns the proof, and its file as `proof`; `verdict` is one of
    `Verdict`. Raises BusyError if a server has not confirmed the release of the adapter, RefusedError if words or rows
    of the user are still found or files could not be searched; the proof states it. Raises ConfigError while a tuning
    for the user runs or another process forgets the same user: nothing is removed then.
    """
    with open_team_registry(team) as (loaded_team, registry), ExitStack() as stack:
        state, store = Path(loaded_team.state).absolute(), UserVersionStore(registry.database)
        digest = team_digest(state)
        person = required_user_digest(user, digest)
        locked: set[Path] = set()
        _lock_tunings(state, person, stack, locked)  # a tuning would write the data again
        (state / DELETIONS).mkdir(mode=0o700, exist_ok=True)
        stack.enter_context(writer_lock(state / DELETIONS / person))
        TeamSigner.of(state)  # creates the team's keys, if no server did
        inbox, done, intent = FeedbackStore(state / "inbox"), _Done(), _begin(state, person)
        generation, done.rows = store.forget(person, ChangeCause(by or getpass.getuser(), "sartor personal forget"))
        notice(f"registry: {dict(done.rows)}; waiting for servers")
        confirmed, unconfirmed = server_presence.wait_for(state, generation, within_s)
        _lock_tunings(state, person, stack, locked)  # one may have begun before the registry said that they are gone
        intent.add(_rows_of(state, person), {}, has_media=False)
        _remove_files(state, person, done)
        _remove_lines(inbox, person, digest, intent, done)
        done.datasets = list(_clean_datasets(state, intent))
        done.receipts, _ = erase_receipts(state / "receipts", person)
        done.runs = erase_runs(state / "plans", person)
        done.caches += _empty_caches(intent)
        scrubbed = {registry.database.name: registry.database.scrub("people", "speakers", "heads")}
        for database_file in (state / "receipts" / INDEX, home.home() / "catalogue.sqlite"):
            if database_file.is_file():
                scrubbed[str(database_file)] = scrub_file(database_file)
        notice("searching")
        descended = tuned_on_user(state, person, intent)
        done.caches += _remove_sketches(descended, done)
        people = {file.name for file in (state / FOLDER).glob("*")}
        others = [*_words(inbox), *(text for item in people for text in _rows_of(state, item))]
        needles = SearchTerms(intent.words, others)
        made_of_it = [Path(item["path"]) for item in descended]
        folders = [state, home.home(), *registry.database.files, *_outside(state, [*made_of_it, *_changed(done)])]
        left_out = [*(home.home() / name for name in SHARED), intent.file]
        scan = search(needles, folders, left_out, state, made_of_it)
        mentions = store.mentions(person)
        is_left = bool(unconfirmed or scan.found or scan.unread or any(mentions.values()))
        verdict = verdict_of(is_left=is_left, tuned_on_it=descended)
        proof = _proof(loaded_team, person, generation, done) | {
            "servers": {"let_go": confirmed, "not_confirmed": unconfirmed},
            "databases": scrubbed,
            "searched": _searched(needles, scan, folders, mentions),
            "tuned_on_it": descended,
            "verdict": verdict,
            "complete": verdict is Verdict.REMOVED,
            "by": by or getpass.getuser(),
        }
        file = write_receipt(FileSystem(), state / DELETIONS, proof, signing.open_private(state / "keys", "proof"))
        if not is_left:
            intent.remove()
    _raise_for(file, unconfirmed, scan, mentions)
    if verdict is Verdict.WEIGHTS_STAND:
        notice(f"{verdict}: {', '.join(item['path'] for item in descended if item['state'] == STANDS)}")
    return {**proof, "proof": str(file)}


def _lock_tunings(state: Path, person: str, stack: ExitStack, locked: set[Path]) -> None:
    """Hold the locks of all tunings of a person that are not held yet. Raises ConfigError while one runs."""
    for agent in set(folder_of(state, person).glob("*")) - locked:
        if agent.is_dir():
            stack.enter_context(writer_lock(agent / TUNING))
            locked.add(agent)


def _begin(state: Path, person: str) -> DeletionIntent:
    """Write the intent of an erasure, with what an earlier one that did not end has left."""
    inbox, intent = FeedbackStore(state / "inbox"), DeletionIntent.of(state, person)
    own = [line for line in inbox.lines() if line.feedback is not None and line.feedback.is_of(person)]
    lines = {line.location: line.feedback.date for line in own if line.feedback is not None}
    has_media = any(line.feedback is not None and _has_media(line.feedback) for line in own)
    intent.add([*_words(inbox, person), *_rows_of(state, person)], lines, has_media=has_media)
    return intent


def _remove_lines(inbox: FeedbackStore, person: str, digest: Digest, intent: DeletionIntent, done: _Done) -> None:
    removed = inbox.remove(lambda feedback: feedback.is_of(person))
    done.lines = [digest("feedback", line.feedback.as_json()) for line in removed if line.feedback is not None]
    done.torn_lines = sum(line.feedback is None for line in removed)
    # torn lines too, and what came since the intent was written
    feedback = [line.feedback for line in removed if line.feedback is not None]
    dates = {line.location: line.feedback.date if line.feedback else "" for line in removed}
    intent.add(
        (text for item in feedback for text in _texts_of(item)), dates, has_media=any(map(_has_media, feedback))
    )


def _outside(state: Path, paths: Collection[Path]) -> list[Path]:
    """Return the paths beyond the state directory and SARTOR_HOME, with the review queues beside them."""
    queues = [queue for path in paths for queue in path.parent.glob("review.sqlite*")]
    roots = (state, home.home())
    existing = [path for path in dict.fromkeys([*paths, *queues]) if path.exists()]
    return [path for path in existing if not any(path.is_relative_to(root) for root in roots)]


def _changed(done: _Done) -> list[Path]:
    return [Path(dataset["path"]) for dataset in done.datasets]


def _raise_for(file: Path, unconfirmed: Sequence[int], scan: ScanResult, mentions: Mapping[str, int]) -> None:
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
            "look at each; rm FILE where nothing needs it, then sartor personal forget TEAM --user USER",
        )
    if tables := [name for name, count in mentions.items() if count]:
        raise RefusedError(
            f"the registry names that user again in {' and '.join(tables)}: something wrote rows while they were "
            f"forgotten; {file} says so",
            "sartor personal forget TEAM --user USER again",
        )


def _words(inbox: FeedbackStore, person: str = "") -> Iterator[str]:
    """Yield the texts of the inbox, of one person or of all; system prompts belong to nobody and are skipped."""
    for line in inbox.lines():
        if line.feedback is not None and (not person or line.feedback.is_of(person)):
            yield from _texts_of(line.feedback)


def _texts_of(feedback: Feedback) -> Iterator[str]:
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
                yield from (message.text_with_reasoning for message in example.messages if message.role != "system")
        except ArtifactError:
            continue  # damaged: it is removed as it is


def _remove_files(state: Path, person: str, done: _Done) -> None:
    folder = folder_of(state, person)
    # before the artefacts: without them nobody would know which sketches are theirs
    done.caches += trace_store.remove_traces(trace_store.find_traces(below=folder.absolute()))
    for file in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if file.is_file() and file.name != f".{TUNING}.lock":
            done.files[str(file.relative_to(state))] = {"sha256": file_digest(file), "bytes": file.stat().st_size}
    done.artifacts = catalogue.forget(folder)
    if folder.is_dir():
        shutil.rmtree(folder)
        fsync_directory(folder.parent)


def _clean_datasets(state: Path, intent: DeletionIntent) -> Iterator[dict[str, Any]]:
    """Remove rows made of the intent's lines of the inbox from every Dataset in the catalogue; yield the changes."""
    for path in catalogue.existing("dataset") if intent.lines else []:
        try:
            dataset = open_artifact(path, "dataset")
        except ArtifactError:
            continue
        if any(is_made_of(source, state) for source in dataset.manifest["sources"]):
            yield from _remove_rows(dataset, intent)


def _remove_rows(dataset: Artifact, intent: DeletionIntent) -> Iterator[dict[str, Any]]:
    line_locators = set(intent.lines)

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
    # weights cannot be searched for words: their owner decides
    descended: list[Descended] = descended_from(dataset.id)
    intent.add_descendants(descended)
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
    yield {**fields, "tuned_on_it": [item for item in descended if item["state"] == STANDS]}


def _has_media(feedback: Feedback) -> bool:
    return any(not isinstance(message.get("content", ""), str) for message in feedback.messages)


def _empty_caches(intent: DeletionIntent) -> list[str]:
    """Delete the cached activations of rows, and the features of media if the user sent any; return the folders.

    They are stored under digests of what they were computed of, and computed again on demand.
    """
    names = [*(["activations"] if intent.words else []), *(["features"] if intent.has_media else [])]
    folders = [home.home() / name for name in names if (home.home() / name).is_dir()]
    for folder in folders:
        for _ in range(_TRIES):  # a tuning may be writing into it
            shutil.rmtree(folder, ignore_errors=True)
        if any(file.is_file() for file in folder.rglob("*")):
            raise BusyError(
                f"{folder} cannot be emptied: another process writes to it, or may not be removed",
                f"wait for running tunings, or rm -r {folder}; then sartor personal forget TEAM --user USER again",
                WITHIN_S,
            )
    return [str(folder) for folder in folders]


def _remove_sketches(descended: Sequence[Descended], done: _Done) -> list[str]:
    """Remove the sketches of rows for every adapter that was tuned on the user's, and return their folders."""
    adapter_ids = {*done.artifacts, *(item["id"] for item in descended)}
    dataset_ids = {str(dataset["id"]) for dataset in done.datasets}
    return trace_store.remove_traces(trace_store.find_traces(adapter_ids=adapter_ids, dataset_ids=dataset_ids))


def _proof(team: Team, person: str, generation: int, done: _Done) -> dict[str, Any]:
    not_reached = [*UNREACHED]
    if isinstance(team.engine, OpenAiEngineOptions):
        not_reached.append(f"caches of the server at {team.engine.url}, which is not this team's")
    if not team.registry_url.startswith("sqlite"):
        not_reached.append("state directories of other machines that share this registry: forget the user there, too")
    if done.datasets:
        not_reached.append(
            "tunings that ran meanwhile on a Dataset with such rows: forget the user again when they end"
        )
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
