"""Admission of a Release or personal adapter before it is loaded.

The checks run in the order of `CHECKS`, each on data that the earlier ones have verified: nothing of a Release is
parsed before its signature is verified. The error of a refusal names its check in `error.check`.

A personal adapter has no signature. It was made in this team's state directory, and the registry knows the id that its
manifest must have; this replaces the signature. The gate of `sartor personal tune` replaces the canaries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sartor.core import model_refs, revoked_releases, signing
from sartor.core.artifacts import MANIFESTS, Artifact, open_artifact
from sartor.core.config import is_valid_name
from sartor.core.errors import (
    AdmissionError,
    ConfigError,
    InputError,
    LicenceError,
    ModelError,
    RefusedError,
    SignatureError,
)
from sartor.core.licences.compliance import USES
from sartor.core.safetensors_file import read_header
from sartor.inference.engine import EngineInfo, Event, GenerateCall, Sampling, adapter_digest, numerics_difference
from sartor.release import canary_prompts
from sartor.release import gate as permission
from sartor.serving.admission import adapter_checks, release_copies
from sartor.serving.admission.adapter_checks import BaseWeights, Projectors, read_config
from sartor.serving.registry.registry_schema import AgentVersion
from sartor.serving.registry.version_rules import VersionRules, check_min_version
from sartor.serving.team_config import Team

GATE = ("gain", "forgetting", "licence")
OUTCOMES = ("pass", "waived")
MOST_PROMPT = 1 << 20  # characters of a system prompt
_AGAIN = "release it again with this version of Sartor"
_RELEASE_AGAIN = (
    "sartor release ADAPTER --name NAME --version NEW --key KEYS; --waive CHECK --by NAME --reason TEXT lets one pass"
)
_TEXTS = ("source", "path", "licence", "consent", "expires")
_SAMPLING = frozenset(Sampling.__dataclass_fields__)


def check_form(manifest: Mapping[str, Any]) -> None:
    """Raise AdmissionError (`manifest`) if release.json does not have the form that `release` writes.

    Only what a server reads of it is checked.
    """
    for key in ("name", "version"):
        if not is_valid_name(manifest.get(key)):
            raise _malformed(key, manifest.get(key))
    base = manifest.get("base")
    if not isinstance(base, dict) or not all(
        isinstance(base.get(key), str) for key in ("name", "digest", "template_digest")
    ):
        raise _malformed("base", base)
    prompt = manifest.get("system_prompt")
    if not isinstance(prompt, str) or len(prompt) > MOST_PROMPT:
        raise _malformed("system_prompt", prompt)
    if manifest.get("use", "commercial") not in USES:
        raise _malformed("use", manifest["use"])
    for key in ("tools", "waivers", "parents", "canaries", "sources"):
        entries = manifest.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _malformed(key, entries)
    if wrong := next((source for source in [base, *manifest.get("sources", [])] if not _states_terms(source)), None):
        raise _malformed("sources", wrong)
    if not all(type(source.get("kept")) is int for source in manifest.get("sources", [])):
        raise _malformed("sources", manifest["sources"])
    if not all(
        isinstance(parent.get(key), str) for parent in manifest.get("parents", []) for key in ("kind", "id", "path")
    ):
        raise _malformed("parents", manifest["parents"])
    _check_sampling(manifest.get("sampling"))


def _states_terms(source: Mapping[str, Any]) -> bool:
    uses = source.get("use", [])
    return all(isinstance(source.get(key, ""), str) for key in _TEXTS) and (
        isinstance(uses, list) and all(isinstance(use, str) for use in uses)
    )


def _check_sampling(options: Any) -> None:
    try:
        if not isinstance(options, dict) or not set(options) <= _SAMPLING:
            raise ConfigError(
                "it has other options than those of sampling", f"sampling: of {', '.join(sorted(_SAMPLING))} alone"
            )
        Sampling(**options)
    except (ConfigError, TypeError) as error:
        raise _malformed("sampling", options, str(error).partition("\n")[0]) from None


def check_gate(manifest: Mapping[str, Any]) -> str:
    """Return the outcome of each gate check, with its waiver if there is one.

    Raises AdmissionError (`gate`) if a check is absent or failed.
    """
    gate = manifest.get("gate")
    waivers = {
        str(waiver.get("check")): waiver
        for waiver in manifest.get("waivers", [])
        if waiver.get("by") and waiver.get("reason")
    }
    if not isinstance(gate, dict):
        raise _ungated("release.json has no gate")
    findings = []
    for name in [*GATE, *sorted(set(gate) - set(GATE))]:
        outcome = gate[name].get("outcome") if isinstance(gate.get(name), dict) else None
        if outcome not in OUTCOMES:
            raise _ungated(f"{name} is {outcome or 'absent'}")
        if outcome == "waived" and name not in waivers:
            raise _ungated(f"{name} is waived by nobody")
        waived = f" by {waivers[name]['by']}: {waivers[name]['reason']}" if outcome == "waived" else ""
        findings.append(f"{name} {outcome}{waived}")
    return "; ".join(findings)


def check_licence(release: Artifact) -> str:
    """Return how sources and base still permit the Release's use. Raises LicenceError.

    It is decided again, because terms can expire, and a signer's statement about a licence is not the licence. A
    waiver of the gate's check applies here too, and is named.
    """
    use, outcome = release.manifest.get("use", "commercial"), release.manifest["gate"]["licence"]["outcome"]
    refusals, remedy = permission.licence_refusals(release, use)
    if refusals and outcome != "waived":
        raise LicenceError(
            f"{release.manifest['name']} may not be served for {use} use: {'; '.join(refusals)}", remedy
        )
    return f"waived, against: {'; '.join(refusals)}" if refusals else f"{release.licence} permits {use} use"


def _malformed(key: str, value: Any, reason: str = "") -> AdmissionError:
    return AdmissionError(
        f"release.json has {key} {str(value)[:120]!a}{': ' if reason else ''}{reason}", _AGAIN, "manifest"
    )


def _ungated(problem: str) -> AdmissionError:
    return AdmissionError(f"the gate did not let this Release pass: {problem}", _RELEASE_AGAIN, "gate")


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MOST_SIGNATURE_BYTES = 1 << 16
MOST_MANIFEST_BYTES = 64 << 20

# All checks. If a refusal is no AdmissionError, its class is in brackets; its `check` is always one of these names.
CHECKS = {
    "files": "regular files within limits, each byte as the manifest says, no other file (AdmissionError, "
    "ArtifactError)",
    "signature": "signed by a trusted key for Releases that is not revoked (SignatureError)",
    "revoked": "on no signed list of revoked Releases (SignatureError)",
    "manifest": "release.json has the form that `sartor release` writes",
    "min_version": "not below the `min_version` of its agent in TEAM.yaml",
    "base": "bound to the base that the engine serves (ModelError)",
    "template": "bound to the chat template that the engine renders with (ModelError)",
    "gate": "each check of the release gate passed, or was waived by somebody for a reason",
    "licence": "sources and base permit the use today, or that was waived (LicenceError)",
    "config": "plain LoRA: no DoRA, bias, module to save, foreign start or pattern; rank and alpha within limits",
    "weights": "a whole safetensors file, no pickle (ModelError)",
    "tensors": "factors A and B of exactly the base's modules that the config targets",
    "shapes": "A is (rank, in) and B (out, rank) of the base's weight",
    "rank": "the rank that the config declares",
    "dtypes": "floats of 16 or 32 bits",
    "finite": "no NaN, no infinity",
    "norms": "what is added to a weight is not out of scale with it",
    "projectors": "finite, of the shapes of base and towers, and the towers are on this machine (also ModelError, "
    "AssetError)",
    "canary": "a process of its own can load it and answers a few prompts (also ModelError, UnavailableError)",
    "degenerate": "the replies say something and do not repeat one piece",
    "agreement": "the replies are like those that its Report recorded",
}


class TrialEngine(Protocol):
    """Engine in a process of its own, on which no served reply depends: `supervisor.probe`."""

    async def __call__(self, adapter: str, path: Path, calls: Sequence[GenerateCall]) -> Sequence[Sequence[Event]]:
        """Return the events of each call, with the adapter in `path` attached as `adapter`.

        The calls may include calls of the base.
        Raises ModelError for an adapter that cannot be attached or that ended the process.
        """
        ...


Ask = Callable[[str, Path, Sequence[GenerateCall]], Sequence[Sequence[Event]]]


@dataclass(frozen=True)
class AdmissionContext:
    """Engine and paths that a Release is checked against.

    base: the base's directory.
    state: the team's state directory.
    trust: the only trusted key; None trusts the keys in SARTOR_HOME.
    min_versions: agent -> smallest version that may be served.
    """

    about: EngineInfo
    base: Path
    state: Path
    trust: Path | None = None
    min_versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, team: Team, about: EngineInfo) -> AdmissionContext:
        """Return the context of a team whose engine has the facts `about`.

        Raises ModelError if the base's files are not on this machine.
        """
        base_ref = model_refs.locate_base(team.base)
        if not base_ref.path.is_dir():
            raise ModelError(
                f"the base {base_ref.name!r} has not been converted on this machine, so no adapter can be compared "
                "with it",
                f"python -c \"from sartor.models.base import open_base; open_base('{base_ref.name}')\"",
            )
        rules = VersionRules.of(team)
        return cls(about, base_ref.path, Path(team.state), rules.trust, rules.min_versions)

    def passed_record(self, checks: Mapping[str, str]) -> dict[str, Any]:
        """Return the record of the passed checks: the base, the version of the arithmetic, and the findings."""
        made_by = {name: value for name, value in self.about.made_by.items() if name == "numerics"}
        return {"base": self.about.base_digest, **made_by, "checks": dict(checks)}


@dataclass(frozen=True)
class Admitted:
    """Release that may be served.

    adapter: digest under which it is attached, from `path`, the server's own copy.
    release: its id.
    sampling, tools: as in release.json.
    checks: the finding of each check, in the order of `CHECKS`.
    reads: the kinds `image` and `audio` that it reads besides text.
    """

    adapter: str
    release: str
    name: str
    version: str
    path: Path
    system_prompt: str
    sampling: Mapping[str, Any]
    tools: tuple[Mapping[str, Any], ...]
    licence: str
    signer: str
    checks: Mapping[str, str]
    reads: tuple[str, ...] = ()


def version_of(admitted: Admitted, agent: str) -> AgentVersion:
    """Return an admitted Release as an agent's version for the registry.

    Its path is the server's own copy.
    """
    facts = {
        "system_prompt": admitted.system_prompt,
        "sampling": dict(admitted.sampling),
        "tools": list(admitted.tools),
        "licence": admitted.licence,
        "signer": admitted.signer,
        "checks": dict(admitted.checks),
        "reads": list(admitted.reads),
    }
    return AgentVersion(
        agent,
        admitted.version,
        release=str(admitted.path),
        release_id=admitted.release,
        adapter=admitted.adapter,
        facts=facts,
    )


async def admit(release: Path | str, context: AdmissionContext, probe: TrialEngine, agent: str = "") -> Admitted:
    """Copy, check and store a Release. Raises what `admit_sync` raises."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, admit_sync, release, context, in_loop(probe, loop), agent)


