"""The parsers of outside input, each with valid inputs to mutate, and how one input is read as the product reads it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import hashlib
import io
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import media_files
from federating import COORDINATOR, LENIENT, identity, names, roster_of, terms
from fuzzing import MEMORY_BYTES, Form, Parser
from sartor.core import config, records, signing
from sartor.core.artifacts import MANIFESTS, manifest_id, open_artifact, seal
from sartor.core.errors import SartorError, SourceError
from sartor.core.records import Feedback, FeedbackAuthor, MalformedRow
from sourcing import Rows

PARSERS: dict[str, Parser] = {}
_ROW_MEMORY_BYTES = 96 << 20  # a row may have 4 MiB, and is held as bytes, as text and as an Example


def parser(
    name: str,
    seeds: Callable[[], Sequence[bytes]],
    form: Form = "bytes",
    *,
    memory_bytes: int = MEMORY_BYTES,
    is_native: bool = False,
    words: Sequence[bytes] = (),
) -> Callable[[Callable[[bytes, Path], object]], Callable[[bytes, Path], object]]:
    """Register a function that reads one input."""

    def register(parse: Callable[[bytes, Path], object]) -> Callable[[bytes, Path], object]:
        PARSERS[name] = Parser(name, parse, functools.cache(seeds), form, memory_bytes, is_native, tuple(words))
        return parse

    return register


def dumped(*values: Any) -> list[bytes]:
    return [json.dumps(value, ensure_ascii=False).encode() for value in values]


def written(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


@functools.cache
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(b"k" * 32)


@contextlib.contextmanager
def malformed_is_refused() -> Any:
    """A row's fault is counted under its reason, and the file goes on: as good as an error with a remedy."""
    try:
        yield
    except MalformedRow as fault:
        assert fault.reason and fault.detail
        raise SourceError(fault.detail, f"counted as {fault.reason}") from None


# -- rows -------------------------------------------------------------------------------------------------------------

_CHAT = [{"role": "user", "content": "What colour is the sky?"}, {"role": "assistant", "content": "Blue — é 🐈."}]
_PARTS = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "pictures/a.png"}}]
_CALL = {"id": "c1", "type": "function", "function": {"name": "light", "arguments": '{"room": "hall"}'}}
_ROWS: list[dict[str, Any]] = [
    {"messages": _CHAT, "id": "a1", "licence": "MIT", "date": "2024-05-01", "weight": 1.0},
    {"messages": [{"role": "user", "content": _PARTS}, _CHAT[1]], "images": ["a.png"]},
    {"messages": [_CHAT[0], {"role": "assistant", "content": None, "tool_calls": [_CALL]}], "tools": [_CALL]},
    {"conversations": [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "lo"}], "image": "a.png"},
    {"instruction": "Translate", "input": "Haus", "output": "house"},
    {"prompt": "p", "completion": "c", "rating": 0.5},
    {"prompt": _CHAT[:1], "chosen": _CHAT[1:], "rejected": [{"role": "assistant", "content": "Red"}]},
    {"question": "q", "answer": "a"},
    {"text": "A document.", "url": "https://example.org", "created_at": "2024-01-02T03:04:05Z"},
    {
        "id": 7,
        "data": {"text": "q"},
        "annotations": [{"result": [{"type": "choices", "value": {"choices": ["a"]}, "from_name": "l"}]}],
    },
    {
        "id": "9",
        "fields": {"prompt": "q"},
        "responses": {"answer": [{"value": "a", "status": "submitted"}]},
        "suggestions": {"answer": {"value": "b", "score": 0.5}},
    },
]


def read_file(content: bytes, folder: Path, name: str) -> None:
    """Read a file as a source, to its Examples and Drops."""
    for drop in Rows(folder / "media", written(folder, name, content)).drops:
        assert drop.reason and drop.detail


@parser(
    "rows_jsonl",
    lambda: [*dumped(*_ROWS), b"\n".join(dumped(*_ROWS))],
    "json",
    memory_bytes=_ROW_MEMORY_BYTES,
)
def _(content: bytes, folder: Path) -> None:
    read_file(content, folder, "rows.jsonl")


@parser(
    "rows_json",
    lambda: dumped(_ROWS[:3], {"data": _ROWS[:2], "other": [{"a": 1}]}, {"a": _ROWS[0], "b": _ROWS[4]}, _ROWS[9:10]),
    "json",
    memory_bytes=_ROW_MEMORY_BYTES,
)
def _(content: bytes, folder: Path) -> None:
    read_file(content, folder, "rows.json")


def _csv() -> list[bytes]:
    return [
        b'prompt,completion\nhi,"a, b"\n"two\nlines",x\n',
        'sep=;\r\nFrage;Antwort\r\nWie heißt du?;"Otto ""der"" Große"\r\n'.encode("cp1252"),
        "question\tanswer\n\u4f60\u597d\thello\n".encode("utf-16"),
        b"instruction|input|output\na|b|c\n",
    ]


@parser(
    "rows_csv", _csv, "text", memory_bytes=_ROW_MEMORY_BYTES, words=[b'"""', b",,,,", b"=cmd|' /C calc'!A0", b"\n\n"]
)
def _(content: bytes, folder: Path) -> None:
    read_file(content, folder, "rows.csv")


def _parquet() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    result = []
    for compression in ("none", "zstd", "snappy"):
        for rows in ([{"prompt": "p", "completion": "c"}] * 20, _ROWS[:1] * 3):
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), file, compression=compression, use_dictionary=len(rows) > 3)
            result.append(file.getvalue())
    return result


@parser("rows_parquet", _parquet, memory_bytes=512 << 20, is_native=True)
def _(content: bytes, folder: Path) -> None:
    read_file(content, folder, "rows.parquet")


