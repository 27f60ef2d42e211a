"""Verbs `push` and `pull`: a Dataset or an Adapter to a Hugging Face hub, and back.

    dataset   a dataset repository: the published form (published_dataset.py), with a split a file for `load_dataset`
    adapter   a model repository: the PEFT directory as it is, with README.md, NOTICE.md and the base's licence texts

A Release and an export of one are not pushed: both hold held-out prompts with their replies, by which a server checks
them, and a Release the evaluated rows too. The Adapter that they were made from has the same weights and no row.

All bytes are checked against the manifest while they are sent. The whole is one commit on top of the commit that was
looked at, and afterwards the hub's digests are compared with the manifest's. An interrupted push leaves the repository
as it was; the next one sends only what the hub lacks.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as with_changes
from pathlib import Path, PurePosixPath
from typing import Any

from sartor.core import catalogue
from sartor.core.artifacts import (
    MANIFESTS,
    Artifact,
    check_output_free,
    create_output_directory,
    kind_of,
    open_artifact,
    read_manifest,
)
from sartor.core.errors import ArtifactError, ConfigError, ConflictError, HubError, LicenceError, PrivacyError
from sartor.core.home import home
from sartor.core.licences import compliance
from sartor.core.remedies import REQUEST_AGAIN
from sartor.release import notices
from sartor.release.hub.hub_session import MAX_ANSWER_BYTES, HubAccess, hub_session, open_access
from sartor.release.hub.published_dataset import INBOX, write_published
from sartor.release.hub.verified_file import VerifiedFile, files_of
from sartor.tune.adapter_card import adapter_card

Notice = Callable[[str], object]
MAIN, CARD = "main", "README.md"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"(?!.*\.\.)[\w][\w./-]{0,127}")
_OF_THE_HUB = ".gitattributes"  # the hub makes it with the repository
# requests of a session: a dozen of its own, and those of each file with their retries
_OWN_REQUESTS, _FILE_REQUESTS = 60, 10


@dataclass(frozen=True)
class Pushed:
    """Result of `push`.

    commit: the hub's commit that holds exactly this artefact.
    is_new: whether this push made it; False if the hub had everything already.
    """

    kind: str
    id: str
    repo: str
    commit: str
    url: str
    files: int
    bytes: int
    is_new: bool

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Pulled:
    """Result of `pull`: the artefact, and the commit that it came from."""

    artifact: Artifact
    repo: str
    commit: str

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        return {
            "kind": self.artifact.kind,
            "path": str(self.artifact.path),
            "id": self.artifact.id,
            "repo": self.repo,
            "commit": self.commit,
        }


def push(
    path: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str = MAIN,
    token_env: str = "",
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Pushed:
    """Push a Dataset or an Adapter with its card to a repository of a Hugging Face hub.

    repo_id: OWNER/NAME; it is created if it is absent.
    private: create it as a private one; an existing public one is refused.
    revision: branch, created if absent.
    token_env: environment variable with the token; by default HF_TOKEN, else that of `hf auth login`.
    replace: replace other content of the repository; otherwise it is refused.

    Raises ArtifactError, LicenceError (rows or base that may not be handed on), PrivacyError (what is private),
    ConfigError (names, HF_ENDPOINT), KeyRefusedError (token), ConflictError (other content, a public repository, a
    change meanwhile), BusyError, HubError, ExtraError.
    """
    _check_names(repo_id, revision)
    _check_kind(Path(path))
    artifact = open_artifact(path, ("dataset", "adapter"))
    _check_private(artifact)
    _check_licence(artifact, repo_id.partition("/")[2])
    with _published_files(artifact, repo_id, notice) as (identity, files):
        access = open_access(token_env, needs_token=True)
        size = sum(file.size for file in files)
        notice(f"{len(files)} files, {size / 1e6:,.1f} MB, to {repo_id} on {access.host}")
        target = _Target(repo_id, "dataset" if artifact.kind == "dataset" else "model", revision, private)
        commit, is_new = _commit(access, target, files, f"Push {artifact.kind} {identity[:12]}", replace=replace)
    url = f"{access.endpoint}/{'datasets/' if target.repo_type == 'dataset' else ''}{repo_id}"
    return Pushed(
        kind=artifact.kind,
        id=identity,
        repo=repo_id,
        commit=commit,
        url=url,
        files=len(files),
        bytes=size,
        is_new=is_new,
    )


def _check_names(repo_id: str, revision: str) -> None:
    if not _REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise ConfigError(f"{repo_id!r:.120} is no repository of a hub", "give OWNER/NAME: letters, digits, . _ -")
    if not _REVISION.fullmatch(revision):
        raise ConfigError(f"{revision!r:.120} is no name of a branch or commit", "--revision main")


def _check_kind(path: Path) -> None:
    """Raise PrivacyError for an artefact that holds rows which are not there to be published."""
    kind = kind_of(path)
    if kind in ("release", "export"):
        raise PrivacyError(
            f"{path} is a Sartor {kind}, and holds held-out prompts with their replies",
            "sartor push ADAPTER OWNER/NAME, of the Adapter that it was made from: sartor inspect names it",
        )
    if kind in ("report", "duplicates"):
        raise PrivacyError(
            f"{path} is a Sartor {kind}, and holds rows", "sartor push DATASET OWNER/NAME, or the Adapter"
        )


def _check_private(artifact: Artifact) -> None:
    """Raise PrivacyError for what belongs to a single user, or to this machine alone."""
    path, sources = artifact.path.resolve(), artifact.manifest.get("sources", [])
    if path.is_relative_to(home().resolve()):
        raise PrivacyError(
            f"{artifact.path} lies in SARTOR_HOME, which is this machine's own", "push an artefact elsewhere"
        )
    if any(str(source.get("source", "")).startswith(INBOX) for source in sources):
        raise PrivacyError(
            f"{artifact.path} holds or has learnt what users of a served team said",
            "sartor curate a recipe without the source inbox:, and push that Dataset, or an Adapter tuned on it",
        )
    if artifact.manifest.get("run", {}).get("personal"):
        raise PrivacyError(f"{artifact.path} is a single user's own version", "push the version that all users share")


def _check_licence(artifact: Artifact, name: str) -> None:
    """Raise LicenceError if a licence forbids to hand the artefact on, or to do so under this name."""
    manifest = artifact.manifest
    sources = compliance.made_from(manifest)
    if artifact.kind == "dataset":
        objections = compliance.redistribution_objections(sources)
        remedy = "sartor curate a recipe without these sources, or state the licence under which you may hand them on"
    else:
        objections = compliance.objections(sources, "research")
        remedy = "tune on sources and a base whose licences permit to hand a derived work on: docs/licences.md"
    problems = [str(objection) for objection in objections] + compliance.conflicts(sources)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise LicenceError(f"{artifact.path.name} may not be handed on: {'; '.join(problems[:3])}{more}", remedy)
    if "base" not in manifest:
        return
    if objection := compliance.name_objection(sources, name):
        raise LicenceError(objection, "sartor push PATH OWNER/Llama-NAME")
    problem, remedy = notices.missing_texts(manifest)
    if problem:
        raise LicenceError(problem, remedy)


@contextmanager
def _published_files(artifact: Artifact, repo_id: str, notice: Notice) -> Iterator[tuple[str, list[VerifiedFile]]]:
    """Yield the id and the files of what is pushed: the artefact with its card, or a Dataset's published form."""
    with tempfile.TemporaryDirectory(prefix="sartor-push-") as temporary:
        folder = Path(temporary)
        if artifact.kind == "dataset":
            artifact = write_published(artifact, folder / artifact.path.name)
            card = next(file for file in files_of(artifact, ["card.md"])).content()
            extra = {CARD: card}
        else:
            extra = _adapter_extra(artifact, repo_id, folder)
        files = files_of(artifact)
        known = {file.name for file in files}
        files += [VerifiedFile.of_bytes(name, content) for name, content in extra.items() if name not in known]
        for home_path in _home_paths(artifact.document):
            notice(f"its manifest names a path of this machine, which readers of the repository will see: {home_path}")
        yield artifact.id, sorted(files, key=lambda file: file.name)


