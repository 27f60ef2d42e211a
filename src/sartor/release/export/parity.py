"""The programs that load an export, each asked as its own users ask it: plain transformers, plain peft, llama.cpp."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from sartor.core.errors import ExtraError, GateError, need
from sartor.export import measure
from sartor.export.measure import LIKELIEST, Answers, Figures
from sartor.export.reference import REPLY_TOKENS, ROWS_TOGETHER, Trace, along
from sartor.models.chat import Chat
from sartor.models.loading import quiet

LLAMA_CPP = "xllamacpp"
# of a whole run of llama.cpp; a model of a few billions on two cores needs minutes
TIME_LIMIT_S = 6 * 3600.0


def itself(traces: Sequence[Trace]) -> Figures:
    """Sartor against itself: one token at a time with a cache (the replies) against all at once (the logits)."""
    likeliest = [_likeliest(one.logits) for one in traces]
    return measure.compare("sartor", "sartor", traces, Answers([list(one.reply) for one in traces], likeliest))


def ask_peft(part: Path, base: Path, chat: Chat, traces: Sequence[Trace], device: torch.device) -> Figures:
    """PeftModel on transformers' own model, in fp32."""
    with quiet():
        model = _plain(base, device)
        model = peft.PeftModel.from_pretrained(model, str(part), torch_device="cpu").to(device).eval()
    return _ask_torch("peft", "peft", model, chat, traces, part)


def ask_merged(part: Path, chat: Chat, traces: Sequence[Trace], device: torch.device) -> Figures:
    """Transformers on the merged files alone, computing in fp32: what their narrower type rounds away is what shows."""
    with quiet():
        model = _plain(part, device)
    return _ask_torch("transformers", "merged", model, chat, traces, part)


def _plain(path: Path, device: torch.device) -> Any:
    where = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    return transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, **where).to(device).eval()


def _ask_torch(runtime: str, form: str, model: Any, chat: Chat, traces: Sequence[Trace], part: Path) -> Figures:
    began = time.monotonic()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(part), local_files_only=True, trust_remote_code=False)
    rendered = [
        tokenizer.apply_chat_template(one.asked.as_json(), add_generation_prompt=True, return_dict=True)["input_ids"]
        for one in traces
        if one.asked.is_plain
    ]
    logits = [along(model, one.prompt, one.reply[:-1]) for one in traces]
    greedy: list[list[int]] = []
    for start in range(0, len(traces), ROWS_TOGETHER):
        greedy += _generate(model, chat, [one.prompt for one in traces[start : start + ROWS_TOGETHER]])
    answers = Answers(greedy, [_likeliest(one) for one in logits], logits)
    figures = measure.compare(f"{runtime} {importlib.metadata.version(runtime)}", form, traces, answers)
    return replace(measure.with_prompts(figures, traces, rendered), wall_s=round(time.monotonic() - began, 1))


@torch.inference_mode()
def _generate(model: Any, chat: Chat, prompts: Sequence[list[int]]) -> list[list[int]]:
    """transformers' own greedy decoding; a stop token is the last of a reply."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[chat.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with quiet():
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=REPLY_TOKENS,
            eos_token_id=chat.stops,
            pad_token_id=chat.pad,
        )
    return [_until_stop(row, set(chat.stops)) for row in made[:, width:].tolist()]


def _until_stop(row: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


def _likeliest(logits: torch.Tensor) -> list[list[tuple[int, float | None]]]:
    """Of each row of (T, V) the likeliest tokens with logprobs, best first."""
    best = logits.log_softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
    return [
        list(zip(ids, values, strict=True)) for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def has_llama_cpp() -> bool:
    """Whether llama.cpp can be asked on this machine."""
    return importlib.util.find_spec(LLAMA_CPP) is not None


def need_llama_cpp() -> ExtraError:
    """The error where it cannot be, and a receipt is wanted."""
    missing = need(LLAMA_CPP, "llamacpp")
    return ExtraError(
        f"{missing.problem}, so how a GGUF file answers cannot be measured", f"{missing.remedy}; or --allow-unmeasured"
    )


def ask_llama_cpp(file: Path, form: str, traces: Sequence[Trace], template: str, adapter: Path | None = None) -> Figures:
    """llama.cpp on a GGUF file, with an adapter's beside it or not, in a process of its own.

    Raises GateError where it cannot open them, or holds another chat template than `template`.
    """
    began = time.monotonic()
    longest = max(len(one.asked.ids) for one in traces) + REPLY_TOKENS + 8
    job = {
        "model": str(file),
        "adapter": str(adapter) if adapter else "",
        "context": -(-longest // 256) * 256,
        # its threads spin: one that waits for a core holds up all the others
        "threads": max(1, (os.cpu_count() or 2) - 1),
        "likeliest": LIKELIEST,
        "longest": REPLY_TOKENS,
        "conversations": [one.asked.as_json() for one in traces if one.asked.is_plain],
        "traces": [{"prompt": one.prompt, "reply": list(one.reply)} for one in traces],
    }
    said = _in_a_process(job)
    if "error" in said:
        raise GateError(
            f"llama.cpp cannot run {file.name}: {said['error']}", "sartor export --to merged is what transformers runs"
        )
    if said["template"] != template:
        raise GateError(f"llama.cpp finds another chat template in {file.name} than the Release is bound to", "report this")
    answers = Answers([one["greedy"] for one in said["traces"]], [one["likeliest"] for one in said["traces"]])
    version = importlib.metadata.version(LLAMA_CPP)
    figures = measure.compare(f"llama.cpp ({LLAMA_CPP} {version})", form, traces, answers)
    figures = replace(figures, wall_s=round(time.monotonic() - began, 1))
    return measure.with_prompts(figures, traces, [one["ids"] for one in said["rendered"]])


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """What the other process said; its own end (a crash of llama.cpp, the time limit) is an error too."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "sartor.export.llamacpp", str(folder / "job.json"), str(folder / "result.json")]
        # its standard input is ours to hold: when this process dies, it reads the end there, and goes too
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log) as child,
        ):
            try:
                ended = child.wait(TIME_LIMIT_S)
            except subprocess.TimeoutExpired:
                return {"error": f"it was not done in {TIME_LIMIT_S:.0f} s"}
            finally:
                child.kill()
        if not (folder / "result.json").is_file():
            last = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            return {"error": f"its process ended with {ended}: {' | '.join(last)[-300:]}"}
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
