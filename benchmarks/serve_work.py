"""What every side of benchmarks/serve.py is given: adapters with random factors, and the base in F16 and in Q4_0.

    serve_work.py FOLDER ADAPTERS

Q4_0 is quantised by the gguf package from the values that the base has in bf16; `losses.json` has the mean loss in
nats a token of each file on the beginning of the README, so that what a faster form costs is known. Run as a process
of its own, so that the one which times the sides stays small.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from serve_sides import starter_file

from sartor.core import model_refs
from sartor.models.base import convert

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
from loras import write_lora  # noqa: E402

RANK, SIZE = 16, 0.3
LOSS_TOKENS = 1024  # of the README, whose loss is taken in rows of LOSS_ROW tokens
LOSS_ROW = 128
BLOCK = 32  # values of a block of Q4_0 and Q8_0
Kind = gguf.GGMLQuantizationType


def main() -> None:
    """Write `adapters/N` and `base.f16.gguf`."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    ref = model_refs.locate_base("starter")
    convert(ref)
    config = json.loads((ref.path / "config.json").read_text())
    for number in range(count):
        write_lora(folder / "adapters" / str(number), config, rank=RANK, seed=number, size=SIZE)
    write_f16(starter_file(), folder / "base.f16.gguf")
    write_q4_0(starter_file(), folder / "base.q4_0.gguf")
    tokens = LOSS_TOKENS if len(sys.argv) < 4 else int(sys.argv[3])
    files = {
        "llama_q4": starter_file(),
        "llama_q4_0": folder / "base.q4_0.gguf",
        "llama_f16": folder / "base.f16.gguf",
    }
    losses = {name: loss_of(file, ref.path, tokens) for name, file in files.items()}
    (folder / "losses.json").write_text(json.dumps(losses))


def loss_of(file: Path, base: Path, tokens: int) -> float:
    """Return the mean cross-entropy, in nats a token, of the README's first tokens by the weights of a GGUF file, in
    fp32.
    """
    import torch
    import transformers

    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    ids = transformers.AutoTokenizer.from_pretrained(base)(text)["input_ids"][:tokens]
    rows = torch.tensor(ids[: len(ids) // LOSS_ROW * LOSS_ROW] or ids).reshape(-1, min(LOSS_ROW, len(ids)))
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.inference_mode():
        return float(model.eval()(input_ids=rows, labels=rows).loss)


def write_q4_0(source: Path, out: Path) -> None:
    """Write the base with its blocks' matrices in Q4_0, from their values in bf16, and the embedding in 8 bits."""

    def stored(name: str, value: np.ndarray) -> tuple[np.ndarray, Kind | None]:
        if value.ndim < 2:
            return value, None
        if value.shape[-1] % BLOCK:
            return value.astype(np.float16), None
        kind = Kind.Q4_0 if name.startswith("blk.") else Kind.Q8_0
        return quantize(rounded_to_bf16(value), kind), kind

    write_copy(source, out, gguf.LlamaFileType.MOSTLY_Q4_0, stored)


def rounded_to_bf16(value: np.ndarray) -> np.ndarray:
    """Return fp32 values rounded to the nearest that bf16 has, ties to even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def write_f16(source: Path, out: Path) -> None:
    """The same base with its matrices in F16: metadata and names as in `source`."""
    write_copy(
        source,
        out,
        gguf.LlamaFileType.MOSTLY_F16,
        lambda name, value: (value.astype(np.float16) if value.ndim > 1 else value, None),
    )


def write_copy(
    source: Path,
    out: Path,
    kind: gguf.LlamaFileType,
    stored: Callable[[str, np.ndarray], tuple[np.ndarray, Kind | None]],
) -> None:
    """Copy a GGUF file. stored: of a tensor's name and fp32 values, what is written and its type if it is no plain
    array.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    for name, known in reader.fields.items():
        if name.startswith("GGUF.") or name in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        ):
            continue
        array = known.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, known.contents(), known.types[0], sub_type=known.types[-1] if array else None)
    writer.add_file_type(kind)
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        array, tensor_kind = stored(tensor.name, value)
        writer.add_tensor(tensor.name, array, raw_dtype=tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