# Separate from the event loop's threads: an admission waits for a probe, which may need one of those
_threads = ThreadPoolExecutor(2, "admission")


def in_loop(probe: TrialEngine, loop: asyncio.AbstractEventLoop) -> Ask:
    """Return `probe` as a blocking function for a thread, while `loop` runs in another."""

    def ask(adapter: str, path: Path, calls: Sequence[GenerateCall]) -> Sequence[Sequence[Event]]:
        async def generate_events() -> Sequence[Sequence[Event]]:
            return await probe(adapter, path, calls)

        return asyncio.run_coroutine_threadsafe(generate_events(), loop).result()

    return ask


def admit_sync(release: Path | str, context: AdmissionContext, ask: Ask, agent: str = "") -> Admitted:
    """Copy, check and store a Release, in a thread. One of the team's own copies is checked in place.

    agent: name under which it will be served, by default its own.
    Raises AdmissionError, SignatureError, ArtifactError, LicenceError or ModelError, each with the name of its check;
    MissingError if the disk is full, and what `ask` raises if no process could be started.
    """
    path = Path(release).absolute()
    if release_copies.is_copy(path, context.state):
        return _readmit(path, context, ask, agent)
    with _checking("files"), release_copies.staged(path, context.state) as part:
        examined = _examine(part, path, context, agent)
        checks = {
            **examined.checks,
            **_check_tensor_values(examined, context),
            "canary": _check_canaries(examined, ask),
        }
        copy = release_copies.keep(part, context.state, examined.release.id, context.passed_record(checks))
        return examined.admitted(copy, checks)