def _texts() -> list[bytes]:
    return [
        b"---\ntitle: x\n---\n# Heading\n\ntext [a](b)\n",
        b"+++\nx = 1\n+++\ntext",
        "Grüße aus Köln\n".encode("cp1252") * 20,
        "\u041f\u0440\u0438\u0432\u0435\u0442".encode("utf-16"),
    ]


@parser("rows_markup", _texts, "text", words=[b"---\n", b"+++\n", b"<b>", b"```\n"])
def _(content: bytes, folder: Path) -> None:
    read_file(content, folder, "text.md")


def read_office(content: bytes, folder: Path, kind: str) -> None:
    """Read a document as the child process does that has limits (document_worker.py)."""
    from sartor.curate.sources import document_worker

    file = written(folder, f"document.{kind}", content)
    request = {
        "path": str(file),
        "sha256": hashlib.sha256(content).hexdigest(),
        "kind": kind,
        "most": 4 << 20,
        "sheet": "",
    }
    for reply in document_worker.answer(request):
        json.dumps(reply)
        assert "reason" not in reply or (reply["reason"] and reply["detail"])


def _html() -> list[bytes]:
    return [
        b"<!doctype html><html><head><meta charset=latin-1><title>t</title></head><body><p>a<br>b</p><table><tr><td>1"
        b"</td></tr></table><script>x</script><pre>  y</pre></body></html>",
        b"<?xml version='1.0'?><html xmlns='http://www.w3.org/1999/xhtml'><body><ul><li>1<li hidden>2</ul></body></html>",
    ]


@parser(
    "rows_html",
    _html,
    "text",
    is_native=True,
    words=[b"<div>" * 2000, b"<table><tr>" * 200, b"&#x110000;", b"<!--", b"<![CDATA["],
)
def _(content: bytes, folder: Path) -> None:
    read_office(content, folder, "html")


def _pdf() -> list[bytes]:
    from sourcing import pdf

    return [pdf("Hello", "World"), pdf("")]


@parser(
    "rows_pdf",
    _pdf,
    memory_bytes=256 << 20,
    words=[b"1 0 R", b"<< /Kids [1 0 R] >>", b"/Filter /FlateDecode", b"stream\n"],
)
def _(content: bytes, folder: Path) -> None:
    read_office(content, folder, "pdf")


def _workbook() -> list[bytes]:
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["prompt", "completion"], ["q", "a"], ["2", 3.5]):
        book.active.append(row)
    book.save(file := io.BytesIO())
    return [file.getvalue(), *_repacked(file.getvalue())]


def _document() -> list[bytes]:
    import docx

    document = docx.Document()
    document.add_heading("h")
    document.add_paragraph("text")
    document.add_table(1, 2).cell(0, 0).text = "cell"
    document.save(file := io.BytesIO())
    return [file.getvalue(), *_repacked(file.getvalue())]


def _repacked(content: bytes) -> list[bytes]:
    """Return a package without compression, so that mutations reach its XML."""
    import zipfile

    with zipfile.ZipFile(io.BytesIO(content)) as package, zipfile.ZipFile(file := io.BytesIO(), "w") as stored:
        for info in package.infolist():
            stored.writestr(info.filename, package.read(info))
    return [file.getvalue()]


@parser(
    "rows_xlsx", _workbook, memory_bytes=256 << 20, words=[b"<row>", b"<c r='ZZZ9999999'>", b"&lol;", b"PK\x03\x04"]
)
def _(content: bytes, folder: Path) -> None:
    read_office(content, folder, "xlsx")


@parser("rows_docx", _document, memory_bytes=256 << 20, words=[b"<w:p>", b"&lol;", b"PK\x03\x04"])
def _(content: bytes, folder: Path) -> None:
    read_office(content, folder, "docx")


def _feedback() -> list[bytes]:
    messages = tuple(_CHAT[:1])
    lines = [
        Feedback(
            "r1", "faq@1.0", "2026-11-26T10:00:00Z", 1.0, messages=messages, reply="blue", by=FeedbackAuthor("k1")
        ),
        Feedback("r2", "faq@1.0", "2026-11-26T10:00:01Z", -1.0, "green", "no", messages, reply="blue"),
        Feedback(
            "r3",
            "faq@1.0",
            "2026-11-26T10:00:02Z",
            text="raw",
            reply="x",
            correction='[{"on": 1}]',
            masked={"email": 1},
        ),
    ]
    return [*dumped(*(line.as_json() for line in lines)), b"\n".join(dumped(*(line.as_json() for line in lines)))]


@parser("feedback_lines", _feedback, "json", memory_bytes=_ROW_MEMORY_BYTES)
def _(content: bytes, folder: Path) -> None:
    (folder / "inbox").mkdir(exist_ok=True)
    written(folder / "inbox", "feedback-2026-11-26.jsonl", content)
    for drop in Rows(folder / "media", f"inbox:{folder / 'inbox'}").drops:
        assert drop.reason and drop.detail


# -- configuration ----------------------------------------------------------------------------------------------------

_YAML_WORDS = [
    b"!!python/object/apply:os.system [ls]",
    b"&a [*a]",
    b"&a {a: *a}",
    b"<<: &m {<<: *m}",
    b"? [a]\n: b\n",
    b"!!binary AAA=",
    b"!!set {a, b}",
    b"!!omap [a: 1]",
    b"2024-01-01",
    b".inf",
    b".nan",
    b"0x_",
    b"1_000",
    b"0b1",
    b"190:20:30",
    b"null: 1\n",
    b"1: 2\n",
    b"[]: x\n",
    b"{}: x\n",
    b"- " * 2000,
    b"{a: " * 500,
    b"a: &x [1,1,1,1,1,1,1,1]\nb: &y [*x,*x,*x,*x,*x,*x,*x,*x]\nc: &z [*y,*y,*y,*y,*y,*y,*y,*y]\nd: [*z,*z,*z,*z,*z,*z]\n",
    b"\t",
    b"|\n",
    b"%YAML 9.9\n---\n",
]


