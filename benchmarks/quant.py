"""What a quantised base saves and costs: bytes, peak memory, step time, and whether it goes on learning after an
evaluation.

- `bytes`: linear weights of the starter base in NF4 and int8, over bf16.
- `memory`: one LoRA update on a random-weight Llama of 1.1B parameters (TinyLlama's shape) in NF4 and in bf16: peak
  RSS of the whole process, opening included, and of opening alone.
- `step`: median seconds of an update on the starter base in NF4, int8 and bits auto, through `paths.choose`.
- `learning`: losses of updates on repeated rows in NF4, with an evaluation in the middle.

Each measured case is a process of its own. `memory` writes 2.2 GB to a temporary folder.

    python benchmarks/quant.py --json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import parts
import smallest
import torch
from results import last_line, print_result
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sartor.core.model_refs import STARTER
from sartor.core.records import Example, Message
from sartor.models import adapters, packing, quantization
from sartor.models.base import Base, machine_facts, open_base
from sartor.models.losses import transformers_backend

# of the 1.1B base, with `--small`: what takes its memory is not its shape
SMALL_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QUESTIONS = ("Do you deliver on {}?", "When do you open on {}?", "Is the workshop open on {}?")
ANSWERS = ("Yes, from 9 to 13 h.", "At 8 h, and at 10 h in winter.", "No, only by appointment.")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}


def peak_bytes() -> int:
    """Peak RSS of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_large(path: Path, shape: dict[str, Any]) -> None:
    """The 1.1B base, bf16, a shard per layer: no more than one layer stands in memory."""
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = LlamaConfig(**shape, dtype=torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(str(path))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    where: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    for number, names in enumerate(shards.values()):
        file = f"model-{number:05d}.safetensors"
        tensors = {
            n: torch.ones(shapes[n]) if shapes[n].numel() < 1e5 else torch.randn(shapes[n]) * 0.02 for n in names
        }
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * sum(shape.numel() for shape in shapes.values())}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(str(path))