def _readmit(path: Path, context: AdmissionContext, ask: Ask, agent: str) -> Admitted:
    """Check a stored copy at a later start.

    Signature, files, form, base, gate, licence and projectors are always checked again. The other checks run only if
    the copy did not pass them on this base with this version's arithmetic.
    """
    examined = _examine(path, path, context, agent)
    record = release_copies.read_passed_record(path)
    is_same_base = record.get("base") == context.about.base_digest and isinstance(record.get("checks"), dict)
    numerics_problem = numerics_difference({**context.about.made_by, "numerics": record.get("numerics")})
    if is_same_base and not numerics_problem:
        return examined.admitted(path, {**record["checks"], **examined.checks})
    checks = {**examined.checks, **_check_tensor_values(examined, context), "canary": _check_canaries(examined, ask)}
    if is_same_base:
        release_copies.renew(path, context.passed_record(checks))
    return examined.admitted(path, checks)


def check_release_files(release: Path | str, context: AdmissionContext, agent: str = "") -> Admitted:
    """Run every check that needs no engine on a Release in place, and store nothing.

    Raises what `admit_sync` raises.
    """
    path = Path(release).absolute()
    examined = _examine(path, path, context, agent)
    return examined.admitted(path, {**examined.checks, **_check_tensor_values(examined, context)})