def _recipe(text: str, folder: Path) -> Path:
    return written(folder, "recipe.yaml", text.encode())


def _curate_yaml() -> list[bytes]:
    root = Path(__file__).parents[2]
    return [file.read_bytes() for file in sorted((root / "recipes").glob("*.yaml"))]


@parser("yaml_curate", _curate_yaml, "text", words=_YAML_WORDS)
def _(content: bytes, folder: Path) -> None:
    from sartor.curate.pipeline import load_recipe

    config.dump(load_recipe(written(folder, "recipe.yaml", content)))


def _tune_yaml() -> list[bytes]:
    from sartor.tune import recipe

    whole = config.dump(recipe.load({"base": "starter", "data": "rows"}))
    short = {"base": "starter", "data": {"path": "rows"}, "method": {"kind": "lora", "rank": 8, "alpha": 16}}
    return [yaml.safe_dump(whole).encode(), yaml.safe_dump(short).encode()]


@parser("yaml_tune", _tune_yaml, "text", words=_YAML_WORDS)
def _(content: bytes, folder: Path) -> None:
    from sartor.tune import recipe

    config.dump(recipe.load(written(folder, "recipe.yaml", content)))


def _team_yaml() -> list[bytes]:
    root = Path(__file__).parents[2]
    plan = {
        "base": "starter",
        "agents": [{"name": "a", "release": "r"}, {"name": "b", "release": "s", "tools": ["home"]}],
        "tools": [{"name": "home", "command": ["python", "server.py"]}],
        "plans": [{"name": "checked", "kind": "sequence", "steps": ["a", "b"]}],
        "engine": {"kind": "openai", "url": "http://127.0.0.1:8000/v1"},
        "limits": {"slow_client_s": 5.0},
        "http": {"port": 0, "cors": ["https://example.org"]},
    }
    return [(root / "examples/team/team.yaml").read_bytes(), yaml.safe_dump(plan).encode()]


@parser("yaml_team", _team_yaml, "text", words=_YAML_WORDS)
def _(content: bytes, folder: Path) -> None:
    from sartor.serving import team_config

    config.dump(team_config.load(written(folder, "team.yaml", content)))


def _federate_yaml() -> list[bytes]:
    from sartor.federate import recipe

    short = {"base": "starter", "rounds": 3}
    return [yaml.safe_dump(short).encode(), yaml.safe_dump(config.dump(recipe.load(short))).encode()]


@parser("yaml_federate", _federate_yaml, "text", words=_YAML_WORDS)
def _(content: bytes, folder: Path) -> None:
    from sartor.federate import recipe

    config.dump(recipe.load(written(folder, "recipe.yaml", content)))


def _synthesize_yaml() -> list[bytes]:
    from sartor.synthesize.synthesis import load_recipe

    short = {"ways": ["vary"], "sources": [{"path": "rows.jsonl", "licence": "MIT"}], "seed": 1}
    return [yaml.safe_dump(short).encode(), yaml.safe_dump(config.dump(load_recipe(short))).encode()]


@parser("yaml_synthesize", _synthesize_yaml, "text", words=_YAML_WORDS)
def _(content: bytes, folder: Path) -> None:
    from sartor.synthesize.synthesis import load_recipe

    config.dump(load_recipe(written(folder, "recipe.yaml", content)))


# -- headers of files -------------------------------------------------------------------------------------------------


@functools.cache
def _tensors(scale: int = 1) -> bytes:
    from updating import write_safetensors

    with tempfile.TemporaryDirectory() as name:
        values = np.arange(8, dtype=np.float32).reshape(2, 4) * scale
        half = values.astype(np.float16)
        return write_safetensors(Path(name) / "a", {"a.lora_A": ("F32", values), "b": ("F16", half)}).read_bytes()


def _safetensors() -> list[bytes]:
    content = _tensors()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    with_metadata = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return [content, len(with_metadata).to_bytes(8, "little") + with_metadata + content[8 + length :]]


@parser("safetensors_header", _safetensors, words=[b"data_offsets", b'"F64"', b'"shape":[1,1,1,1]'])
def _(content: bytes, folder: Path) -> None:
    from sartor.core import safetensors_file

    for tensor in safetensors_file.read_header(written(folder, "a.safetensors", content)).values():
        if tensor.dtype in safetensors_file.FLOATS:
            tensor.values()


@parser(
    "safetensors_header_json",
    lambda: [_safetensors()[1][8 : 8 + int.from_bytes(_safetensors()[1][:8], "little")]],
    "json",
)
def _(content: bytes, folder: Path) -> None:
    """The JSON of the header, its length right."""
    from sartor.core import safetensors_file
    from sartor.edge.update import tensor_delta

    values = _tensors()[-48:]
    whole = len(content).to_bytes(8, "little") + content + values
    file = written(folder, "a.safetensors", whole)
    with contextlib.suppress(safetensors_file.ModelError):
        for tensor in safetensors_file.read_header(file).values():
            if tensor.dtype in safetensors_file.FLOATS:
                tensor.values()
    tensor_delta.layout_of(io.BytesIO(whole))


def _gguf() -> list[bytes]:
    import struct

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.context_length") + struct.pack("<II", 4, 512),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<2f", 0.5, 1.0),
    ]
    tensor = text("blk.0.attn_q.weight") + struct.pack("<I2QIQ", 2, 4, 4, 0, 0)
    return [b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + b"".join(pairs) + tensor + bytes(128)]


