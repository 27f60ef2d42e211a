"""The three forms of an export: each writes its files into a new directory and tells how alike they answer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sartor.core.artifacts import Artifact
from sartor.core.model_refs import STARTER, source_gguf
from sartor.export import companions, measure, runtimes
from sartor.export.measure import Figures
from sartor.export.reference import Trace
from sartor.models import adapters, composed_model, gguf_writer
from sartor.models.base import Base
from sartor.models.gguf_writer import write_adapter_gguf
from sartor.models.loading import quiet

_WIDTHS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARD = "4GB"


@dataclass
class Work:
    """What a form is made of. `model`: the base in fp32 with the Release's adapter on it; used up when the form is done."""

    release: Artifact
    base: Base
    model: Any
    traces: Sequence[Trace]
    types: Sequence[str]
    measured: bool
    notice: Callable[[str], object]

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.release.manifest['name']}-{self.release.manifest['version']}"


@dataclass(frozen=True)
class Made:
    """A finished form: figures of its files by name, and the command lines or code that load it."""

    figures: dict[str, Figures]
    use: str


def write_peft(work: Work, part: Path) -> Made:
    """The PEFT directory as peft, vLLM and SGLang load it, with tokenizer and chat template."""
    reads = composed_model.read_towers(work.release.path)
    for file in (adapters.CONFIG, adapters.WEIGHTS, *([composed_model.FILE] if reads else [])):
        shutil.copyfile(work.release.path / file, part / file)
    companions.write_tokenizer(work.base, part)
    chat, device = work.base.chat, work.base.device
    del work.model, work.base.model
    work.notice("asking peft")
    figures = runtimes.ask_peft(part, work.base.ref.path, chat, work.traces, device)
    measure.check(figures, work.name)
    towers = ", ".join(f"{kind} by `{tower.name}` (`{tower.digest[:12]}`)" for kind, tower in reads.items())
    return Made({adapters.WEIGHTS: figures}, _USE_PEFT + (_USE_PROJECTORS.format(towers=towers) if reads else ""))


def write_merged(work: Work, part: Path) -> Made:
    """The base with the adapter added into its weights, in transformers' layout and the base's own type."""
    chat, device = work.base.chat, work.base.device
    model = adapters.merge(work.model).to(_width_of(work.base.ref.path))
    with quiet():
        model.save_pretrained(str(part), max_shard_size=_SHARD)
    del model, work.model, work.base.model
    companions.write_tokenizer(work.base, part)
    companions.write_generation_config(work.release, work.base, part)
    work.notice("asking transformers")
    figures = runtimes.ask_merged(part, chat, work.traces, device)
    measure.check(figures, work.name)
    return Made({"*.safetensors": figures}, _USE_MERGED)


def _width_of(base: Path) -> torch.dtype:
    """The type that a base's weights are stored in; fp32 where it is none of the usual ones."""
    with safe_open(sorted(base.glob("*.safetensors"))[0], "pt") as file:
        return _WIDTHS.get(file.get_slice(next(iter(file.keys()))).get_dtype(), torch.float32)


def write_gguf(work: Work, part: Path) -> Made:
    """The adapter as GGUF, and the merged model as one GGUF file a type; llama.cpp is asked of each."""
    base, manifest = work.base, work.release.manifest
    template = base.chat.template
    about = gguf_writer.About(
        manifest["name"],
        manifest["version"],
        work.release.licence,
        template,
        manifest["sampling"]["temperature"],
        manifest["sampling"]["top_p"],
    )
    vocabulary = _vocabulary(base, base.model.get_input_embeddings().weight.shape[0])
    adapter = part / f"{work.name}-adapter.gguf"
    write_adapter_gguf(work.release.path, base.model.config.to_dict(), adapter, template=template)
    figures: dict[str, Figures] = {}
    if work.measured:
        figures[adapter.name] = _ask_of_adapter(work, adapter, vocabulary, about)
    companions.write_template(base, part)
    model = adapters.merge(work.model) if work.types else None
    for kind in work.types:
        file = gguf_writer.write_model_gguf(model, vocabulary, about, part / f"{work.name}-{kind}.gguf", kind)
        if work.measured:
            work.notice(f"asking llama.cpp of {file.name}")
            figures[file.name] = runtimes.ask_llama_cpp(file, kind, work.traces, template)
    for file_name, found in figures.items():
        measure.check(found, f"{work.name} ({file_name})")
    use = _USE_GGUF.format(name=work.name, kind=work.types[0]) if work.types else _USE_ADAPTER.format(name=work.name)
    return Made(figures, use)


def _vocabulary(base: Base, rows: int) -> gguf_writer.Vocabulary:
    """The tokenizer of the file that the base came from; where it came from none, written from the tokenizer in memory."""
    if file := _own_file(base):
        return gguf_writer.from_file(file, rows)
    return gguf_writer.from_chat(base.chat, rows)


def _own_file(base: Base) -> Path | None:
    return source_gguf(base.ref) if base.ref.gguf or base.ref.name == STARTER else None


def _ask_of_adapter(work: Work, adapter: Path, vocabulary: gguf_writer.Vocabulary, about: gguf_writer.About) -> Figures:
    """llama.cpp with the adapter on the base's own GGUF file; where it has none, on the base written in F16 for this alone."""
    work.notice(f"asking llama.cpp of {adapter.name}")
    if file := _own_file(work.base):
        return runtimes.ask_llama_cpp(file, "adapter on the base's own file", work.traces, about.template, adapter)
    bare = adapters.undo(work.model)
    with tempfile.TemporaryDirectory(dir=adapter.parent, prefix=".base-") as folder:
        file = gguf_writer.write_model_gguf(bare, vocabulary, about, Path(folder) / "base.gguf")
        figures = runtimes.ask_llama_cpp(file, "adapter", work.traces, about.template, adapter)
    work.model = adapters.open_adapter(bare, work.release.path)
    return figures


_USE_PEFT = """    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("THE BASE"), ".")
    tokenizer = AutoTokenizer.from_pretrained(".")

vLLM: `vllm serve THE-BASE --enable-lora --lora-modules NAME=.`; SGLang: `--lora-paths NAME=.`"""
_USE_PROJECTORS = """

It also reads {towers}. `projectors.safetensors` holds what turns a tower's features into tokens: per kind
project_out(gelu(project_in((features - mean) / spread))), RMS-normed and multiplied by gain, over `stack` neighbouring features
(its metadata say how many). No other runtime has that: what is said above loads what reads text. Sartor serves the whole."""
_USE_MERGED = """    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")

vLLM: `vllm serve .`; SGLang: `--model-path .`; Sartor: `base: THIS DIRECTORY` in a recipe."""
_USE_ADAPTER = """    llama-server --jinja -m BASE.gguf --lora {name}-adapter.gguf

BASE.gguf is the base that it was tuned on; a device has it (`sartor edge ask --base BASE.gguf`)."""
_USE_GGUF = """    llama-server --jinja -m {name}-{kind}.gguf
    llama-server --jinja -m BASE.gguf --lora {name}-adapter.gguf

The first runs the merged model; the second adds the adapter to the base that it was tuned on.
Sartor: `base: {name}-{kind}.gguf` in a recipe."""