def _adapter_extra(artifact: Artifact, repo_id: str, folder: Path) -> dict[str, bytes]:
    """Return the card, the notice and the licence texts of the base that go out with an Adapter."""
    manifest = artifact.manifest
    name = repo_id.partition("/")[2]
    reports = catalogue.children(artifact.id, "report")
    report = open_artifact(reports[0], "report").manifest if reports else None
    part = folder / "notices"
    part.mkdir()
    named = {**manifest, "name": name, "version": artifact.id[:12]}
    notices.write_notice(named, artifact.licence, part, notices.base_folder(manifest))
    extra = {file.name: file.read_bytes() for file in sorted(part.iterdir())}
    extra[CARD] = adapter_card(manifest, name, repo_id=repo_id, report=report).encode()
    return extra


def _home_paths(document: bytes) -> list[str]:
    """Return the paths below this user's home that a manifest names, at most three."""
    user_home = Path.home()
    if len(user_home.parts) < 2:
        return []
    paths = re.findall(rb'"(' + re.escape(str(user_home).encode()) + rb'/[^"]+)"', document)
    return [path.decode("utf-8", "replace") for path in dict.fromkeys(paths)][:3]


@dataclass(frozen=True)
class _Target:
    """Branch of a repository to push to."""

    repo_id: str
    repo_type: str
    revision: str
    private: bool