@parser("gguf_header", _gguf, words=[b"\x09\0\0\0" * 3, b"\x09\0\0\0\x01\0\0\0\0\0\0\0" * 3_000])
def _(content: bytes, folder: Path) -> None:
    from sartor.core import gguf_header

    file = written(folder, "a.gguf", content)
    gguf_header.read_head(file)
    gguf_header.read_head(file, ("tokenizer.ggml.tokens", "tokenizer.ggml.scores"))


def _delta() -> list[bytes]:
    from sartor.edge.update import tensor_delta

    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        from updating import write_safetensors

        old = rng.standard_normal((64, 64)).astype(np.float32)
        base = write_safetensors(folder / "old", {"w": ("F32", old)})
        new = write_safetensors(folder / "new", {"w": ("F32", old), "v": ("F32", old[:4] + 1e-3)})
        assert tensor_delta.make(base, new, folder / "delta") is not None
        return [base.read_bytes(), new.read_bytes(), (folder / "delta").read_bytes()]


_DELTA = functools.cache(_delta)


@parser("edge_delta", lambda: [_DELTA()[2]])
def _(content: bytes, folder: Path) -> None:
    from sartor.edge.update import tensor_delta

    for base in (io.BytesIO(_DELTA()[0]), None):
        with contextlib.suppress(tensor_delta.ArtifactError):
            for _ in tensor_delta.apply(base, io.BytesIO(content), len(_DELTA()[1])):
                pass
    for _ in tensor_delta.apply(io.BytesIO(_DELTA()[0]), io.BytesIO(content), len(_DELTA()[1])):
        pass


def _delta_heads() -> list[bytes]:
    import lzma
    import struct

    from sartor.edge.update import tensor_delta

    content = _DELTA()[2]
    start = len(tensor_delta.MAGIC)
    length = struct.unpack("<I", content[start : start + 4])[0]
    packed = content[start + 4 : start + 4 + length]
    text = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=tensor_delta._FILTERS).decompress(packed)
    return [text[4 : 4 + struct.unpack("<I", text[:4])[0]]]


@parser("edge_delta_head", _delta_heads, "json")
def _(content: bytes, folder: Path) -> None:
    """The JSON of a delta's head, packed as it must be."""
    import lzma
    import struct

    from sartor.edge.update import tensor_delta

    old = _DELTA()[2]
    start = len(tensor_delta.MAGIC)
    length = struct.unpack("<I", old[start : start + 4])[0]
    text = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=tensor_delta._FILTERS).decompress(
        old[start + 4 : start + 4 + length]
    )
    header = text[4 + struct.unpack("<I", text[:4])[0] :]
    coder = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=tensor_delta._FILTERS)
    packed = coder.compress(struct.pack("<I", len(content)) + content + header) + coder.flush()
    whole = tensor_delta.MAGIC + struct.pack("<I", len(packed)) + packed + old[start + 4 + length :]
    for _ in tensor_delta.apply(io.BytesIO(_DELTA()[0]), io.BytesIO(whole), len(_DELTA()[1])):
        pass


def _pictures() -> list[bytes]:
    from PIL import Image

    result = [media_files.png(side=24)]
    image = Image.open(io.BytesIO(media_files.noise(24)))
    for form in ("JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        (image.convert("RGB") if form in ("JPEG", "BMP") else image).save(file := io.BytesIO(), form)
        result.append(file.getvalue())
    return result


@parser("image_header", _pictures, memory_bytes=256 << 20, is_native=True)
def _(content: bytes, folder: Path) -> None:
    from sartor.curate.sources import media_files as readers
    from sartor.media.images import open_image

    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tif"):
        with contextlib.suppress(SourceError), malformed_is_refused():
            readers.check(io.BytesIO(content), name)
    open_image(content)


def _sounds() -> list[bytes]:
    return [media_files.sound(0.1, 8_000, form) for form in ("WAV", "FLAC", "OGG", "MP3")]


@parser("audio_header", _sounds, memory_bytes=256 << 20, is_native=True)
def _(content: bytes, folder: Path) -> None:
    from sartor.media.audio import read_sound

    read_sound(content, 16_000, 30)


# -- manifests --------------------------------------------------------------------------------------------------------

_LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "tiny",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 8},
    "use_rslora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
}


@parser("adapter_config", lambda: dumped(_LORA), "json")
def _(content: bytes, folder: Path) -> None:
    from sartor.serving.admission import adapter_checks

    adapter_checks.read_config(written(folder, "adapter_config.json", content))