def random_rows(vocabulary: int, tokens: int) -> list[packing.TokenizedExample]:
    """Two rows of random tokens, half of each supervised."""
    rng = torch.Generator().manual_seed(0)
    length = tokens // 2
    ids = torch.randint(10, vocabulary, (2, length), generator=rng).tolist()
    return [packing.TokenizedExample(row, [place >= length // 2 for place in range(length)]) for row in ids]


def real_rows(base: Base) -> list[packing.TokenizedExample]:
    """Questions and answers in the base's chat template; the answer is supervised."""
    pairs = [(q.format(day), a) for q, a in zip(QUESTIONS, ANSWERS, strict=True) for day in DAYS]
    turns = [(Message.of("user", question), Message.of("assistant", answer)) for question, answer in pairs]
    return [base.chat.encode(Example(messages, ())) for messages in turns]


def tuned(base: Base) -> Any:
    return adapters.inject_lora(base.model, rank=16, alpha=32.0, dropout=0.0, targets="all-linear", seed=0).eval()


class Updates:
    """LoRA updates by AdamW on one set of rows."""

    def __init__(
        self, base: Base, rows: list[packing.TokenizedExample], *, probe: bool = True, rate: float = 1e-3
    ) -> None:
        self.model, self.rows = tuned(base), rows
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True)
        # without the probe of packing: five more passes, which take minutes where bf16 is emulated
        self.path = (
            transformers_backend.choose_loss_backend(self.model, rows, base.device)
            if probe
            else transformers_backend.PackedTransformersBackend(self.model, base.device, "")
        )

    def __call__(self) -> tuple[float, float]:
        """(loss in nats per supervised token, seconds) of one update."""
        began = time.perf_counter()
        self.model.train()
        losses, _ = self.path.losses(self.rows)
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(losses.mean().detach()), time.perf_counter() - began

    @torch.no_grad()
    def evaluate(self) -> float:
        """Loss on the same rows, as the trainer measures it."""
        self.model.eval()
        return float(self.path.losses(self.rows)[0].mean())


def case_bytes(name: str, bits: Any, tokens: int) -> dict[str, Any]:
    base = open_base(name, bits=bits)
    return {"linear_bytes": quantization.linear_bytes(base.model)}


def case_memory(name: str, bits: Any, tokens: int) -> dict[str, Any]:
    before, began = peak_bytes(), time.perf_counter()
    base = open_base(name, bits=bits)
    opened, seconds = peak_bytes(), time.perf_counter() - began
    updates = Updates(base, random_rows(base.model.config.vocab_size, tokens), probe=False)
    loss, step_s = updates()
    return {
        "imports_bytes": before,
        "opened_peak_bytes": opened,
        "peak_bytes": peak_bytes(),
        "open_s": round(seconds, 1),
        "step_s": round(step_s, 1),
        "loss": loss,
        "path": updates.path.name,
        "linear_bytes": quantization.linear_bytes(base.model),
    }


def case_step(name: str, bits: Any, tokens: int) -> dict[str, Any]:
    base = open_base(name, bits=bits)
    updates = Updates(base, real_rows(base))
    updates()
    seconds = [updates()[1] for _ in range(5)]
    rows = updates.rows
    return {
        "step_s": statistics.median(seconds),
        "path": updates.path.name,
        "dtype": str(base.dtype).removeprefix("torch."),
        "tokens": sum(len(row.ids) for row in rows),
        "peak_bytes": peak_bytes(),
    }


def case_learning(name: str, bits: Any, tokens: int) -> dict[str, Any]:
    base = open_base(name, bits=bits)
    updates = Updates(base, real_rows(base))
    before = [updates()[0] for _ in range(6)]
    middle = updates.evaluate()
    after = [updates()[0] for _ in range(6)]
    return {
        "losses": [round(loss, 4) for loss in before + after],
        "evaluated": middle,
        "falls_after_evaluation": after[-1] < after[0] < before[0],
        "path": updates.path.name,
    }


CASES = {"bytes": case_bytes, "memory": case_memory, "step": case_step, "learning": case_learning}


def fresh(case: str, name: str, bits: Any, tokens: int = 16) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [
        smallest.python(),
        __file__,
        "--case",
        case,
        "--base",
        name,
        "--bits",
        str(bits),
        "--tokens",
        str(tokens),
    ]
    said = last_line(command)
    print(json.dumps({"case": case, "bits": bits, **said}), file=sys.stderr)
    return said


def memory_runs(large: str, tokens: int, repeats: int, shape: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of the case `memory` on the 1.1B base, in NF4 and in bf16. large: its folder; empty to write
    it.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not large:
            write_large(Path(folder), shape)
        bits_by_kind = {"nf4": 4, "bf16": 16}
        return {
            kind: [fresh("memory", large or folder, bits, tokens) for _ in range(repeats)]
            for kind, bits in bits_by_kind.items()
        }


def median_of(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def measure(base: str, pairs: int, tokens: int, large: str, shape: dict[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    weights = {
        bits: parts.run(f"bytes, {bits} bits", lambda bits=bits: fresh("bytes", base, bits)["linear_bytes"])
        for bits in (4, 8, 16)
    }
    said["linear_bytes_over_bf16"] = {
        "nf4": round(weights[4] / weights[16], 4),
        "int8": round(weights[8] / weights[16], 4),
    }
    few = parts.run("memory", lambda: memory_runs(large, tokens, min(pairs, 2), shape))
    said["memory_1b"] = {kind: runs[-1] for kind, runs in few.items()}
    said["peak_rss_over_bf16"] = round(median_of(few["nf4"], "peak_bytes") / median_of(few["bf16"], "peak_bytes"), 3)
    steps: dict[Any, list[dict[str, Any]]] = {"auto": [], 4: [], 8: []}
    for pair in range(pairs):  # alternating: what else the machine does falls on each alike
        round_of_steps = parts.run(f"step, round {pair + 1}", lambda: [fresh("step", base, bits) for bits in steps])
        for runs, step in zip(steps.values(), round_of_steps, strict=True):
            runs.append(step)
    said["step"] = {
        str(bits): runs[-1] | {"step_s": round(median_of(runs, "step_s"), 3)} for bits, runs in steps.items()
    }
    plain = steps["auto"]
    for bits, kind in quantization.KINDS.items():
        ratios = [run["step_s"] / other["step_s"] for run, other in zip(steps[bits], plain, strict=True)]
        said[f"step_{kind}_over_auto"] = round(statistics.median(ratios), 3)
    said["learning"] = {
        kind: parts.run(f"learning, {kind}", lambda bits=bits: fresh("learning", base, bits))
        for bits, kind in quantization.KINDS.items()
    }
    said["targets"] = {
        "linear_bytes_at_most_0.32": said["linear_bytes_over_bf16"]["nf4"] <= 0.32,
        "peak_rss_at_most_0.6": said["peak_rss_over_bf16"] <= 0.6,
        "step_at_most_2": said["step_nf4_over_auto"] <= 2,
        "falls_after_evaluation": said["learning"]["nf4"]["falls_after_evaluation"],
    }
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser)
    parser.add_argument("--base", default=STARTER)
    parser.add_argument("--pairs", type=int, default=3, help="repetitions of a timed case")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of the 1.1B base's update")
    parser.add_argument("--large", default="", help="a directory that already holds the 1.1B base")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--bits", default="auto", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        bits = int(arguments.bits) if arguments.bits.isdigit() else arguments.bits
        print(json.dumps(CASES[arguments.case](arguments.base, bits, arguments.tokens)))
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        sys.exit("bases in 4 and 8 bits need bitsandbytes: pip install 'sartor[quant]'")
    if arguments.small:
        arguments.pairs = 1
    with smallest.home(arguments.small):
        shape = SMALL_SHAPE if arguments.small else SHAPE
        said = measure(arguments.base, arguments.pairs, arguments.tokens, arguments.large, shape)
    said["machine"] = machine_facts() | {"name": platform.node(), "cpu": torch.backends.cpu.get_cpu_capability()}
    print_result(said)


if __name__ == "__main__":
    main()
