"""What release.json says, before anybody acts on it: its form, the gate that it passed, and whether it may still be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.config import is_name
from sartor.core.errors import AdmissionError, ConfigError, LicenceError
from sartor.core.licences.compliance import USES
from sartor.inference.engine import Sampling
from sartor.release import gate as permission

GATE = ("gain", "forgetting", "licence")
OUTCOMES = ("pass", "waived")
MOST_PROMPT = 1 << 20  # characters of a system prompt
_AGAIN = "release it again with this version of Sartor"
_TEXTS = ("source", "path", "licence", "consent", "expires")
_SAMPLING = frozenset(Sampling.__dataclass_fields__)


def check_form(manifest: Mapping[str, Any]) -> None:
    """Raise AdmissionError (`manifest`) unless what a server reads of release.json has the form that `release` writes."""
    for key in ("name", "version"):
        if not is_name(manifest.get(key)):
            raise _malformed(key, manifest.get(key))
    base = manifest.get("base")
    if not isinstance(base, dict) or not all(isinstance(base.get(key), str) for key in ("name", "digest", "template_digest")):
        raise _malformed("base", base)
    prompt = manifest.get("system_prompt")
    if not isinstance(prompt, str) or len(prompt) > MOST_PROMPT:
        raise _malformed("system_prompt", prompt)
    if manifest.get("use", "commercial") not in USES:
        raise _malformed("use", manifest["use"])
    for key in ("tools", "waivers", "parents", "canaries", "sources"):
        said = manifest.get(key, [])
        if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
            raise _malformed(key, said)
    if wrong := next((one for one in [base, *manifest.get("sources", [])] if not _states_terms(one)), None):
        raise _malformed("sources", wrong)
    if not all(type(source.get("kept")) is int for source in manifest.get("sources", [])):
        raise _malformed("sources", manifest["sources"])
    if not all(isinstance(parent.get(key), str) for parent in manifest.get("parents", []) for key in ("kind", "id", "path")):
        raise _malformed("parents", manifest["parents"])
    _check_sampling(manifest.get("sampling"))


def _states_terms(source: Mapping[str, Any]) -> bool:
    used = source.get("use", [])
    return all(isinstance(source.get(key, ""), str) for key in _TEXTS) and (
        isinstance(used, list) and all(isinstance(use, str) for use in used)
    )


def _check_sampling(said: Any) -> None:
    try:
        if not isinstance(said, dict) or not set(said) <= _SAMPLING:
            raise ConfigError("it has other options than those of sampling", "")
        Sampling(**said)
    except (ConfigError, TypeError) as error:
        raise _malformed("sampling", said, str(error).partition("\n")[0]) from None


def check_gate(manifest: Mapping[str, Any]) -> str:
    """What the gate found, check by check; a waiver shows. Raises AdmissionError (`gate`) for one that is absent or failed."""
    gate = manifest.get("gate")
    waivers = {str(one.get("check")): one for one in manifest.get("waivers", []) if one.get("by") and one.get("reason")}
    if not isinstance(gate, dict):
        raise _ungated("release.json has no gate")
    said = []
    for name in [*GATE, *sorted(set(gate) - set(GATE))]:
        outcome = gate[name].get("outcome") if isinstance(gate.get(name), dict) else None
        if outcome not in OUTCOMES:
            raise _ungated(f"{name} is {outcome or 'absent'}")
        if outcome == "waived" and name not in waivers:
            raise _ungated(f"{name} is waived by nobody")
        waived = f" by {waivers[name]['by']}: {waivers[name]['reason']}" if outcome == "waived" else ""
        said.append(f"{name} {outcome}{waived}")
    return "; ".join(said)


def check_licence(found: Artifact) -> str:
    """Whether sources and base still permit the use that the Release was made for. Raises LicenceError.

    It is decided anew: terms run out, and a signer's word that a licence permits is not the licence. A waiver of the gate's
    check holds here too, and shows.
    """
    use, outcome = found.manifest.get("use", "commercial"), found.manifest["gate"]["licence"]["outcome"]
    refusals, remedy = permission.licence_refusals(found, use)
    if refusals and outcome != "waived":
        raise LicenceError(f"{found.manifest['name']} may not be served for {use} use: {'; '.join(refusals)}", remedy)
    return f"waived, against: {'; '.join(refusals)}" if refusals else f"{found.licence} permits {use} use"


def _malformed(key: str, value: Any, why: str = "") -> AdmissionError:
    return AdmissionError(f"release.json has {key} {str(value)[:120]!a}{': ' if why else ''}{why}", _AGAIN, "manifest")


def _ungated(problem: str) -> AdmissionError:
    return AdmissionError(
        f"the gate did not let this Release pass: {problem}", "sartor release ADAPTER, or --waive CHECK", "gate"
    )