@functools.cache
def _artifacts() -> Path:
    """One artefact of each kind whose manifest is read, in a folder that lives as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="sartor-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(shutil.rmtree, f"{folder}-scratch", ignore_errors=True)
    base = {"name": "nowhere", "digest": "0" * 64, "template_digest": "0" * 64}
    facts: dict[str, dict[str, Any]] = {
        "release": {"name": "home", "version": "1.0", "base": base, "gate": {}, "licence": "MIT", "system_prompt": ""},
        "adapter": {"base": base, "licence": "MIT", "parents": [], "recipe": {}, "training": {"updates": 3}},
        "dataset": {"licence": "MIT", "counts": {"splits": {"train": 0}, "dropped": {}}, "sources": [], "recipe": {}},
        "report": {"licence": "MIT", "parents": [], "scores": {}},
        "export": {"form": "peft", "base": base, "parents": []},
    }
    for kind, values in facts.items():
        (folder / kind).mkdir()
        (folder / kind / "adapter_model.safetensors").write_bytes(_tensors())
        seal(folder / kind, kind, values)  # type: ignore[arg-type]
    return folder


@functools.cache
def _scratch() -> Path:
    """A copy whose manifests are written over."""
    return Path(shutil.copytree(_artifacts(), _artifacts().with_name(f"{_artifacts().name}-scratch")))


@functools.cache
def _manifests() -> list[bytes]:
    return [
        (_artifacts() / kind / MANIFESTS[kind]).read_bytes().replace(b"\n", b" ") for kind in ("release", "dataset")
    ]


def _with_manifest(content: bytes, kind: str) -> Path:
    written(_scratch() / kind, MANIFESTS[kind], content)
    return _scratch() / kind


@parser(
    "artifact_manifest",
    lambda: [*_manifests(), (_artifacts() / "adapter/sartor.json").read_bytes().replace(b"\n", b" ")],
    "json",
)
def _(content: bytes, folder: Path) -> None:
    kind = next((kind for kind in ("release", "adapter") if f'"kind": "{kind}"'.encode() in content), "dataset")
    open_artifact(_with_manifest(content, kind))


def resealed(content: bytes) -> bytes | None:
    """A manifest whose id fits what was done to it, as its maker could write it; None if no id can be made."""
    try:
        fields = json.loads(content)
        return json.dumps({**fields, "id": manifest_id(fields)}).encode()
    except (ValueError, TypeError, RecursionError):
        return None


@parser("release_manifest_signed", lambda: [_manifests()[0]], "json")
def _(content: bytes, folder: Path) -> None:
    """By a trusted signer who writes what no Release holds."""
    from sartor.release.release import verify

    if (sealed := resealed(content)) is None:
        return
    path = _with_manifest(sealed, "release")
    (path / "signature").write_text(signing.sign(sealed, key()))
    json.dumps(verify(path, key=public_key()).as_json())


@functools.cache
def public_key() -> Path:
    from cryptography.hazmat.primitives import serialization

    file = _artifacts() / "sartor.pub"
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    file.write_bytes(key().public_key().public_bytes(serialization.Encoding.PEM, form))
    return file


@parser("dataset_manifest_sealed", lambda: [_manifests()[1]], "json")
def _(content: bytes, folder: Path) -> None:
    from sartor.quickstart.show import show

    if (sealed := resealed(content)) is not None:
        json.dumps(show(_with_manifest(sealed, "dataset")).as_json())


@parser("signature", lambda: [signing.sign(b"document", key()).replace("\n", " ").encode()], "json")
def _(content: bytes, folder: Path) -> None:
    signing.check(b"document", written(folder, "signature", content), [key().public_key()])


# -- receipts ---------------------------------------------------------------------------------------------------------


def _receipt() -> dict[str, Any]:
    from receipt_fakes import ABOUT, given
    from sartor.serving.receipts import build_receipt, digest_by

    def sign(receipt: dict[str, Any]) -> dict[str, Any]:
        return {**receipt, "signature": signing.signature_of(records.canonical(receipt), key(), "receipt")}

    signer: Any = SimpleNamespace(sign=sign, digest=digest_by(b"d" * 32))
    return build_receipt(given(release=""), ABOUT, signer)


def _receipts() -> list[bytes]:
    receipt = _receipt()
    return dumped(receipt, {"receipt": receipt, "messages": _CHAT[:1], "reply": "Blue."})


@parser("receipt", _receipts, "json")
def _(content: bytes, folder: Path) -> None:
    from sartor.serving.commands.receipt_verification import verify_receipt

    verify_receipt(written(folder, "receipt.json", content), key=public_key())


@parser("receipt_signed", _receipts, "json")
def _(content: bytes, folder: Path) -> None:
    """By the team's own key, which lies on a server: a receipt whose signature holds and whose content is odd."""
    from sartor.serving.commands.receipt_verification import verify_receipt

    try:
        fields = json.loads(content)
        receipt = fields.get("receipt", fields)
        receipt.pop("signature", None)
        receipt["signature"] = signing.signature_of(records.canonical(receipt), key(), "receipt")
        content = json.dumps(fields).encode()
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return
    json.dumps(verify_receipt(written(folder, "receipt.json", content), key=public_key()).as_json())


@parser(
    "receipt_messages",
    lambda: dumped(_CHAT, {"model": "faq", "messages": _CHAT, "tools": [], "stop": ["a"]}, {"prompt": "x"}),
    "json",
)
def _(content: bytes, folder: Path) -> None:
    """The body of the request that is compared with a receipt."""
    from sartor.serving.commands.receipt_verification import verify_receipt

    receipt = written(folder, "receipt.json", _receipts()[0])
    verify_receipt(receipt, key=public_key(), messages=written(folder, "messages.json", content))


def _erasures() -> list[bytes]:
    document = {
        "schema": 1,
        "kind": "forgotten",
        "date": "2026-01-01T00:00:00Z",
        "rows": ["a"],
        "deltas_gone": [],
        "release": {},
    }
    return dumped({**document, "signature": signing.signature_of(records.canonical(document), key(), "proof")})


@parser("erasure_receipt", _erasures, "json")
def _(content: bytes, folder: Path) -> None:
    from sartor.personalization.erasure_receipt import check_receipt

    check_receipt(written(folder, "forgotten.json", content), [key().public_key()])


# -- federated rounds -------------------------------------------------------------------------------------------------


def _round_manifest() -> Any:
    from sartor.federate.rounds.round_manifest import ClientWork, Manifest

    work = ClientWork("pull", "a" * 64, settings={"rate": 0.1})
    return Manifest("triage", 1, COORDINATOR, work, terms(4), 1_900_000_000)


