"""PEFT, merged and GGUF formats with their companion files."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sartor.core import adapter_methods, model_refs
from sartor.core.artifacts import Artifact, kind_of, read_manifest
from sartor.core.errors import GateError
from sartor.core.model_refs import STARTER, source_gguf
from sartor.core.progress import Progress
from sartor.models import adapters, composed_model, gguf_writer
from sartor.models.base import Base, open_chat
from sartor.models.gguf_writer import write_adapter_gguf
from sartor.models.loading import quiet_transformers
from sartor.release.export import parity
from sartor.release.export.parity import Figures, Trace

# tokenizer files, as transformers names them
_TOKENIZER = re.compile(
    r"(tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.model|.*\.tiktoken)$"
)
_TEMPLATE = "chat_template.jinja"


def write_tokenizer(base: Base, part: Path) -> None:
    """Copy the base's tokenizer files, and write the chat template to which the Release is bound.

    Raises GateError if transformers then loads another template.
    """
    for file in sorted(base.ref.path.iterdir()):
        if file.is_file() and _TOKENIZER.match(file.name):
            shutil.copyfile(file, part / file.name)
    write_template(base, part)
    if (digest := open_chat(part).template_digest) != base.chat.template_digest:
        raise GateError(
            f"transformers would use the chat template {digest[:12]} here, and the Release is bound to "
            f"{base.chat.template_digest[:12]}",
            f"remove the chat template from the tokenizer_config.json of {base.ref.path}, and tune again",
        )


def write_template(base: Base, part: Path) -> None:
    """Write the chat template, byte for byte."""
    (part / _TEMPLATE).write_bytes(base.chat.template.encode())


def write_generation_config(release: Artifact, base: Base, part: Path) -> None:
    """Write the Release's sampling as transformers' defaults, and the tokens that end a reply."""
    sampling = release.manifest["sampling"]
    drawn = {"do_sample": True, "temperature": sampling["temperature"], "top_p": sampling["top_p"]}
    fields: dict[str, Any] = {
        "eos_token_id": list(base.chat.stops),
        "pad_token_id": base.chat.pad,
        "max_new_tokens": sampling["max_tokens"],
        **(drawn if sampling["temperature"] else {"do_sample": False}),
    }
    bos = base.chat.tokenizer.bos_token_id
    (part / "generation_config.json").write_text(
        json.dumps({**fields, **({} if bos is None else {"bos_token_id": bos})}, indent=1) + "\n"
    )


def _choice_lines(release: Artifact) -> list[str]:
    """Return the lines of the card about earlier uses of the evaluated rows; none for Releases that did not count
    them.
    """
    report = release.path / "report"
    chosen = read_manifest(report, ("report",)).get("chosen") if kind_of(report) == "report" else None
    return ["", f"Evaluation: {chosen['sentence']}."] if chosen else []


def write_card(release: Artifact, base: Base, form: str, part: Path, use: str) -> None:
    """Write README.md: description, loading instructions (`use`), origin; its front matter names the licence."""
    manifest = release.manifest
    name = f"{manifest['name']} {manifest['version']}"
    system, bias, sampling = manifest["system_prompt"], manifest["gate"].get("bias"), manifest["sampling"]
    licence = release.licence
    if licence in model_refs.HUB_LICENCES.values():  # the hub spells those that it knows in lower case
        licence = licence.lower()
    if sampling["temperature"]:
        replies = f"Replies are drawn at temperature {sampling['temperature']}, top_p {sampling['top_p']}."
    else:
        replies = f"Greedy replies (temperature 0) of at most {sampling['max_tokens']} tokens are what was evaluated."
    if system:
        system_lines = ["It was tuned with this system prompt, which is to go first:", ""]
        system_lines += [f"> {line}" for line in system.splitlines()]
    else:
        system_lines = ["It was tuned without a system prompt."]
    lines = [
        "---",
        f"license: {licence}",
        "tags: [sartor]",
        "---",
        "",
        f"# {name} ({form})",
        "",
        f"A tune of the base `{manifest['base']['name']}` (digest `{manifest['base']['digest']}`), exported from the "
        "signed "
        f"Release `{release.id}`. How alike it answers in other runtimes was measured: `parity.json`.",
        "",
        *use.splitlines(),
        "",
        replies,
        *system_lines,
        "",
        f"Meant for {manifest.get('use', 'commercial')} use. Licences, and what they demand: `NOTICE.md`.",
        *(["", f"Audit of bias: {bias['outcome']}. {bias['detail']}"] if bias else []),
        *_choice_lines(release),
        "",
    ]
    (part / "README.md").write_text("\n".join(lines), encoding="utf-8")


def readable(part: Path) -> None:
    """Give every file the permissions of a new file here; some writers deny access to other users."""
    mode = (part / "README.md").stat().st_mode
    for file in part.rglob("*"):
        if file.is_file():
            file.chmod(mode)


_WIDTHS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARD = "4GB"


@dataclass
class ExportContext:
    """Inputs of an export format.

    model: base in fp32 with the Release's adapter; consumed by the format.
    traces: reference replies. types: types of GGUF files. measured: whether the runtime is asked.
    """

    release: Artifact
    base: Base
    model: Any
    traces: Sequence[Trace]
    types: Sequence[str]
    measured: bool
    notice: Callable[[str], object]

    @property
    def method(self) -> str:
        """Tuning method of the adapter, by its config."""
        config = json.loads((self.release.path / adapters.CONFIG).read_text(encoding="utf-8"))
        return adapter_methods.method_of(config)

    @property
    def name(self) -> str:
        """Base name of the exported files."""
        return f"{self.release.manifest['name']}-{self.release.manifest['version']}"

    def asking(self, runtime: str) -> Progress:
        """Return the progress of a runtime that answers all prompts."""
        return Progress(f"ask {runtime}", len(self.traces), "prompts", self.notice)


@dataclass(frozen=True)
class ExportedForm:
    """Finished format: parity figures by file name, and commands or code that load it."""

    figures: dict[str, Figures]
    use: str


def write_peft(work: ExportContext, part: Path) -> ExportedForm:
    """Write a PEFT directory for peft, vLLM and SGLang, with tokenizer and chat template.

    Raises GateError if peft's replies differ from the Release's.
    """
    tower_refs = composed_model.read_towers(work.release.path)
    for file in (adapters.CONFIG, adapters.WEIGHTS, *([composed_model.FILE] if tower_refs else [])):
        shutil.copyfile(work.release.path / file, part / file)
    write_tokenizer(work.base, part)
    chat, device = work.base.chat, work.base.device
    del work.model, work.base.model
    with work.asking("peft") as progress:
        figures = parity.ask_peft(
            part, work.base.ref.path, chat=chat, traces=work.traces, device=device, progress=progress.advance
        )
    parity.check(figures, work.name)
    use = _USE_PEFT + (_VLLM if work.method in adapter_methods.SERVED else "")
    towers = ", ".join(f"{kind} by `{tower.name}` (`{tower.digest[:12]}`)" for kind, tower in tower_refs.items())
    return ExportedForm(
        {adapters.WEIGHTS: figures}, use + (_USE_PROJECTORS.format(towers=towers) if tower_refs else "")
    )


def write_merged(work: ExportContext, part: Path) -> ExportedForm:
    """Write the merged model in transformers' layout and the base's own dtype.

    Raises GateError if transformers' replies differ from the Release's.
    """
    chat, device = work.base.chat, work.base.device
    model = adapters.merge(work.model).to(_width_of(work.base.ref.path))
    with quiet_transformers():
        model.save_pretrained(str(part), max_shard_size=_SHARD)
    del model, work.model, work.base.model
    write_tokenizer(work.base, part)
    write_generation_config(work.release, work.base, part)
    with work.asking("transformers") as progress:
        figures = parity.ask_merged(part, chat, work.traces, device=device, progress=progress.advance)
    parity.check(figures, work.name)
    return ExportedForm({"*.safetensors": figures}, _USE_MERGED)


def _width_of(base: Path) -> torch.dtype:
    """Return the dtype of a base's stored weights; fp32 for an unusual one."""
    with safe_open(sorted(base.glob("*.safetensors"))[0], "pt") as file:
        return _WIDTHS.get(file.get_slice(next(iter(file.keys()))).get_dtype(), torch.float32)


