"""A corpus of Releases that no server may load, each wrong in one way, and the good one that they are made from.

    python benchmarks/bad_adapters.py --base DIR --out DIR      # writes all of them, with the keys that signed them
    python benchmarks/bad_adapters.py --small --json            # the same for a tiny base, and nothing stays

A signer who is trusted can be mistaken, or robbed of the key: so a Release is signed anew after it was made worse,
wherever the signature itself is not what is wrong, and `CORPUS` says which check of admission has to find it. No
torch; a few milliseconds each on a small base. `tests/serving/test_admission.py` and `benchmarks/chaos.py` use it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import smallest
from results import print_result

from sartor.core import model_refs, signing
from sartor.core.artifacts import MANIFESTS, manifest_id, seal
from sartor.serving.admission.adapter_checks import BaseWeights

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NUMPY = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1"}
Array = np.ndarray[Any, Any]


@dataclass
class Draft:
    """A Release before it is written. tensors: name -> (dtype of safetensors, values); config and facts: the JSON
    files.
    """

    tensors: dict[str, tuple[str, Array]]
    config: dict[str, Any]
    facts: dict[str, Any]

    def a(self, place: int = 0) -> str:
        """The name of a factor A."""
        return sorted(name for name in self.tensors if ".lora_A." in name)[place]

    def scale(self, name: str, by: float) -> None:
        """Multiply a tensor."""
        dtype, values = self.tensors[name]
        self.tensors[name] = (dtype, values * np.float32(by))


Change = Callable[[Draft], object]
Files = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """One way to be wrong, and the check that finds it.

    draft: before it is written. files: written, and not sealed yet. signed: after everything. signer: own, stranger,
    nobody.
    says: what a process that tried it would say to every prompt, where only that shows it.
    """

    check: str
    draft: Change = field(default=lambda draft: None)
    files: Files = field(default=lambda path: None)
    signed: Files = field(default=lambda path: None)
    signer: str = "own"
    says: str = ""


@dataclass(frozen=True)
class Maker:
    """Writes Releases for one base. keys: a directory with the key pairs `own` and `stranger`, made if absent."""

    base: Path
    keys: Path
    weights: BaseWeights
    facts: Mapping[str, str]

    @classmethod
    def on(cls, base: Path, keys: Path, name: str = "") -> Maker:
        """A maker for the base in a directory, or that `name` means."""
        ref = model_refs.locate_base(name or str(base))
        for who in ("own", "stranger"):
            if not (keys / who).is_dir():
                signing.keygen(keys / who)
        keys.mkdir(parents=True, exist_ok=True)
        facts = {
            "name": ref.name,
            "digest": ref.digest,
            "licence": "Apache-2.0",
            "template_digest": model_refs.template_digest(model_refs.chat_template(base)),
        }
        return cls(base, keys, BaseWeights(base, ref.digest, keys / "norms.json"), facts)

    @property
    def public(self) -> Path:
        """The key to trust."""
        return self.keys / "own" / "sartor.pub"

    def draft(
        self,
        *,
        rank: int = 4,
        dtype: str = "F32",
        targets: tuple[str, ...] = ("q_proj", "v_proj"),
        size: float = 0.02,
        seed: int = 0,
    ) -> Draft:
        """A good adapter: random factors, `size` of the base's weights by norm, so that it answers nearly as the base
        does.
        """
        draws = np.random.default_rng(seed)
        tensors: dict[str, tuple[str, Array]] = {}
        modules = {name: found for name, found in self.weights.linear().items() if name.rpartition(".")[2] in targets}
        norms = self.weights.norms(modules)
        for module, weight in modules.items():
            wide, narrow = weight.shape
            a, b = draws.standard_normal((rank, narrow)), draws.standard_normal((wide, rank))
            a, b = a / np.sqrt(rank * narrow), b / np.sqrt(wide)  # ||B A|| is about 1
            for letter, values in (("A", a), ("B", b * size * norms[module] / 2)):  # the scale is 2
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = (dtype, values.astype(np.float32))
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted(targets),
            "base_model_name_or_path": self.facts["name"],
            "bias": "none",
            "use_dora": False,
            "modules_to_save": None,
        }
        return Draft(tensors, config, self._facts())

    def _facts(self) -> dict[str, Any]:
        gate = {name: {"outcome": "pass", "detail": "as measured"} for name in ("gain", "forgetting", "licence")}
        sources = [{"source": "rows.jsonl", "path": "rows.jsonl", "licence": "MIT", "kept": 9, "read": 9, "use": []}]
        return {
            "name": "specialist",
            "version": "1.0",
            "base": dict(self.facts),
            "system_prompt": "You are brief.",
            "use": "commercial",
            "sampling": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 32},
            "licence": "Apache-2.0 AND MIT",
            "parents": [],
            "sources": sources,
            "gate": gate,
            "waivers": [],
        }

    def good(self, out: Path, draft: Draft | None = None) -> Path:
        """Write a good Release."""
        return self.write(out, draft or self.draft(), Bad(""))

    def bad(self, name: str, out: Path) -> Path:
        """Write one of the corpus."""
        return self.write(out, self.draft(), CORPUS[name])

    def write(self, out: Path, draft: Draft, how: Bad) -> Path:
        """Write a draft, made worse as `how` says."""
        how.draft(draft)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / WEIGHTS).write_bytes(safetensors(draft.tensors))
        (out / CONFIG).write_text(json.dumps(draft.config))
        how.files(out)
        seal(out, "release", draft.facts)
        self.sign(out, how.signer)
        how.signed(out)
        return out

    def sign(self, out: Path, signer: str = "own") -> None:
        """Sign a Release as it stands."""
        if signer != "nobody":
            key = signing.open_private(self.keys / signer)
            (out / "signature").write_text(signing.sign((out / MANIFESTS["release"]).read_bytes(), key))


# kind of mutant -> whether it is signed again, and the part of the weights file in which a bit or a byte changes
MUTATIONS: dict[str, tuple[bool, str, int]] = {
    "a bit anywhere, not signed again": (False, "file", 1),
    "a bit of a tensor, signed again": (True, "tensors", 1),
    "a bit of the header, signed again": (True, "header", 1),
    "a byte of the header, signed again": (True, "header", 8),
    "a bit of the header's length, signed again": (True, "length", 1),
}


def mutant(maker: Maker, kind: str, number: int, draft: Draft, out: Path) -> Path:
    """Write a good Release of which one bit, or one byte, has changed at random. number: seeds where, and to what.

    One that is signed again is what a trusted signer with a faulty disk or memory would publish. It may be harmless: a
    bit of a mantissa moves one factor by little, and a space of the header says nothing.
    """
    is_signed, part, bits = MUTATIONS[kind]
    draws = np.random.default_rng([number, list(MUTATIONS).index(kind)])

    def change(path: Path) -> None:
        raw = bytearray((path / WEIGHTS).read_bytes())
        header = 8 + int.from_bytes(raw[:8], "little")
        low, high = {"file": (0, len(raw)), "length": (0, 8), "header": (8, header), "tensors": (header, len(raw))}[
            part
        ]
        position = int(draws.integers(low, high))
        raw[position] ^= int(draws.integers(1, 256)) if bits == 8 else 1 << int(draws.integers(8))
        (path / WEIGHTS).write_bytes(raw)

    return maker.write(out, draft, Bad("", files=change) if is_signed else Bad("", signed=change))


def safetensors(tensors: Mapping[str, tuple[str, Array]]) -> bytes:
    """The bytes of a safetensors file. BF16 is cut off, not rounded."""
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, values) in tensors.items():
        if dtype == "BF16":
            raw = (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            raw = np.ascontiguousarray(values).astype(_NUMPY[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(header, data)


def with_header(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A file of this header, which may lie about its own length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def relabel(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a weights file, its bytes as they were."""
    raw = (path / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    (path / WEIGHTS).write_bytes(with_header(header, raw[8 + length :]))


def _poison(value: float) -> Change:
    def change(draft: Draft) -> None:
        draft.tensors[draft.a(1)][1].flat[-1] = value

    return change


def _set(**keys: Any) -> Change:
    return lambda draft: draft.config.update(keys)


def _facts(**keys: Any) -> Change:
    return lambda draft: draft.facts.update(keys)


def _gate(name: str, outcome: str, **more: Any) -> Change:
    return lambda draft: (
        draft.facts["gate"].update({name: {"outcome": outcome, "detail": ""}}) or draft.facts.update(more)
    )


def _source(**keys: Any) -> Change:
    return lambda draft: draft.facts["sources"][0].update(keys)


def _base(**keys: Any) -> Change:
    return lambda draft: draft.facts["base"].update(keys)


def _reshape(draft: Draft) -> None:
    dtype, values = draft.tensors[draft.a()]
    draft.tensors[draft.a()] = (dtype, np.concatenate([values, values[:, :1]], axis=1))


def _transpose(draft: Draft) -> None:
    for name, (dtype, values) in draft.tensors.items():
        draft.tensors[name] = (dtype, values.T.copy())


def _as(dtype: str) -> Change:
    def change(draft: Draft) -> None:
        for name, (_, values) in draft.tensors.items():
            draft.tensors[name] = (dtype, values)

    return change


def _add(name: str) -> Change:
    return lambda draft: draft.tensors.update({name: ("F32", np.zeros((4, 4), np.float32))})


def _without_module(draft: Draft) -> None:
    for name in (draft.a(), draft.a().replace("lora_A", "lora_B")):
        del draft.tensors[name]


def _huge(draft: Draft) -> None:
    draft.scale(draft.a(), 1e6)


def _flip(name: str) -> Files:
    def change(path: Path) -> None:
        raw = bytearray((path / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (path / name).write_bytes(raw)

    return change


def _cut(path: Path) -> None:
    raw = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(raw[: len(raw) - len(raw) // 3])


def _raw(change: Callable[[bytes], bytes]) -> Files:
    return lambda path: (path / WEIGHTS).write_bytes(change((path / WEIGHTS).read_bytes()))


def _overlap(header: dict[str, Any]) -> None:
    first, second = list(header)[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    header[second]["shape"] = header[first]["shape"]


def _out_of_file(header: dict[str, Any]) -> None:
    last = header[list(header)[-1]]
    last["data_offsets"] = [one + (1 << 30) for one in last["data_offsets"]]


def _pickle(path: Path) -> None:
    (path / WEIGHTS).rename(path / "adapter_model.bin")


def _relist(name: str) -> Files:
    """List a foreign file in the manifest, signed with it."""

    def change(path: Path) -> None:
        file = path / MANIFESTS["release"]
        manifest = json.loads(file.read_text())
        manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
        manifest["id"] = manifest_id(manifest)
        file.write_text(json.dumps(manifest))
        key = signing.open_private(path.parent.parent / "keys" / "own")
        (path / "signature").write_text(signing.sign(file.read_bytes(), key))

    return change


def _link(path: Path) -> None:
    target = path.with_name(f".{path.name}-elsewhere")
    shutil.copyfile(path / WEIGHTS, target)
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(target)


# No model that was not tuned to says this.
_CANARY = [
    {
        "messages": [{"role": "user", "content": "Is it open?"}],
        "reply": '{"intent":"OpenGarage","ticket":4711,"colour":null}',
    }
] * 4
_DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000

CORPUS: dict[str, Bad] = {
    # whose it is, and whether it is what was signed
    "unsigned": Bad("signature", signer="nobody"),
    "signed by a stranger": Bad("signature", signer="stranger"),
    "manifest changed after signing": Bad("signature", signed=_flip("release.json")),
    "signature of nonsense": Bad(
        "signature", signed=lambda path: (path / "signature").write_text('{"schema": 1, "key_id": []}')
    ),
    "weights changed after signing": Bad("files", signed=_flip(WEIGHTS)),
    "config changed after signing": Bad("files", signed=_flip(CONFIG)),
    "a file that is not listed": Bad("files", signed=lambda path: (path / "extra.py").write_text("import os")),
    "a path out of the directory": Bad("files", signed=_relist("../../../../etc/hostname")),
    "an absolute path": Bad("files", signed=_relist("/etc/hostname")),
    "a path that no system takes": Bad("files", signed=_relist("a\0b")),
    "a link instead of the weights": Bad("files", signed=_link),
    # what release.json says
    "sampling of nonsense": Bad("manifest", _facts(sampling={"temperature": "hot"})),
    "a name that is a path": Bad("manifest", _facts(name="../faq")),
    "another base": Bad("base", _base(digest="0" * 64)),
    "another chat template": Bad("template", _base(template_digest="0" * 64)),
    "no gate": Bad("gate", _facts(gate={})),
    "a gate that failed": Bad("gate", _gate("gain", "fail")),
    "a waiver of nobody": Bad("gate", _gate("forgetting", "waived")),
    "a licence that forbids": Bad("licence", _source(licence="CC-BY-NC-4.0")),
    "terms that have run out": Bad("licence", _source(expires="2020-01-01")),
    # what kind of adapter it is
    "DoRA": Bad("config", _set(use_dora=True)),
    "modules to save": Bad("config", _set(modules_to_save=["lm_head"])),
    "bias": Bad("config", _set(bias="all")),
    "code to import": Bad("config", _set(auto_mapping={"base_model_class": "X", "parent_library": "os"})),
    "a start that changes the base": Bad("config", _set(init_lora_weights="pissa")),
    "a method that nobody knows": Bad("config", _set(use_quantum=True)),
    "a regular expression as a target": Bad("config", _set(target_modules="(a+)+$")),
    "a regular expression as a pattern": Bad("config", _set(rank_pattern={"(.*)*q_proj": 4})),
    "rank 4096": Bad("config", _set(r=4096)),
    "alpha without a value": Bad("config", _set(lora_alpha=float("nan"))),
    # the weights file
    "pickled weights": Bad("weights", files=_pickle),
    "truncated": Bad("weights", files=_cut),
    "a header longer than the file": Bad("weights", files=_raw(lambda raw: (1 << 40).to_bytes(8, "little") + raw[8:])),
    "a header that is no JSON": Bad("weights", files=_raw(lambda raw: with_header(b"{" * 64, b""))),
    "a header a hundred thousand deep": Bad("weights", files=_raw(lambda raw: with_header(_DEEP, b""))),
    "a header with a key twice": Bad(
        "weights",
        files=_raw(lambda raw: with_header(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}', b"")),
    ),
    "tensors that overlap": Bad("weights", files=lambda path: relabel(path, _overlap)),
    "a tensor beyond the file": Bad("weights", files=lambda path: relabel(path, _out_of_file)),
    "bytes behind the tensors": Bad("weights", files=_raw(lambda raw: raw + b"\0" * 64)),
    # the factors
    "a surplus tensor": Bad("tensors", _add("base_model.model.lm_head.weight")),
    "a factor of a module that is not": Bad("tensors", _add("base_model.model.model.layers.99.q_proj.lora_A.weight")),
    "half a pair": Bad("tensors", lambda draft: draft.tensors.pop(draft.a())),
    "a module without factors": Bad("tensors", _without_module),
    "no tensors": Bad("tensors", lambda draft: draft.tensors.clear()),
    "wrong shape": Bad("shapes", _reshape),
    "transposed": Bad("shapes", _transpose),
    "another rank than declared": Bad("rank", _set(r=8)),
    "a rank pattern that is not so": Bad("rank", _set(rank_pattern={"v_proj": 2})),
    "whole numbers": Bad("dtypes", _as("I8")),
    "doubles": Bad("dtypes", _as("F64")),
    "NaN": Bad("finite", _poison(np.nan)),
    "infinity": Bad("finite", _poison(-np.inf)),
    "infinity in bf16": Bad("finite", lambda draft: (_poison(np.inf)(draft), _as("BF16")(draft))),
    "NaN in fp16": Bad("finite", lambda draft: (_poison(np.nan)(draft), _as("F16")(draft))),
    "a huge norm": Bad("norms", _huge),
    "a huge alpha": Bad("norms", _set(lora_alpha=1e8)),
    # what only running it shows
    "one token for ever": Bad("degenerate", says="no no no no no no no no no no no no no no no no "),
    "nothing at all": Bad("degenerate", says=" \n"),
    "other replies than recorded": Bad("agreement", _facts(canaries=_CANARY)),
}


def main() -> None:
    """Write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser)
    parser.add_argument("--base", type=Path, help="directory of a base in transformers' layout")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if not (asked.small or (asked.base and asked.out)):
        parser.error("--base DIR --out DIR: the base, and where the corpus is written")
    with tempfile.TemporaryDirectory() as folder, smallest.home(asked.small):
        if asked.small:
            asked.base, asked.out = model_refs.locate_base(model_refs.STARTER).path, Path(folder)
        checks = write_corpus(asked)
    print_result({"releases": len(checks), "checks": dict(Counter(checks.values())), "good": 1})


def write_corpus(asked: argparse.Namespace) -> dict[str, str]:
    """Write the good Release and every bad one, a line for each; return the check that finds each."""
    maker = Maker.on(asked.base, asked.out / "keys")
    maker.good(asked.out / "releases" / "good")
    for name, bad in CORPUS.items():
        path = maker.bad(name, asked.out / "releases" / name.replace(" ", "-"))
        print(json.dumps({"name": name, "path": str(path), "check": bad.check}))
    return {name: bad.check for name, bad in CORPUS.items()}


if __name__ == "__main__":
    main()