def _round_manifests() -> list[bytes]:
    return [_round_manifest().signed(identity(COORDINATOR))]


@parser("round_manifest", _round_manifests, "json")
def _(content: bytes, folder: Path) -> None:
    from sartor.federate.rounds.round_manifest import read_manifest

    read_manifest(content, COORDINATOR, roster_of(identity(COORDINATOR)))


@parser("round_manifest_signed", _round_manifests, "json")
def _(content: bytes, folder: Path) -> None:
    """By the coordinator: what a client does with it until it has agreed to the terms."""
    from sartor.federate.rounds import round_manifest

    me = identity(COORDINATOR)
    try:
        fields = json.loads(content)
        fields.pop("signature", None)
        document = records.canonical(fields)
        content = records.canonical({**fields, "signature": signing.signature_of(document, me.key, "fleet")})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return
    manifest = round_manifest.read_manifest(content, COORDINATOR, roster_of(me))
    LENIENT.check(manifest.terms, names(4)[0], names(4))
    assert manifest.round.terms.size >= 0 and manifest.terms.graph.neighbours(names(4)[0]) is not None


def _messages() -> list[bytes]:
    from sartor.federate.secure import messages

    me, digest = identity(names(1)[0]), "cd" * 32
    bodies = [
        messages.AdvertiseKeys(b"k" * 32, b"m" * 32),
        messages.Shares(b"c" * 32, {"ward-0001": b"box"}),
        messages.Masked(messages.Payload(b"\1\0\0\0")),
        messages.SurvivorLists(("a", "b"), ()),
        messages.RoundOutcome("done", ("a",), "d" * 64, ""),
    ]
    return [messages.sealed(body, digest, me) for body in bodies]


@parser("round_message", _messages)
def _(content: bytes, folder: Path) -> None:
    from sartor.federate.secure import messages

    signed = messages.read_message(content)
    signed.check(roster_of(identity(names(1)[0])))


@parser("round_message_json", lambda: [message[:-1] for message in _messages() if message.endswith(b"\n")], "json")
def _(content: bytes, folder: Path) -> None:
    """Written as this version writes it, so that what stands in it is looked at."""
    from sartor.federate.secure import messages

    with contextlib.suppress(ValueError, TypeError, RecursionError):
        content = records.canonical(json.loads(content)) + b"\n"
    signed = messages.read_message(content)
    signed.check(roster_of(identity(names(1)[0])))


def _packed() -> list[bytes]:
    from sartor.federate.updates import pack_tensors

    return [pack_tensors({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)})]


@parser("round_tensors", _packed)
def _(content: bytes, folder: Path) -> None:
    from sartor.federate.updates import unpack_tensors

    for tensor in unpack_tensors(content).values():
        assert math.isfinite(tensor.size)


@parser("round_tensors_head", lambda: [_packed()[0].partition(b"\n")[0]], "json")
def _(content: bytes, folder: Path) -> None:
    from sartor.federate.updates import unpack_tensors

    unpack_tensors(content + b"\n" + bytes(40))


# -- edge -------------------------------------------------------------------------------------------------------------


def _pointer() -> list[bytes]:
    from sartor.edge.store.version_pointers import Pointer, StoredVersion, Trial, write

    one = StoredVersion("1.0", {"a": {"sha256": "0" * 64, "bytes": 3}}, "2026-01-01T00:00:00Z")  # type: ignore[arg-type]
    return [write(Pointer("home", one, one, None, {"0.9": "bad"}, Trial(2, 3))).replace(b"\n", b" ")]


@parser("edge_pointer", _pointer, "json")
def _(content: bytes, folder: Path) -> None:
    from sartor.edge.store.version_pointers import parse

    parse(content, "home")


@parser("edge_pointer_sealed", _pointer, "json")
def _(content: bytes, folder: Path) -> None:
    """The id of the pointer holds: a program that wrote something else, not a torn write."""
    from sartor.edge.store.version_pointers import parse

    if (sealed := resealed(content)) is not None:
        parse(sealed, "home")


def _report() -> list[bytes]:
    from sartor.edge.update.device_reports import Report

    report = Report(device="d1", name="home", version="1.0", ring=3, outcome="pass", reason="", time=1_900_000_000)
    return [report.signed(key()).strip()]


@parser("edge_report", _report, "json")
def _(content: bytes, folder: Path) -> None:
    from sartor.edge.update.device_reports import read_report

    report, signature = read_report(content)
    signing.check_signature(report.document(), signature, Path("report"), "the report", [key().public_key()], "fleet")


def _version() -> list[bytes]:
    from sartor.edge.update.version_metadata import Blob, DeltaStep, VersionContent

    step = DeltaStep(base="1" * 64, result="2" * 64, sha256="3" * 64, bytes=10)
    return [VersionContent("home", "1.0", {"a/b.json": Blob("0" * 64, 5)}, (step,)).as_bytes().strip()]


@parser("edge_version", _version, "json")
def _(content: bytes, folder: Path) -> None:
    from sartor.edge.update.version_metadata import read_version_metadata

    read_version_metadata(content, "home", "1.0")


@parser(
    "edge_offer",
    lambda: dumped({"order": 3, "percent": 50, "halted": False, "published": 1_900_000_000, "previous_percent": 10}),
    "json",
)
def _(content: bytes, folder: Path) -> None:
    from sartor.edge.update.version_metadata import offer_of

    try:
        custom = json.loads(content)
    except (ValueError, RecursionError):  # TUF has parsed it before
        return
    if (found := offer_of("home/1.0.json", custom)) is not None:
        json.dumps(found[1].as_custom())


# -- tools and remote engines -----------------------------------------------------------------------------------------

