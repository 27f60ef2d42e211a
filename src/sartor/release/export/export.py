"""Verb `export`: write, measure, and seal or refuse."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.core import catalogue, model_refs, numerics, records, signing
from sartor.core.artifacts import MANIFESTS, Artifact, check_output_free, create_output_directory, seal
from sartor.core.errors import BudgetError, ConfigError, ModelError
from sartor.core.filesystem import file_digest
from sartor.core.lineage import ancestry
from sartor.core.progress import Progress
from sartor.models import adapters, composed_model, hardware
from sartor.models.base import Base, machine_facts, open_base
from sartor.models.gguf_writer import TYPES
from sartor.models.tuned_model import check_base
from sartor.release import notices
from sartor.release.export import export_formats
from sartor.release.export import parity as prompts
from sartor.release.export import parity as reference
from sartor.release.export import parity as runtimes
from sartor.release.export.export_formats import ExportContext, ExportedForm
from sartor.release.export.parity import LIKELIEST, Figures, Trace
from sartor.release.release import verify_release

Form = Literal["peft", "merged", "gguf"]
NO_MERGED = "none"
Notice = Callable[[str], object]
_WRITERS: dict[str, Callable[[ExportContext, Path], ExportedForm]] = {
    "peft": export_formats.write_peft,
    "merged": export_formats.write_merged,
    "gguf": export_formats.write_gguf,
}
# Memory of the comparison: two copies of the fp32 weights (the base, and those of the runtime or the merged model),
# and some spare bytes
_COPIES, _BYTES, _SPARE_BYTES = 2, 4, 1 << 30


@dataclass(frozen=True)
class Exported:
    """Result of `export`."""

    export: Artifact

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        manifest = self.export.manifest
        keys = ("form", "name", "version", "as_base", "parity")
        signed = (self.export.path / "signature").is_file()
        return {"path": str(self.export.path), **{key: manifest[key] for key in keys}, "signed": signed}


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    quantise: types of the merged GGUF files (gguf_writer.TYPES). f16 is added unless bf16 or f32 is named. `none`
    alone
    writes no merged file, for devices that already have the base's own file.
    allow_unmeasured: export even if the runtime is not installed.
    sign: private key for the receipt; a Release that was signed with it is trusted.
    key, base: as in `verify`.
    """

    quantise: Sequence[str] = ()
    allow_unmeasured: bool = False
    sign: Path | str | None = None
    key: Path | str | None = None
    base: str = ""

    @property
    def types(self) -> list[str]:
        """Types of the merged GGUF files, each once."""
        if list(self.quantise) == [NO_MERGED]:
            return []
        default_types = [] if {"bf16", "f32"} & set(self.quantise) else ["f16"]
        return list(dict.fromkeys([*default_types, *self.quantise]))


