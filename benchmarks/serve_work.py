"""What every side of benchmarks/serve.py is given: adapters with random factors, the base in F16, and prompts.

    serve_work.py FOLDER ADAPTERS

Run as a process of its own, so that the one which times the sides stays small.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize
from serve_sides import starter_file

from sartor.core import model_refs
from sartor.models.base import convert

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
from loras import write_lora  # noqa: E402

RANK, SIZE = 16, 0.3


def main() -> None:
    """Write `adapters/N` and `base.f16.gguf`."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    ref = model_refs.locate_base("starter")
    convert(ref)
    config = json.loads((ref.path / "config.json").read_text())
    for number in range(count):
        write_lora(folder / "adapters" / str(number), config, rank=RANK, seed=number, size=SIZE)
    write_f16(starter_file(), folder / "base.f16.gguf")


def write_f16(source: Path, out: Path) -> None:
    """The same base with its matrices in F16: metadata and names as in `source`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    for name, known in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        array = known.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, known.contents(), known.types[0], sub_type=known.types[-1] if array else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, value.astype(np.float16) if value.ndim > 1 else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
