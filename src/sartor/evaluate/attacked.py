"""Whether the attack report of a federated Adapter bears out the privacy that it claims: the check `privacy` of the gate.

`attacks.json` is written by `federate/privacy/attacks/report.py`, and judged here, below it, so that the gate and whoever
makes a report say the same. A bound of epsilon below the claim proves nothing; the detail says what could have been shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.evaluate.limits import Check

FILE, SCHEMA, KIND = "attacks.json", 1, "attack-report"
WEIGHTS = "adapter_model.safetensors"
_AGAIN = "make the adapter again with attacks: sartor federate simulate, data.attack_rows above 0"
Fault = tuple[str, str]


def fault(claimed: Mapping[str, Any] | None, audit: Mapping[str, Any] | None) -> Fault | None:
    """(problem, remedy) where an audit refutes a claim, or is none of it; None where there is nothing to say against it.

    claimed: {epsilon, delta}; audit: as `federate.privacy.attacks.audit.Audit`.
    """
    if claimed is None:
        return None
    said = claim(claimed)
    if audit is None:
        return f"{said} is claimed, and no audit was made", "train on canaries by coin, and give their scores to `one_run`"
    if audit["delta"] > claimed["delta"]:
        return f"{said} is claimed, and the audit was made at delta {audit['delta']:g}", f"audit at delta {claimed['delta']:g}"
    if audit["epsilon_low"] > claimed["epsilon"]:
        shown = f"{audit['right']} of {audit['guesses']} guesses show epsilon {audit['epsilon_low']:.2f} or more"
        return f"{said} is claimed; {shown}", "look for rows that bypass the noise; claim nothing until it is found"
    return None


def claim(claimed: Mapping[str, Any]) -> str:
    """As a sentence says it."""
    return f"epsilon {claimed['epsilon']:g} at delta {claimed['delta']:g}"


def privacy(adapter: Artifact) -> dict[str, Check]:
    """The check of a federated Adapter; none of another."""
    if "federated" not in adapter.manifest.get("run", {}):
        return {}
    claimed = adapter.manifest["recipe"].get("privacy")
    if FILE not in adapter.manifest["files"]:
        if claimed is None:
            return {"privacy": Check("pass", "no privacy is claimed, and no attack report is there")}
        return {"privacy": Check("fail", f"{claim(claimed)} is claimed, and there is no attack report", _AGAIN)}
    return {"privacy": _judged(adapter, claimed)}


def _judged(adapter: Artifact, claimed: Mapping[str, Any] | None) -> Check:
    try:
        said = json.loads((adapter.path / FILE).read_text(encoding="utf-8"))
        if (said["schema"], said["kind"]) != (SCHEMA, KIND):
            raise ValueError("another schema or kind")
        bound, audit = dict(said["adapter"]), said["audit"]
        found = fault(claimed, audit)
        shown = "" if audit is None else f"an audit shows {audit['epsilon_low']:.2f} of {audit['most']:.2f} that it could have"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Check("fail", f"{FILE} is no attack report: {error!r}", _AGAIN)
    files = {name: one["sha256"] for name, one in adapter.manifest["files"].items()}
    if WEIGHTS not in bound or any(files.get(name) != digest for name, digest in bound.items()):
        return Check("fail", f"{FILE} speaks of another adapter than lies beside it", _AGAIN)
    if found:
        return Check("fail", *found)
    if claimed is None:
        left_out = "; ".join(f"{attack}: {why}" for attack, why in said.get("skipped", {}).items())
        return Check("pass", f"no privacy is claimed{'; not measured: ' * bool(left_out)}{left_out}")
    return Check("pass", f"{claim(claimed)} is claimed; {shown}")