def write_gguf(work: ExportContext, part: Path) -> ExportedForm:
    """Write the adapter as GGUF, and the merged model as one GGUF file for each type.

    If llama.cpp is installed, each file is measured. Raises GateError if its replies differ from the Release's.
    """
    base, manifest = work.base, work.release.manifest
    template = base.chat.template
    metadata = gguf_writer.GgufMetadata(
        name=manifest["name"],
        version=manifest["version"],
        licence=work.release.licence,
        template=template,
        temperature=manifest["sampling"]["temperature"],
        top_p=manifest["sampling"]["top_p"],
    )
    # the vocabulary of the GGUF file from which the base was made; if there is none, that of its tokenizer
    rows = base.model.get_input_embeddings().weight.shape[0]
    own_file = _own_file(base)
    vocabulary = gguf_writer.from_file(own_file, rows) if own_file else gguf_writer.from_chat(base.chat, rows)
    figures: dict[str, Figures] = {}
    # another method has no form as an adapter of llama.cpp; its merged model is a model like any other
    if work.method in adapter_methods.SERVED or not work.types:
        adapter = part / f"{work.name}-adapter.gguf"
        write_adapter_gguf(work.release.path, base.model.config.to_dict(), adapter, template=template)
        if work.measured:
            figures[adapter.name] = _ask_of_adapter(work, adapter, vocabulary, metadata)
    write_template(base, part)
    model = adapters.merge(work.model) if work.types else None
    for kind in work.types:
        file = gguf_writer.write_model_gguf(
            model, vocabulary, metadata, out=part / f"{work.name}-{kind}.gguf", kind=kind
        )
        if work.measured:
            with work.asking(f"llama.cpp of {file.name}") as progress:
                figures[file.name] = parity.ask_llama_cpp(file, kind, work.traces, template, progress=progress.advance)
    for file_name, file_figures in figures.items():
        parity.check(file_figures, f"{work.name} ({file_name})")
    if not work.types:
        return ExportedForm(figures, _USE_ADAPTER.format(name=work.name))
    use = _USE_GGUF if work.method in adapter_methods.SERVED else _USE_MERGED_GGUF
    return ExportedForm(figures, use.format(name=work.name, kind=work.types[0]))