@dataclass(frozen=True)
class _ExaminedRelease:
    """Release with a verified manifest, the digest of its adapter, and the findings so far."""

    release: Artifact
    signer: str
    adapter: str
    checks: Mapping[str, str]
    projectors: Projectors

    def admitted(self, path: Path, checks: Mapping[str, str]) -> Admitted:
        manifest = self.release.manifest
        return Admitted(
            adapter=self.adapter,
            release=self.release.id,
            name=manifest["name"],
            version=manifest["version"],
            path=path,
            system_prompt=manifest["system_prompt"],
            sampling=manifest["sampling"],
            tools=tuple(manifest.get("tools", ())),
            licence=self.release.licence,
            signer=self.signer,
            checks={name: checks[name] for name in CHECKS if name in checks},
            reads=self.projectors.reads,
        )


def _examine(path: Path, origin: Path, context: AdmissionContext, agent: str) -> _ExaminedRelease:
    """Check signature, files, form, base, gate, licence and projectors of the copy in `path`."""
    checks: dict[str, str] = {}
    with _checking("signature"):
        remedy = "trust: DIR/sartor.pub, as sartor keygen DIR made it"
        trusted = [signing.open_public(context.trust, remedy=remedy)] if context.trust else None
        signer, document = _signer(path, origin, trusted)
        checks["signature"] = f"signed by {signer}"
    with _checking("files"):
        release = open_artifact(path, "release", document=document)
    with _checking("revoked"):
        revoked_releases.check_not_revoked(release, trusted)
        checks["revoked"] = "on no list of revoked Releases"
    with _checking("files"):
        checks["files"] = f"{len(release.manifest['files'])} files as signed"
    with _checking("manifest"):
        check_form(release.manifest)
    name = agent or release.manifest["name"]
    check_min_version(name, release.manifest["version"], context.min_versions.get(name, ""))
    checks["min_version"] = context.min_versions.get(name, "") or "none is set"
    check_base(release, context.about)
    checks |= {"base": context.about.base_digest[:12], "template": context.about.template_digest[:12]}
    checks["gate"] = check_gate(release.manifest)
    with _checking("licence"):
        checks["licence"] = check_licence(release)
    with _checking("weights"):
        _check_listed(release)
    with _checking("projectors"):
        projectors = adapter_checks.read_projectors(path, release.manifest["files"], context.about)
    return _ExaminedRelease(
        release, signer, adapter=adapter_digest(release.manifest["files"]), checks=checks, projectors=projectors
    )


def _check_tensor_values(examined: _ExaminedRelease, context: AdmissionContext) -> dict[str, str]:
    return check_values(examined.release.path, examined.projectors, context)