_SCHEMA = {
    "type": "object",
    "properties": {
        "room": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 20},
        "level": {"type": "integer", "minimum": 0, "multipleOf": 2},
        "mode": {"enum": ["on", "off"]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/item"}, "maxItems": 3},
    },
    "required": ["room"],
    "additionalProperties": False,
    "patternProperties": {"^x-": {"anyOf": [{"type": "null"}, {"const": 1}]}},
    "$defs": {"item": {"type": "number"}},
}
_FLAT = {"type": "object", "properties": {"room": {"type": "string", "pattern": "^(a|b)+$"}}}
_TOOLS = [
    {"type": "function", "function": {"name": "light", "description": "d", "parameters": _SCHEMA, "strict": True}}
]


@parser("tool_schema", lambda: dumped(_TOOLS, [*_TOOLS, {"type": "function", "function": {"name": "b"}}]), "json")
def _(content: bytes, folder: Path) -> None:
    from sartor.core.errors import RequestError
    from sartor.inference.engine import GenerateCall
    from sartor.inference.tool_calls import read_choice, read_tools, reply_schema
    from sartor.text.json_schema import read_schema

    try:
        declared = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"no JSON: {error}", "send JSON") from None
    tools, must_call = read_choice("required", read_tools(declared))
    read_schema(reply_schema(GenerateCall("c", tools=tools, must_call=must_call)))


@functools.cache
def _grammar() -> Any:
    import tiny
    from sartor.inference.constrained_decoding import Grammar

    made = tiny.tokenizer()
    return Grammar(made, [made.eos_token_id], len(made) + 8)


@parser(
    "json_schema",
    lambda: dumped(_SCHEMA, {"type": "object"}, {"anyOf": [_FLAT, {"const": 1}]}),
    "json",
    is_native=True,
    memory_bytes=256 << 20,
)
def _(content: bytes, folder: Path) -> None:
    from sartor.serving.plans.step_messages import schema_errors
    from sartor.text.json_schema import check_schema, read_schema

    text = content.decode("utf-8", "replace")
    schema = read_schema(text)
    with contextlib.suppress(SartorError):
        _grammar().constraint(text)
    check_schema(schema)
    schema_errors({"room": "a" * 40 + "!", "level": 3, "list": [1, "a"]}, schema)


@parser("tool_arguments", lambda: dumped({"room": "hall", "level": 4, "list": [1, 2]}), "json")
def _(content: bytes, folder: Path) -> None:
    """What a model wrote for a tool: read as a call, and held against the tool's schema."""
    from sartor.inference.engine import GenerateCall
    from sartor.inference.tool_calls import CallReader
    from sartor.serving.plans.step_messages import schema_errors

    text = content.decode("utf-8", "replace")
    for reply in (text, f'<tool_call>{{"name": "light", "arguments": {text}}}</tool_call>', f"```json\n{text}\n```"):
        reader = CallReader(GenerateCall("c", tools=tuple(_TOOLS)))
        reader.feed(reply)
        reader.end()
    with contextlib.suppress(ValueError, RecursionError):
        schema_errors(json.loads(text), _SCHEMA)


def _events() -> list[bytes]:
    lines = [
        {"choices": [{"index": 0, "text": "the sky", "finish_reason": None}]},
        {
            "choices": [
                {
                    "text": " is",
                    "logprobs": {"tokens": [" is"], "token_logprobs": [-0.5], "top_logprobs": [{" is": -0.5}]},
                }
            ]
        },
        {"choices": [{"text": " blue", "logprobs": {"content": [{"token": "b", "logprob": -1, "top_logprobs": []}]}}]},
        {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]},
        {"choices": [], "usage": {"completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}},
    ]
    return [b"\n".join(dumped(*lines))]


async def read_stream(content: bytes) -> None:
    """Read a reply of a remote engine whose server sends these bytes."""
    from sartor.inference.engine import GenerateCall
    from sartor.inference.openai_engine import RemoteEngine
    from sartor.inference.streaming_engine import StreamedReply

    engine: Any = object.__new__(RemoteEngine)
    engine._server = SimpleNamespace(url="http://127.0.0.1:9/v1", headers={})
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=content))
    async with httpx.AsyncClient(transport=transport, verify=False, trust_env=False) as engine.client:
        async for _ in engine._read_once(StreamedReply(GenerateCall("c", top_logprobs=2), [1, 2, 3]), {}):
            pass


@parser(
    "openai_events",
    lambda: [b"".join(b"data: " + line + b"\n\n" for line in _events()[0].splitlines()) + b"data: [DONE]\n\n"],
    "text",
)
def _(content: bytes, folder: Path) -> None:
    asyncio.run(read_stream(content))


@parser("openai_events_json", _events, "json")
def _(content: bytes, folder: Path) -> None:
    lines = [b"data: " + line for line in content.splitlines()]
    asyncio.run(read_stream(b"\n\n".join(lines) + b"\n\ndata: [DONE]\n\n"))


def _models() -> list[bytes]:
    base = {"id": "tiny", "owned_by": "vllm", "root": "/m", "parent": None, "max_model_len": 400, "meta": {"n_ctx": 3}}
    return dumped({"data": [base, {"id": "lora", "root": "/l", "parent": "tiny"}]}, {"error": {"message": "no"}})


@parser("openai_answers", _models, "json")
def _(content: bytes, folder: Path) -> None:
    """The lists, vectors and errors of a remote server."""
    from sartor.inference.openai_engine import OpenAiServer, to_sartor_error

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=content, headers={"content-type": "application/json"})

    server = OpenAiServer("http://127.0.0.1:9/v1")
    server._client = lambda: httpx.Client(transport=httpx.MockTransport(answer), verify=False, trust_env=False)  # type: ignore[method-assign]
    assert to_sartor_error(500, content, "u").remedy
    server.llamacpp_adapters()
    with contextlib.suppress(SartorError):
        server.served()
    with contextlib.suppress(SartorError):
        server.embeddings("tiny", ["a"])