def export(
    release: Path | str,
    out: Path | str,
    *,
    to: Form,
    options: ExportOptions | None = None,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Exported:
    """Export a Release as `peft`, `merged` or `gguf`, with a parity receipt and the required notices.

    The Release is verified first. Raises what `verify` raises; GateError with the numbers if the runtime's replies
    differ
    from the Release's (nothing is left at `out`); ExtraError if the runtime is missing and that is not allowed;
    BudgetError if memory cannot hold the comparison; ModelError for a base or media that the form does not support.
    """
    options = options or ExportOptions()
    _check(to, options)
    out = Path(out).absolute()
    check_output_free(out, replace=replace)
    private = signing.open_private(Path(options.sign), "release") if options.sign else None
    own = private.public_key() if private else None
    source = verify_release(release, key=options.key, base=options.base, own=own).release
    reads_media = _check_media(source, to)
    base_manifest = source.manifest["base"]
    base_name = options.base or base_manifest["name"]
    _check_memory(model_refs.locate_base(base_name, option="--base"))
    start_time = time.monotonic()
    base = open_base(base_name, licence=base_manifest["licence"], bits=32, notice=notice, option="--base")
    check_base(source, base.ref.digest, base.chat.template_digest, base.ref.name)
    parity_prompts = prompts.choose(source, base.chat)
    measured = to != "gguf" or runtimes.has_llama_cpp()
    work = ExportContext(
        release=source,
        base=base,
        model=adapters.open_adapter(base.model, source.path),
        traces=(),
        types=options.types,
        measured=measured,
        notice=notice,
    )
    with Progress("ask Sartor", len(parity_prompts), "prompts", notice) as progress:
        work.traces = traces = reference.trace(base, work.model, parity_prompts, progress.advance)
    with create_output_directory(out, replace=replace) as part:
        exported_form = _WRITERS[to](work, part)
        export_formats.write_card(source, base, form=to, part=part, use=exported_form.use)
        notices.write_notice(source.manifest, source.licence, part, base.ref.path)
        export_formats.readable(part)
        facts = _facts(source, to, part)
        parity = _parity(
            source, base, traces, figures=exported_form.figures, measured=measured, reads_media=reads_media
        )
        parity["wall_s"] = round(time.monotonic() - start_time, 1)
        manifest = seal(part, "export", {**facts, "parity": parity})
        if private:
            document = (part / MANIFESTS["export"]).read_bytes()
            (part / "signature").write_text(signing.sign(document, private, "release"), encoding="utf-8")
    exported = Artifact(out, manifest)
    catalogue.register(exported)
    return Exported(exported)


def _check(to: str, options: ExportOptions) -> None:
    """Raise an error before any work for options that cannot succeed.

    Raises ConfigError for an unknown form or type, ExtraError without llama.cpp.
    """
    if to not in _WRITERS:
        raise ConfigError(f"there is no form {to!r} of an export; there are {', '.join(_WRITERS)}", "--to peft")
    if unknown := [kind for kind in options.quantise if kind not in TYPES and list(options.quantise) != [NO_MERGED]]:
        raise ConfigError(
            f"there is no type {unknown[0]!r} of GGUF weights; there are {', '.join(TYPES)}", "--quantise q8_0"
        )
    if to != "gguf" and options.quantise:
        raise ConfigError(f"--quantise is of GGUF files, and the form is {to}", "--to gguf")
    if to == "gguf" and not runtimes.has_llama_cpp() and not options.allow_unmeasured:
        raise runtimes.need_llama_cpp()


def _check_media(release: Artifact, to: str) -> bool:
    """Return whether the Release reads media. Raises ModelError for a form that cannot hold its projectors."""
    towers = composed_model.read_towers(release.path)
    if towers and to != "peft":
        name, modalities = release.manifest["name"], " and ".join(towers)
        runtime = "llama.cpp has" if to == "gguf" else "transformers' layout of a text model has"
        raise ModelError(
            f"{name} reads {modalities} by projectors of its own, and {runtime} no place for them: it would see "
            "nothing",
            "--to peft carries them; sartor serve and sartor ask read them",
        )
    return bool(towers)


def _check_memory(ref: model_refs.BaseRef) -> None:
    """Raise BudgetError if two copies of the fp32 weights do not fit into memory.

    The comparison would swap or be killed otherwise.
    """
    needed_bytes = hardware.weights_in(ref.path) * _BYTES * _COPIES + _SPARE_BYTES if ref.path.is_dir() else 0
    room = hardware.available_bytes()
    if needed_bytes > room.bytes:
        raise BudgetError(
            f"comparing an export of {ref.name} in fp32 needs {needed_bytes / 1e9:.1f} GB; {room.bytes / 1e9:.1f} GB "
            "are there "
            f"({room.bound})",
            "export on a machine with more memory; the Release itself is a PEFT adapter, and loads in peft as it is",
        )


def _facts(release: Artifact, to: str, part: Path) -> dict[str, Any]:
    """Return the facts of the receipt about the export and its origin."""
    manifest = release.manifest
    keys = ("name", "version", "base", "sources", "obligations", "system_prompt", "sampling", "canaries")
    # digest of each file that can serve as a base; the key `.` is the whole directory
    if to == "merged":
        as_base = {".": model_refs.files_digest(part)}
    else:
        files = [file for file in sorted(part.glob("*.gguf")) if not file.name.endswith("-adapter.gguf")]
        as_base = {file.name: model_refs.gguf_digest(file_digest(file)) for file in files}
    return {
        "form": to,
        "use": manifest.get("use", "commercial"),
        "licence": release.licence,
        "parents": [release.as_parent()],
        **{key: manifest[key] for key in keys if key in manifest},
        "as_base": as_base,
        "machine": machine_facts(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft", "gguf")
        },
    }


def _parity(
    release: Artifact,
    base: Base,
    traces: Sequence[Trace],
    figures: dict[str, Figures],
    measured: bool,
    reads_media: bool,
) -> dict[str, Any]:
    tuned_base = release.manifest["base"]
    notes = []
    if tuned_base.get("quantisation", "none") != "none":
        notes.append(
            f"it was tuned and evaluated on the base in {tuned_base['quantisation']}; the reference is the base as it "
            "is stored"
        )
    if ancestry.find_parent(release, "dataset") is None:
        notes.append("the Dataset is not on this machine, or was changed")
    if reads_media:
        notes.append("compared on text alone: no other runtime reads media by projectors.safetensors")
    if not measured:
        notes.append("not measured: llama.cpp (xllamacpp) is not installed here")
    return {
        "reference": {
            "runtime": "sartor",
            "dtype": "float32",
            "numerics": numerics.numerics("float32"),
            "base_digest": base.ref.digest,
            "device": str(base.device),
        },
        "prompts": records.count_values(trace.parity_prompt.source for trace in traces),
        "positions": sum(len(trace.reply) for trace in traces),
        "most_reply_tokens": reference.REPLY_TOKENS,
        "likeliest": LIKELIEST,
        "itself": runtimes.check_own_decoding(traces).as_json(),
        "files": {name: file_figures.as_json() for name, file_figures in figures.items()},
        "measured": measured,
        "notes": notes,
    }
