"""Verbs `release` and `verify`: gate, signature and its check."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sartor.core import catalogue, model_refs, revoked_releases, signing
from sartor.core.artifacts import (
    MANIFESTS,
    Artifact,
    ArtifactPath,
    Release,
    check_output_free,
    create_output_directory,
    open_artifact,
    read_manifest,
    seal,
)
from sartor.core.config import is_valid_name
from sartor.core.errors import ArtifactError, ConfigError, GateError, HubError, ModelError, SignatureError, one_of
from sartor.core.lazy_import import import_module
from sartor.core.licences import compliance
from sartor.core.licences.compliance import Use
from sartor.core.lineage import ancestry
from sartor.core.result_display import ShownResult
from sartor.core.splits import TEST
from sartor.curate.review.review_store import open_items as items_to_review
from sartor.evaluate import limits as verdicts
from sartor.evaluate import regression_cases, training_facts
from sartor.evaluate.limits import Check, GateLimits
from sartor.evaluate.regression_cases import RegressionCase
from sartor.release import gate as attacked
from sartor.release import gate as checks
from sartor.release import gate as permission
from sartor.release import notices
from sartor.release.gate import CaseEvidence, GateRules, open_rules

# Returns the number of items of a Dataset that wait for a review; with `signed=True` only signed decisions count
OpenItems = Callable[..., int]
_SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 256}
_COPIED = ("adapter_config.json", "adapter_model.safetensors", "sartor.json")
# files of adapters that read media, and of federated adapters
_SOME_HAVE = {"projectors.safetensors", attacked.FILE}


@dataclass(frozen=True)
class Waiver:
    """Waiver of a failed check: the person who takes responsibility, and the reason. It is signed into the Release."""

    check: str
    by: str
    reason: str


@dataclass(frozen=True, repr=False)
class Released(ShownResult):
    """Result of `release`."""

    release: Release

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        gate = self.release.manifest["gate"]
        return {"release": str(self.release.path), "gate": {name: check["outcome"] for name, check in gate.items()}}


def release(
    adapter_path: ArtifactPath,
    *,
    name: str,
    version: str,
    key: Path | str,
    report: ArtifactPath | None = None,
    out: Path | str | None = None,
    waivers: Sequence[Waiver] = (),
    use: Use = "commercial",
    rules: Mapping[str, Any] | Path | str | None = None,
    exemplars: int = training_facts.MOST_EXEMPLARS,
    open_items: OpenItems = items_to_review,
    cases: Sequence[RegressionCase] = (),
    replace: bool = False,
) -> Released:
    """Pass an Adapter through the gate and sign it as a Release.

    `use` is the intended use; the licences of the sources and the base must permit it. `report` is the Report of this
    Adapter; by default the newest one in the catalogue. `out` defaults to `NAME-VERSION` beside the Adapter. `key` is
    a
    private key file, or the directory that keygen made. `exemplars`: number of prompts of its rows that are included
    for
    the router of a team; with 0, `auto` never chooses the agent. `rules`: your own limits and checks (`gate.py`), as a
    YAML file or its content. `open_items`: returns the number of items of a Dataset that wait for a review. `cases`:
    regression cases that it has to pass and keeps, beside those of the Release that its tuning started from. Raises
    GateError with each failed check, ConfigError, ArtifactError.
    """
    for label, text in (("name", name), ("version", version)):
        if not is_valid_name(text):
            raise ConfigError(
                f"the {label} {text!r:.80} may hold up to 128 lower-case letters, digits, '.', '_' and '-'",
                f"--{label} faq-1",
            )
    permission.check_use(use)
    adapter = open_artifact(adapter_path, "adapter")
    gate_rules = open_rules(rules) if rules else None
    private = signing.open_private(Path(key), "release")
    out = Path(out) if out else adapter.path.with_name(f"{name}-{version}")
    check_output_free(out.absolute(), replace=replace)
    evidence = _report_of(adapter, report)
    inherited = regression_cases.inherited_cases(adapter)
    all_cases = regression_cases.merge_cases(inherited.cases, cases)
    gate_checks = gate(
        adapter,
        evidence,
        waivers,
        use=use,
        gate_rules=gate_rules,
        open_items=open_items,
        name=name,
        cases=CaseEvidence(_measured(adapter, all_cases), inherited.unknown_starts),
    )
    if failed := {check: result for check, result in gate_checks.items() if result.holds_back}:
        lines = "; ".join(f"{check}: {result.detail}" for check, result in failed.items())
        remedies = [result.remedy or "tune or curate again" for result in failed.values()]
        waive = f"or take it on yourself: {' '.join(f'--waive {check}' for check in failed)} --by NAME --reason TEXT"
        refusal = GateError(
            f"the gate refuses {adapter.path.name}: {lines}", "; ".join([*dict.fromkeys(remedies), waive])
        )
        refusal.gate = {check: result.outcome for check, result in gate_checks.items()}
        raise refusal
    training = training_facts.read_facts(adapter)
    facts = {
        "use": use,
        **({"rules": gate_rules.as_manifest()} if gate_rules else {}),
        **_facts(adapter, evidence, name=name, version=version, gate_checks=gate_checks, waivers=waivers),
        **_of_training(training, evidence),
    }
    with create_output_directory(out, replace=replace) as part:
        for file in (*_COPIED, *sorted(_SOME_HAVE & set(adapter.manifest["files"]))):
            shutil.copyfile(adapter.path / file, part / file)
        shutil.copytree(evidence.path, part / "report", ignore=shutil.ignore_patterns(".*"))
        if all_cases:
            regression_cases.write_cases(part, all_cases)
        facts["exemplars"] = training_facts.write_exemplars(training, part, exemplars)
        notices.write_notice(facts, adapter.licence, part, notices.base_folder(facts))
        manifest = seal(part, "release", facts)
        document = (part / MANIFESTS["release"]).read_bytes()
        (part / "signature").write_text(signing.sign(document, private, "release"), encoding="utf-8")
    released = Release(out.absolute(), manifest)
    catalogue.register(released)
    return Released(released)


def _measured(adapter: Artifact, cases: Sequence[RegressionCase]) -> tuple[regression_cases.CaseResult, ...]:
    """Return the results of the cases; the model is opened only if there are any."""
    if not cases:
        return ()
    return tuple(import_module("sartor.evaluate.case_measurement").measure_cases(adapter, cases))


UNRELEASED = "unreleased"
_UNGATED = Waiver("", "sartor serve", "an Adapter that is tried out; no gate has passed it")


def seal_unreleased(adapter: Artifact, out: Path, name: str, private: Ed25519PrivateKey) -> Release:
    """Write an Adapter as a Release with the version `unreleased`, for a server of its own.

    No gate has passed it: every check is waived, and the waiver says so. `private` must be a key that no machine
    trusts.
    """
    training = training_facts.read_facts(adapter)
    checks = ("gain", "forgetting", "licence")
    facts = {
        "name": name,
        "version": UNRELEASED,
        "use": "internal",
        "base": adapter.manifest["base"],
        "sampling": _SAMPLING,
        "parents": [adapter.as_parent()],
        "sources": adapter.manifest["sources"],
        "licence": adapter.licence,
        "obligations": compliance.obligations(compliance.made_from(adapter.manifest)),
        "gate": {check: {"outcome": "waived", "detail": _UNGATED.reason} for check in checks},
        "waivers": [{**asdict(_UNGATED), "check": check} for check in checks],
        "versions": adapter.manifest["versions"],
        "system_prompt": training.system_prompt,
        "tools": training.most_tools,
        "format": training.format,
        "canaries": [],
    }
    with create_output_directory(out) as part:
        for file in (*_COPIED, *sorted(_SOME_HAVE & set(adapter.manifest["files"]))):
            shutil.copyfile(adapter.path / file, part / file)
        facts["exemplars"] = training_facts.write_exemplars(training, part, 0)
        manifest = seal(part, "release", facts)
        document = (part / MANIFESTS["release"]).read_bytes()
        (part / "signature").write_text(signing.sign(document, private, "release"), encoding="utf-8")
    return Release(out.absolute(), manifest)


def _report_of(adapter: Artifact, report: ArtifactPath | None) -> Artifact:
    if report is None:
        reports = catalogue.children(adapter.id, "report")
        if not reports:
            raise GateError(
                f"{adapter.path.name} has not been evaluated",
                f"sartor evaluate {shlex.quote(str(adapter.path))}, or give --report DIR",
            )
        report = reports[0]
        if ancestry.test_datasets(adapter):  # the newest on the test split, if there is one
            on_test = (path for path in reports if read_manifest(path, ("report",)).get("split") == TEST)
            report = next(on_test, report)
    evidence = open_artifact(report, "report")
    if adapter.id not in {parent["id"] for parent in evidence.manifest["parents"]}:
        raise GateError(
            f"{evidence.path} is not a Report of {adapter.path}", f"sartor evaluate {shlex.quote(str(adapter.path))}"
        )
    return evidence


def _audit_command(adapter: Artifact, report: Artifact) -> str:
    """Return the command that writes a Report anew in its place, with an audit."""
    split = f" --split {TEST}" if report.manifest.get("split") == TEST else ""
    paths = f"{shlex.quote(str(adapter.path))}{split} --audit --out {shlex.quote(str(report.path))}"
    return f"sartor evaluate {paths} --replace"


def gate(
    adapter: Artifact,
    report: Artifact,
    waivers: Sequence[Waiver],
    use: Use = "commercial",
    gate_rules: GateRules | None = None,
    open_items: OpenItems = items_to_review,
    name: str = "",
    cases: CaseEvidence | None = None,
) -> dict[str, Check]:
    """Return every check of the gate.

    name: name of the planned Release.
    cases: its regression cases, measured; None checks none.
    Raises ConfigError for a waiver of an unknown check, or one without person or reason.
    """
    manifest, limits = report.manifest, gate_rules.limits if gate_rules else GateLimits()
    primary = manifest["primary"]
    dataset = ancestry.find_parent(adapter, "dataset")
    result = {
        "gain": checks.check_gain(
            primary,
            manifest["metrics"][primary],
            limits.gain,
            manifest.get("groups", 0),
            has_test_split=bool(ancestry.test_datasets(adapter)),
        ),
        "forgetting": checks.check_forgetting(manifest["forgetting"], limits.forgetting),
        "licence": checks.check_licence(adapter, use, name),
        **checks.check_test(adapter, manifest),
        **checks.check_modality(adapter, manifest),
        **attacked.check_privacy(adapter),
        **checks.check_cases(cases or CaseEvidence(), adapter.path),
        **verdicts.audit_checks(
            manifest.get("audit", {}), limits.bias, limits.memorisation, _audit_command(adapter, report)
        ),
    }
    if dataset:
        # review.jsonl is no part of the signed manifest: whoever can write to the Dataset can add decisions to it
        if limits.review and limits.review.signed:
            open_count = open_items(dataset, signed=True)
        else:
            open_count = open_items(dataset)
        result |= checks.check_review(open_count, limits.review, str(dataset.path))
    elif limits.review:
        problem = "not looked at: the Dataset is not where it was"
        result["review"] = Check("fail", problem, "sartor index DIR finds it")
    if gate_rules:
        result |= gate_rules.judged(report)
    for waiver in waivers:
        if waiver.check not in result:
            raise ConfigError(f"the gate has no check {waiver.check!r}", one_of("--waive", result))
        if not (waiver.by.strip() and waiver.reason.strip()):
            raise ConfigError(f"the waiver of {waiver.check!r} lacks a name or a reason", "--by NAME --reason TEXT")
        if result[waiver.check].holds_back:
            detail = f"{result[waiver.check].detail}; waived by {waiver.by}: {waiver.reason}"
            result[waiver.check] = Check("waived", detail)
    return result


def _facts(
    adapter: Artifact,
    report: Artifact,
    name: str,
    version: str,
    gate_checks: Mapping[str, Check],
    waivers: Sequence[Waiver],
) -> dict[str, Any]:
    return {
        "name": name,
        "version": version,
        "base": adapter.manifest["base"],
        "sampling": _SAMPLING,
        "parents": [adapter.as_parent(), report.as_parent()],
        "sources": adapter.manifest["sources"],
        "licence": adapter.licence,
        "obligations": compliance.obligations(compliance.made_from(adapter.manifest)),
        "metrics": report.manifest["metrics"],
        "primary": report.manifest["primary"],
        "forgetting": report.manifest["forgetting"],
        "gate": {check: {"outcome": result.outcome, "detail": result.detail} for check, result in gate_checks.items()},
        "waivers": [asdict(waiver) for waiver in waivers],
        "versions": adapter.manifest["versions"],
    }


def _of_training(training: training_facts.TrainingFacts, report: Artifact) -> dict[str, Any]:
    """Return the facts of the training rows that a server needs (evaluate/training_facts.py)."""
    return {
        "system_prompt": training.system_prompt,
        "tools": training.most_tools,
        "format": training.format,
        "canaries": training_facts.recorded_canaries(training, report),
    }


@dataclass(frozen=True)
class Verified:
    """Release, or export of one, whose files, signer and base have been checked.

    base: result of the comparison with the base; it says if the base is not on this machine.
    signature: content of the signature's file, as it was read and verified over `release.document`.
    """

    release: Artifact
    signer: str
    base: str
    signature: bytes = b""

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        manifest, kind = self.release.manifest, self.release.kind
        if kind == "export":
            details = {
                "form": manifest["form"],
                "measured": manifest["parity"]["measured"],
                "parity": manifest["parity"]["files"],
            }
        else:
            details = {"gate": {name: check["outcome"] for name, check in manifest["gate"].items()}}
        return {
            kind: str(self.release.path),
            "valid": True,
            "name": manifest["name"],
            "version": manifest["version"],
            "use": manifest.get("use", "commercial"),
            "signer": self.signer,
            "base": self.base,
            **details,
        }


def verify(path: Path | str, *, key: Path | str | None = None, base: str = "") -> Verified:
    """Check the files, the signature, the base and the chat template of a Release or of a signed export.

    `key` trusts one public key instead of those in SARTOR_HOME/trusted. `base` names the base to compare with; by
    default
    the one that the Release names. Raises ArtifactError, SignatureError, ModelError.
    """
    return _verified(open_artifact(path, ("release", "export")), key, base)


def verify_release(
    path: Path | str, *, key: Path | str | None = None, base: str = "", own: Ed25519PublicKey | None = None
) -> Verified:
    """Check a Release as `verify` does; an export is refused.

    own: public half of the caller's private key; trusted beside the keys of this machine.
    """
    return _verified(open_artifact(path, "release"), key, base, own)


def _verified(artifact: Artifact, key: Path | str | None, base: str, own: Ed25519PublicKey | None = None) -> Verified:
    trusted: list[signing.AnyPublicKey]
    if key:
        trusted = [signing.open_public(Path(key))]
    else:
        trusted = [*signing.trusted_keys()]
        if own:
            trusted.append(own)
    signer, signature = check_signed(artifact, trusted)
    _check_form(artifact)
    return Verified(artifact, signer, _compare_base(artifact, base), signature)


def check_signed(artifact: Artifact, trusted: Sequence[signing.AnyPublicKey] | None = None) -> tuple[str, bytes]:
    """Return the signer of an opened Release or export, and the signature's bytes.

    The signature is checked over the bytes from which the manifest was parsed; nothing is read a second time.
    trusted: the keys to accept; by default those in SARTOR_HOME/trusted.
    Raises SignatureError as `signing.check` does, and for a Release that is on a list of revoked ones.
    """
    file = artifact.path / "signature"
    if not file.is_file():
        raise SignatureError(
            f"{artifact.path} has no signature",
            "sartor release signs an Adapter; sartor export --key KEYS signs an export",
        )
    signature = file.read_bytes()
    signer = signing.check_signature_bytes(artifact.document, signature, file, artifact.path.name, trusted, "release")
    revoked_releases.check_not_revoked(artifact, trusted)
    return signer, signature


def _check_form(artifact: Artifact) -> None:
    """Raise ArtifactError unless a manifest has what is read of it: a trusted signer can write any other."""
    manifest = artifact.manifest
    base, gate, parity = manifest.get("base"), manifest.get("gate"), manifest.get("parity")
    texts = [manifest.get("name"), manifest.get("version")]
    texts += [base.get(key) if isinstance(base, dict) else None for key in ("name", "digest", "template_digest")]
    if artifact.kind == "export":
        has_details = isinstance(parity, dict) and {"measured", "files"} <= set(parity) and "form" in manifest
    else:
        has_details = isinstance(gate, dict) and all(
            isinstance(check, dict) and "outcome" in check for check in gate.values()
        )
    if not has_details or not all(isinstance(text, str) and "\0" not in text and len(text) < 1024 for text in texts):
        raise ArtifactError(
            f"{artifact.path / MANIFESTS[artifact.kind]} lacks the name, version, base or gate of a release, or has "
            "another form",
            "ask its signer for one that sartor release or sartor export wrote",
        )


def _compare_base(artifact: Artifact, name: str) -> str:
    base = artifact.manifest["base"]
    try:
        ref = model_refs.locate_base(name or base["name"], option="--base")
    except (ModelError, HubError) as error:
        if name:
            raise
        return f"not on this machine: {base['name']} ({error.problem})"
    if ref.digest != base["digest"]:
        raise ModelError(
            f"{artifact.path.name} is bound to the base {base['digest'][:12]} ({base['name']!r}); "
            f"{ref.name!r} here is {ref.digest[:12]}",
            "use the base that it was tuned on",
        )
    template = model_refs.chat_template(ref.path) if ref.path.is_dir() else ""
    if template and model_refs.template_digest(template) != base["template_digest"]:
        raise ModelError(
            f"{artifact.path.name} is bound to the chat template {base['template_digest'][:12]}; {ref.name!r} here "
            "has "
            f"{model_refs.template_digest(template)[:12]}",
            "use the chat template that it was tuned with",
        )
    return "the same" if ref.path.is_dir() else "the same, not converted yet"