# -- HTTP -------------------------------------------------------------------------------------------------------------

_EVENT_LOOP = functools.cache(asyncio.new_event_loop)


class Front:
    """The HTTP application in this process, without a socket; and, for MCP's sessions, on loopback."""

    def __init__(self) -> None:
        import serving
        from sartor.serving.http.request_log import RequestLog
        from sartor.serving.http.server import HttpServer
        from sartor.serving.http.speech_service import SpeechService
        from sartor.serving.team_config import McpTerms, SpeechOptions

        folder = Path(tempfile.mkdtemp(prefix="sartor-fuzz-"))
        team = serving.team(folder / "state", mcp=McpTerms(serve=True))
        headers = {"content-type": "application/json", "authorization": "Bearer key-both"}
        speech = SpeechService(SpeechOptions(voice="espeak")) if shutil.which("espeak-ng") else None
        if speech is not None:
            speech.say = _say  # type: ignore[method-assign, assignment]
        services = serving.house(keys=serving.KEYS, **({"speech": speech} if speech else {}))
        self.stack = contextlib.AsyncExitStack()
        self.client = self.wait(self.stack.enter_async_context(serving.client(services, team, **headers)))
        self.post("/v1/chat/completions", dumped({"model": "faq", "messages": _CHAT[:1]})[0])  # the receipt r1
        self.threads = contextlib.ExitStack()
        server = HttpServer(serving.house(keys=serving.KEYS), team, log=RequestLog(serving.Log()))
        accept = {"accept": "application/json, text/event-stream"}
        url = self.threads.enter_context(serving.running(server))
        self.loopback = self.threads.enter_context(
            httpx.Client(base_url=url, headers={**headers, **accept}, trust_env=False, timeout=60)
        )
        atexit.register(self.close, folder)

    @staticmethod
    def wait(work: Any) -> Any:
        return _EVENT_LOOP().run_until_complete(work)

    def close(self, folder: Path) -> None:
        self.threads.close()
        self.wait(self.stack.aclose())
        _EVENT_LOOP().close()
        shutil.rmtree(folder, ignore_errors=True)

    def post(self, path: str, content: bytes) -> httpx.Response:
        if path.startswith("/mcp"):
            return self.loopback.post(path, content=content)
        answer: httpx.Response = self.wait(self.client.post(path, content=content))
        return answer


async def _say(text: str, voice: Any, form: str, speed: float) -> Any:
    return SimpleNamespace(sound=b"RIFF")


_FRONT = functools.cache(Front)


def _route(name: str, path: str, *bodies: Any) -> None:
    @parser(f"http_{name}", lambda: dumped(*bodies), "json")
    def _(content: bytes, folder: Path) -> None:
        """Answered as it was asked, or by a 4xx with a problem and a remedy."""
        answer = _FRONT().post(path, content)
        assert answer.status_code in range(200, 500), (answer.status_code, answer.text[:400])
        if answer.status_code >= 400 and not path.startswith("/mcp"):
            error = answer.json()["error"]
            assert error["message"], answer.text
            raise SourceError(error["message"], error.get("remedy") or error["message"])


_TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": _PARTS[:1]}, *_CHAT]
_HTTP_CHAT = {
    "model": "faq",
    "messages": [
        *_TURNS,
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "on"},
        {"role": "user", "content": "x", "name": "n"},
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "max_tokens": 9,
    "n": 2,
    "seed": 3,
    "stop": ["a"],
    "stream": False,
    "logprobs": True,
    "top_logprobs": 2,
    "tools": _TOOLS,
    "tool_choice": "auto",
    "user": "u",
    "metadata": {"a": "b"},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
}
_MEDIA = {
    "model": "faq",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": media_files.data_url(media_files.png(side=8))}},
                media_files.audio_part(media_files.sound(0.05, 8_000)),
            ],
        }
    ],
}
_MCP_META = {"clientInfo": {"name": "a", "version": "1"}, "protocolVersion": "2025-06-18", "capabilities": {}}
_route("chat", "/v1/chat/completions", _HTTP_CHAT, {"model": "faq", "messages": _CHAT[:1], "stream": True})
_route("chat_media", "/v1/chat/completions", _MEDIA)
_route(
    "completions",
    "/v1/completions",
    {"model": "faq", "prompt": ["a", "b"], "max_tokens": 3, "logprobs": 1, "stop": "x", "n": 1},
)
_route(
    "embeddings",
    "/v1/embeddings",
    {"model": "base", "input": ["a", "b"], "encoding_format": "base64", "dimensions": None},
)
_route(
    "speech",
    "/v1/audio/speech",
    {"model": "speech", "voice": "default", "input": "hi", "response_format": "wav", "speed": 1.0},
)
_route(
    "feedback",
    "/v1/feedback",
    {"receipt": "r1", "rating": 1, "correction": "better", "comment": "c", "user": "u", "consent": True},
)
_route("promote", "/v1/agents/faq/promote", {"release": "r", "expected_version": None}, {"version": "0.9"})
_route("rollback", "/v1/agents/faq/rollback", {"expected_version": None}, {})
_route("drain", "/v1/agents/faq/drain", {})
_route("release", "/v1/agents/faq/release", {})
_route(
    "mcp",
    "/mcp",
    {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": _MCP_META},
    {"jsonrpc": "2.0", "id": 2, "method": "tools/list", "params": {}},
    {"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": "faq", "arguments": {"prompt": "hi"}}},
)