def _own_file(base: Base) -> Path | None:
    return source_gguf(base.ref) if base.ref.gguf or base.ref.name == STARTER else None


def _ask_of_adapter(
    work: ExportContext, adapter: Path, vocabulary: gguf_writer.Vocabulary, metadata: gguf_writer.GgufMetadata
) -> Figures:
    """Measure llama.cpp with the adapter on the base's own GGUF file.

    Without such a file, the base is written as a temporary F16 file.
    """
    template, traces = metadata.template, work.traces
    if file := _own_file(work.base):
        with work.asking(f"llama.cpp of {adapter.name}") as progress:
            form = "adapter on the base's own file"
            return parity.ask_llama_cpp(
                file, form, traces, template=template, adapter=adapter, progress=progress.advance
            )
    base_model = adapters.undo(work.model)
    with tempfile.TemporaryDirectory(dir=adapter.parent, prefix=".base-") as folder:
        file = gguf_writer.write_model_gguf(base_model, vocabulary, metadata, Path(folder) / "base.gguf")
        with work.asking(f"llama.cpp of {adapter.name}") as progress:
            figures = parity.ask_llama_cpp(
                file, "adapter", traces, template=template, adapter=adapter, progress=progress.advance
            )
    work.model = adapters.open_adapter(base_model, work.release.path)
    return figures


_USE_PEFT = """    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("THE BASE"), ".")
    tokenizer = AutoTokenizer.from_pretrained(".")"""
_VLLM = """

vLLM: `vllm serve THE-BASE --enable-lora --lora-modules NAME=.`; SGLang: `--lora-paths NAME=.`"""
_USE_PROJECTORS = """

It also reads {towers}. `projectors.safetensors` holds what turns a tower's features into tokens: per kind
project_out(gelu(project_in((features - mean) / spread))), RMS-normed and multiplied by gain, over `stack` neighbouring
features (its metadata say how many). No other runtime has that: what is said above loads what reads text. Sartor
serves the whole."""
_USE_MERGED = """    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")

vLLM: `vllm serve .`; SGLang: `--model-path .`; Sartor: `base: THIS DIRECTORY` in a recipe."""
_USE_ADAPTER = """    llama-server --jinja -m BASE.gguf --lora {name}-adapter.gguf

BASE.gguf is the base that it was tuned on; a device has it (`sartor edge ask --base BASE.gguf`)."""
_USE_MERGED_GGUF = """    llama-server --jinja -m {name}-{kind}.gguf

It is the merged model: llama.cpp has no form for an adapter of this method.
Sartor: `base: {name}-{kind}.gguf` in a recipe."""
_USE_GGUF = """    llama-server --jinja -m {name}-{kind}.gguf
    llama-server --jinja -m BASE.gguf --lora {name}-adapter.gguf

The first runs the merged model; the second adds the adapter to the base that it was tuned on.
Sartor: `base: {name}-{kind}.gguf` in a recipe."""