def _commit(
    access: HubAccess, target: _Target, files: Sequence[VerifiedFile], message: str, *, replace: bool
) -> tuple[str, bool]:
    """Make the repository hold exactly these files; return its commit, and whether it is a new one."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id, repo_type = target.repo_id, target.repo_type
    by_name = {file.name: file for file in files}
    with hub_session(access, repo_id, _OWN_REQUESTS + _FILE_REQUESTS * len(files)) as (api, _):
        api.create_repo(repo_id, repo_type=repo_type, private=target.private or None, exist_ok=True)
        if target.revision != MAIN:
            api.create_branch(repo_id, branch=target.revision, repo_type=repo_type, exist_ok=True)
        info = api.repo_info(repo_id, repo_type=repo_type, revision=target.revision)
        if target.private and info.private is not True:
            raise ConflictError(
                f"{repo_id} exists on {access.host} and is public; nothing was sent",
                "make it private there, or push to another name",
            )
        remote = _remote_files(api, repo_id, repo_type, info.sha)
        differing = [
            name
            for name, entry in remote.items()
            if name != _OF_THE_HUB and not (name in by_name and _is_same(by_name[name], entry))
        ]
        if differing and not replace:
            raise ConflictError(
                f"{repo_id} on {access.host} has other content, {len(differing)} files: "
                f"{', '.join(sorted(differing)[:3])}",
                "push to another name or --revision, or add --replace",
            )
        missing = [file for file in files if file.name not in remote or file.name in differing]
        obsolete = [name for name in differing if name not in by_name]
        if not missing and not obsolete:
            return str(info.sha), False
        operations: list[Any] = [CommitOperationDelete(name) for name in obsolete]
        operations += [CommitOperationAdd(file.name, file) for file in missing]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            repo_type=repo_type,
            revision=target.revision,
            parent_commit=info.sha,
        )
        _check_pushed(_remote_files(api, repo_id, repo_type, commit.oid), by_name, f"{repo_id} on {access.host}")
    return str(commit.oid), True


def _remote_files(api: Any, repo_id: str, repo_type: str, revision: str) -> dict[str, Any]:
    """Return the files of a commit by name, with their digests."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
    return {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}


