"""Decision whether a run starts, resumes or is finished.

Files at the output and beside it are compared with the options of this call.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sartor.core import config, records
from sartor.core.artifacts import Adapter, Artifact, check_output_free, kind_of, open_artifact, read_manifest
from sartor.core.errors import ArtifactError, ConfigError
from sartor.models.base import Base
from sartor.tune.auto_settings import EarlierRun
from sartor.tune.checkpoint import CheckpointState, check_numerics, folder_of, newest
from sartor.tune.recipe import Recipe
from sartor.tune.tokenized_dataset import TokenizedDataset

# Options that may differ between a run and its resumption: when state is saved, where the log is copied to, and paths
# of the same content (the Dataset, the base and the teacher are compared by digest)
FREE_OPTIONS = (
    "checkpoints.",
    "track.",
    "data.path",
    "data.rehearsal.path",
    "method.start",
    "base.name",
    "base.revision",
    "objective.teacher",
)
# Free where its end is the end of the run, as of the verifier `python`: no reward depends on it
VERIFIER_TIME = "objective.verifier.time_s"


def find_resume_point(out: Path, *, resume: bool, replace: bool, notice: Callable[[str], object]) -> CheckpointState:
    """Return the checkpoints to resume from, before any expensive step.

    Raises ConfigError if `out` is taken, or if an unfinished run is there and neither flag says what to do with it.
    """
    if resume and replace:
        raise ConfigError(
            "--resume goes on and --replace starts over; both were given",
            f"sartor tune RECIPE --out {out} --resume, or the same with --replace",
        )
    if replace:
        check_output_free(out, replace=True)
        return CheckpointState()
    result = newest(folder_of(out))
    if not resume:
        check_output_free(out, replace=False)
        if result.checkpoint or result.invalid:
            reached = (
                f"reached update {result.checkpoint.update}" if result.checkpoint else "left only damaged checkpoints"
            )
            problem = f"an unfinished run of {out} {reached}; its checkpoints are in {folder_of(out)}"
            raise ConfigError(problem, "add --resume to go on there, or --replace to start over")
        return result
    for _, reason in result.invalid:
        notice(f"{reason}; it is removed, and the one before it is used")
    if kind_of(out) != "adapter":
        check_output_free(out, replace=False)
        if not result.checkpoint:
            notice(f"no earlier run left a checkpoint in {folder_of(out)}: starting from the beginning")
    return result


def finished(out: Path, state: CheckpointState, new: Mapping[str, Any]) -> Adapter | None:
    """Return the Adapter at `out` if this run would produce it, else None.

    new: the run's fingerprint.
    Raises ConfigError if the Adapter or the checkpoint belongs to another recipe, Dataset or base, or if another
    version of the arithmetic began the checkpoint.
    """
    if kind_of(out) == "adapter":
        existing = open_artifact(out, "adapter")
        old = {**existing.manifest.get("fingerprint", {}), "recipe": existing.manifest["recipe"]}
        if not (differing := differences(old, new)):
            return existing
        if not (state.checkpoint and state.checkpoint.manifest["replaces"] == existing.id):
            problem = f"the Adapter {out} is of another run: {'; '.join(differing)}"
            raise ConfigError(problem, "choose another --out, or start over with --replace")
    if state.checkpoint and (differing := differences(state.checkpoint.manifest["fingerprint"], new)):
        problem = f"the checkpoint {state.checkpoint.path} is of another run: {'; '.join(differing)}"
        raise ConfigError(problem, "undo the change, or start over with --replace")
    if state.checkpoint:
        check_numerics(state.checkpoint, f"start over with --replace, or rm -r {folder_of(out)}")
    return None


def earlier_run(out: Path, state: CheckpointState) -> EarlierRun | None:
    """Return recipe and settings of the checkpoint, else of the Adapter at `out`; None without both."""
    if state.checkpoint:
        manifest = state.checkpoint.manifest
        return EarlierRun(manifest["fingerprint"]["recipe"], manifest.get("settings"))
    if kind_of(out) != "adapter":
        return None
    manifest = read_manifest(out)
    return EarlierRun(manifest["recipe"], manifest.get("settings"))


def standing_id(out: Path) -> str:
    """Return the id of the artefact at `out`, which a run with --replace will replace; empty without one."""
    try:
        return str(read_manifest(out)["id"])
    except ArtifactError:
        return ""


def fingerprint(
    recipe: Recipe,
    dataset: Artifact,
    base: Base,
    data: TokenizedDataset,
    start: Artifact | None,
    teacher: str = "",
) -> dict[str, Any]:
    """Return the digests and options that decide a run's result.

    rows: covers how the recipe, the Datasets and the tokenizer produce the rows.
    teacher: identity of a teacher; empty for none.
    """
    return {
        "recipe": config.dump(recipe),
        "dataset": records.digest(dataset.manifest["files"]),
        "base": base.ref.digest,
        "template": base.chat.template_digest,
        "rows": data.digest(),
        **({"start": records.digest(start.manifest["files"])} if start else {}),
        **({"teacher": teacher} if teacher else {}),
    }


def environment(base: Base) -> dict[str, Any]:
    """Return versions and hardware that can change the last bits of a run's result."""
    versions = {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")}
    return {
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type,
        "dtype": str(base.dtype).removeprefix("torch."),
        **versions,
    }


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line that names the differences between two environments; nothing if they are equal."""
    if differing := [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]:
        names = ", ".join(differing)
        yield f"going on elsewhere: {names}; the result may differ from an uninterrupted run's in the last bits"


# What holds for a run that is older than these options. A new option of a recipe goes in here, or such runs end.
_OF_OLDER_RUNS: Mapping[str, Any] = {
    "weights": "last",
    "base.use": [],
    "rules.assumed_colluders": "auto",
    "data.reuse_frozen": False,
    "data.reasoning": "last",
    "data.rehearsal.loss": "cross_entropy",
    "data.rehearsal.weight": None,
    "data.empty_think": "keep",
    "trace.features": False,
    "optimizer.epsilon": 1e-8,
    "optimizer.b_rate_ratio": 1.0,
    "objective.loss_temperature": 1.0,
}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences between two fingerprints as lines.

    Examples: `recipe method.rank: 8 -> 16`, `dataset: digest 12ab -> 34cd`.
    """
    lines = changed_options(old.get("recipe", {}), new["recipe"], FREE_OPTIONS)
    for name in new.keys() - {"recipe"}:
        if old.get(name) != new[name]:
            lines.append(f"{name}: digest {str(old.get(name, 'unknown'))[:16]} -> {str(new[name])[:16]}")
    return sorted(lines)


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any], free: tuple[str, ...]) -> list[str]:
    """Return the differences between two dumped recipes as lines, but for options that begin with one of `free`."""
    lines = []
    before, after = _flat(old), _flat(new)
    for name, value in _OF_OLDER_RUNS.items():
        if name in after:
            before.setdefault(name, value)
    for key in sorted(before.keys() | after.keys()):
        is_free = key.startswith(free) or (key == VERIFIER_TIME and after.get("objective.verifier.kind") == "python")
        if before.get(key) != after.get(key) and not is_free:
            lines.append(f"recipe {key}: {_format_value(before.get(key))} -> {_format_value(after.get(key))}")
    return lines


def _format_value(value: Any) -> str:
    return "not set" if value is None else str(value)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a tree of mappings as one mapping with dotted names."""
    if not isinstance(tree, Mapping):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, inner in tree.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}