def check_values(path: Path, projectors: Projectors, context: AdmissionContext) -> dict[str, str]:
    """Return the findings of all checks of an adapter's files that need no engine.

    Raises as `admit_sync`.
    """
    config = read_config(path / CONFIG)
    with _checking("weights"):
        tensors = read_header(path / WEIGHTS)
        base = BaseWeights(context.base, context.about.base_digest, context.state / "base-norms.json")
    pairs = adapter_checks.pair_up(tensors, config, base)
    adapter_checks.check_shapes(pairs, config, base)
    adapter_checks.check_ranks(pairs, config)
    adapter_checks.check_dtypes(pairs)
    norms = adapter_checks.check_lora_values(pairs, base)
    ranks = sorted({pair.a.shape[0] for pair in pairs})
    with _checking("projectors"):
        projector_summary = adapter_checks.check_projector_values(projectors, base.width)
    return {
        "config": f"LoRA, rank {config.rank}, alpha {config.alpha:g}",
        "weights": f"{len(tensors)} tensors",
        "tensors": f"{len(pairs)} modules",
        "shapes": "as the base's",
        "rank": ", ".join(map(str, ranks)),
        "dtypes": ", ".join(sorted({tensor.dtype for tensor in tensors.values()})),
        "finite": "every value",
        "norms": f"at most {norms.largest:.3g} of the limit ({norms.module}), {norms.median:.3g} in the middle",
        "projectors": projector_summary,
    }


def _check_canaries(examined: _ExaminedRelease, ask: Ask) -> str:
    canaries = canary_prompts.canaries_of(examined.release.manifest, examined.adapter, examined.projectors.reads)
    with _checking("canary"):
        return canary_prompts.judge_canaries(
            canaries, ask(examined.adapter, examined.release.path, canaries.all_calls)
        )


def _signer(path: Path, origin: Path, trusted: Sequence[signing.PublicKey] | None) -> tuple[str, bytes]:
    """Return the signer of the copy's release.json, and its bytes, of which nothing is parsed before that."""
    manifest, signature = path / MANIFESTS["release"], path / "signature"
    if not manifest.is_file() or not signature.is_file():
        raise SignatureError(f"{origin} is no signed Release", "sartor release signs an adapter")
    for file, max_bytes in ((manifest, MOST_MANIFEST_BYTES), (signature, MOST_SIGNATURE_BYTES)):
        if file.stat().st_size > max_bytes:
            raise SignatureError(
                f"{file.name} of {origin} has {file.stat().st_size:,} bytes; {max_bytes:,} are the limit",
                "sartor release ADAPTER --name NAME --version VERSION --key KEYS --replace",
            )
    document = manifest.read_bytes()
    return signing.check(document, signature, trusted, "release"), document


def check_base(release: Artifact, about: EngineInfo) -> None:
    """Raise ModelError (`base`, `template`) if the Release is not bound to what the engine serves."""
    base = release.manifest["base"]
    for check, key, served in (
        ("base", "digest", about.base_digest),
        ("template", "template_digest", about.template_digest),
    ):
        with _checking(check):
            if base[key] != served:
                name = release.manifest.get("name", release.kind)
                raise ModelError(
                    f"{name} is bound to the {check} {base[key][:12]} ({base['name']!r}); "
                    f"the engine serves {served[:12]} ({about.base!r})",
                    "serve the base that it was tuned on, or tune again on this one",
                )


def _check_listed(release: Artifact) -> None:
    pickled = [name for name in release.manifest["files"] if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    if pickled:
        raise ModelError(
            f"it holds {pickled[0]}, a pickle, which can run code when read", f"store the adapter as {WEIGHTS}"
        )
    for name in (WEIGHTS, CONFIG):
        if name not in release.manifest["files"]:
            raise ModelError(f"it has no {name}", "release an adapter in PEFT's form")


@contextmanager
def _checking(name: str) -> Iterator[None]:
    """Set this check's name on a refusal that names none yet.

    A full disk and a process that cannot start are no refusals.
    """
    try:
        yield
    except (InputError, RefusedError) as error:
        error.check = error.check or name
        raise


def admit_personal(path: Path, agent: str, context: AdmissionContext) -> AgentVersion:
    """Return the personal Adapter in a directory as a version of an agent.

    Raises what `admit_sync` raises for base and values.
    """
    adapter = open_artifact(path, "adapter")
    check_base(adapter, context.about)
    check_values(path, adapter_checks.read_projectors(path, adapter.manifest["files"], context.about), context)
    return AgentVersion(
        agent, version="", release=str(path), release_id=adapter.id, adapter=adapter_digest(adapter.manifest["files"])
    )