def _is_same(file: VerifiedFile, entry: Any) -> bool:
    """Return whether the hub's file has the verified bytes, by its sha256, or git's id of a small file."""
    if entry.lfs is not None:
        return str(entry.lfs.sha256) == file.sha256
    return entry.size == file.size and str(entry.blob_id) == file.git_sha1()


def _check_pushed(remote: Mapping[str, Any], files: Mapping[str, VerifiedFile], repository: str) -> None:
    wrong = [name for name, file in files.items() if name not in remote or not _is_same(file, remote[name])]
    if wrong:
        raise HubError(
            f"{repository} does not hold what was pushed; absent or different are {len(wrong)} files: "
            f"{', '.join(wrong[:3])}",
            f"{REQUEST_AGAIN}; a repository that still differs is not to be used",
        )


def pull(
    repo: str,
    out: Path | str,
    *,
    revision: str = MAIN,
    token_env: str = "",
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Pulled:
    """Fetch an artefact that `push` wrote, check every file against its manifest, and write it to `out`.

    repo: OWNER/NAME of a model repository, datasets/OWNER/NAME of a dataset repository; `hf://` may stand before it.
    revision: branch, tag or commit; the commit that it names is stated in the result.
    Raises ConfigError (names, taken `out`), ArtifactError (no artefact, or a changed one), KeyRefusedError, HubError.
    """
    name = repo.removeprefix("hf://")
    repo_type = "dataset" if name.startswith("datasets/") else "model"
    repo_id = name.removeprefix("datasets/")
    _check_names(repo_id, revision)
    out = Path(out).absolute()
    check_output_free(out, replace=replace)
    access = open_access(token_env, needs_token=False)
    with (
        create_output_directory(out, replace=replace) as part,
        tempfile.TemporaryDirectory(prefix=".sartor-pull-", dir=part.parent) as temporary,
    ):
        commit = _fetch(access, _Target(repo_id, repo_type, revision, False), Path(temporary), part, notice)
        artifact = open_artifact(part)
    artifact = with_changes(artifact, path=out)
    catalogue.register(artifact)
    return Pulled(artifact, repo, commit)


def _fetch(access: HubAccess, target: _Target, temporary: Path, part: Path, notice: Notice) -> str:
    """Fetch the manifest, then the files that it lists, into `part`; return the commit."""
    repo_id, repo_type = target.repo_id, target.repo_type
    with hub_session(access, repo_id, _OWN_REQUESTS) as (api, _):
        commit = str(api.repo_info(repo_id, repo_type=repo_type, revision=target.revision).sha)
        remote = _remote_files(api, repo_id, repo_type, commit)
    manifests = [MANIFESTS[kind] for kind in ("dataset", "adapter")]
    manifests = [name for name in manifests if name in remote and remote[name].size <= MAX_ANSWER_BYTES]
    if not manifests:
        raise ArtifactError(
            f"{repo_id} at {commit[:12]} has no manifest of Sartor",
            "sartor pull of a repository that `sartor push` wrote",
        )
    with hub_session(access, repo_id, _OWN_REQUESTS + _FILE_REQUESTS * len(remote)) as (api, guard):

        def fetch(name: str) -> None:
            guard.max_answer_bytes = int(remote[name].size) + (1 << 20)
            file = api.hf_hub_download(
                repo_id, name, repo_type=repo_type, revision=commit, local_dir=temporary / "files", force_download=True
            )
            target_file = part / name
            target_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target_file)

        for name in manifests:
            fetch(name)
        manifest = read_manifest(part, ("dataset", "adapter"))
        notice(f"{len(manifest['files'])} files of {repo_id} at {commit[:12]}")
        for name, entry in manifest["files"].items():
            is_inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
            if not is_inside or name not in remote or "\\" in name or remote[name].size != entry["bytes"]:
                raise ArtifactError(
                    f"{repo_id} at {commit[:12]} lacks {name!r:.120}, or has another file in its place",
                    "sartor pull --revision COMMIT, of a commit that `sartor push` printed",
                )
            fetch(name)
    return commit
