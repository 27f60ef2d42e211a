"""Parity of external runtimes with the Release."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import torch
import transformers

from sartor.core.artifacts import Artifact
from sartor.core.errors import ExtraError, GateError, SourceError, missing_package
from sartor.core.lineage import ancestry
from sartor.core.records import Message
from sartor.core.remedies import REPORT
from sartor.core.resource_limits import ResourceLimits, run_job
from sartor.evaluate.predictions import held_out
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models.base import Base
from sartor.models.chat import ChatTokenizer
from sartor.models.loading import quiet_transformers

LEAST = 50
# Generic questions, used if too few prompts are left of the Release's data
_ASKED = (
    "What is {}?",
    "Explain {} to a child.",
    "Give three facts about {}.",
    "Why do people need {}?",
    "Write one sentence about {}.",
    "Is {} new or old?",
)
_ABOUT = ("water", "a contract", "electricity", "bread", "a bridge", "music", "a calendar", "trade", "a clock")


@dataclass(frozen=True)
class ParityPrompt:
    """Conversation that waits for a reply, with its token ids and its origin.

    spells_markup: whether a text contains the template's markup as text.
    """

    messages: tuple[Message, ...]
    tools: str
    ids: tuple[int, ...]
    source: str
    # other runtimes interpret such text as markup
    spells_markup: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the prompt consists of roles and texts only.

        It has no markup, and no tools, which each runtime renders differently.
        """
        return (
            not self.tools
            and not self.spells_markup
            and not any(message.tool_calls or message.tool_call_id or message.name for message in self.messages)
        )

    def as_json(self) -> list[dict[str, Any]]:
        """Return the conversation in OpenAI's form."""
        return [{"role": message.role, "content": message.text} for message in self.messages]


def choose(release: Artifact, chat: ChatTokenizer, count: int = LEAST) -> list[ParityPrompt]:
    """Return up to `count` distinct prompts, filled up with generic ones.

    Prompts that the chat template refuses are skipped.
    """
    results: dict[tuple[int, ...], ParityPrompt] = {}
    system = str(release.manifest.get("system_prompt", ""))
    generic: Candidates = []
    for topic in _ABOUT:
        for template in _ASKED:
            generic.append(("generic prompts", _turns(system, template.format(topic)), ""))
    for source, messages, tools in [*_held_out(release, count), *generic]:
        if len(results) == count:
            break
        try:
            ids = tuple(chat.prompt_ids(messages, tools))
        except SourceError:
            continue
        spells_markup = any(chat.markup.spelt(message.text) for message in messages)
        parity_prompt = ParityPrompt(tuple(messages), tools, ids=ids, source=source, spells_markup=spells_markup)
        results.setdefault(ids, parity_prompt)
    return list(results.values())


Candidates = list[tuple[str, Sequence[Message], str]]


def _held_out(release: Artifact, count: int) -> Candidates:
    """Return rows that were not trained on: of the Dataset, or if it is gone, of the Report in the Release."""
    if ancestry.find_parent(release, "dataset") is not None:
        try:
            examples = held_out(release, None, 4 * count, release.path).examples
        except SourceError:  # the Dataset has no held-out rows
            examples = []
        return [
            ("held-out rows", example.prompt, example.tools)
            for example in examples
            if not example.is_document and example.prompt
        ]
    system = str(release.manifest.get("system_prompt", ""))
    table = pq.read_table(release.path / "report" / "rows.parquet", columns=["prompt"])
    return [("rows of the Report", _turns(system, text), "") for text in table["prompt"].to_pylist() if text]


def _turns(system: str, text: str) -> list[Message]:
    return [*([Message.of("system", system)] if system else []), Message.of("user", text)]


# Tokens of each reply that are compared. All their logits are held: 50 replies * 48 tokens * 150,000 entries * 4 bytes
# are 1.4 GB.
REPLY_TOKENS = 48
# Called with the number of newly answered prompts
Answered = Callable[[int], object]
ROWS_TOGETHER = 16


@dataclass(frozen=True)
class Trace:
    """Prompt with the Release's greedy reply and the logits along it.

    reply: token ids, with the token that ends it. logits: (len(reply), V), fp32.
    """

    parity_prompt: ParityPrompt
    reply: tuple[int, ...]
    logits: torch.Tensor

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return list(self.parity_prompt.ids)


def trace(
    base: Base, model: Any, prompts: Sequence[ParityPrompt], progress: Answered = lambda count: None
) -> list[Trace]:
    """Return the greedy replies of Sartor's own decoding, with the logits (len(reply), V) along each.

    base.model and `model` (with the adapter) are in fp32. progress: called with the number of answered prompts.
    """
    chat = base.chat
    generations = generate(
        model,
        [prompt.ids for prompt in prompts],
        stop=chat.stops,
        pad=chat.pad,
        sampling=Sampling(REPLY_TOKENS),
        batch_rows=ROWS_TOGETHER,
        progress=progress,
    )
    traces = []
    for prompt, reply in zip(prompts, generations, strict=True):
        logits = logits_along(model, list(prompt.ids), reply.ids)
        if reply.finish == "stop" and len(reply.ids) < REPLY_TOKENS:
            traces.append(Trace(prompt, (*reply.ids, int(logits[-1].argmax())), logits))
        else:
            traces.append(Trace(prompt, tuple(reply.ids), logits[:-1]))
    return traces


@torch.inference_mode()
def logits_along(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """Return the logits after the prompt and after each token of `reply`: (T, V).

    T = len(reply) + 1; fp32 on the CPU.
    """
    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    logits: torch.Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 :]
    return logits.float().cpu()


LIKELIEST = 10
# form -> least fraction of positions where the likeliest next token is the same. Down to q8_0 the limit is at least
# three `agreement_deviation` below the result of every correct export. Below q8_0 it is a limit of usefulness.
# docs/decisions/009-export.md
LEAST_AGREEMENT = {
    "sartor": 0.995,
    "peft": 0.995,
    "merged": 0.98,
    "f32": 0.98,
    "f16": 0.98,
    "bf16": 0.98,
    "adapter": 0.98,
    "adapter on the base's own file": 0.95,
    "q8_0": 0.95,
    "q5_1": 0.92,
    "q5_0": 0.92,
    "q4_1": 0.90,
    "q4_0": 0.90,
}
# least fraction of prompts that a runtime's own template and tokenizer turn into the same tokens
LEAST_ALIKE = 0.98
# Limit for the same fp32 computation by another program; a larger difference means another scale or layer
MOST_LOGIT_DIFFERENCE = {"peft": 0.01}


@dataclass(frozen=True)
class RuntimeOutputs:
    """Outputs of a runtime for the traces, in their order.

    greedy: its own replies as token ids, with the token that ends each.
    likeliest: for each position along the reference reply the likeliest tokens with logprobs (None if not reported),
    best
    first.
    logits: (len(reply), V) for each trace, if the runtime gives them.
    """

    greedy: list[list[int]]
    likeliest: list[list[list[tuple[int, float | None]]]]
    logits: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class Figures:
    """Parity figures of one file in one runtime.

    agreement: fraction of positions where the likeliest next token is the same.
    greedy_tokens, greedy_replies: fraction of equal tokens and of equal whole replies in greedy decoding.
    logprob_difference, mean_logprob_difference: largest and mean absolute difference of natural logprobs, over the
    likeliest tokens of each position.
    logit_difference: largest absolute difference over the whole vocabulary; None if the runtime gives no logits.
    alike: fraction of prompts that its template and tokenizer render as Sartor does; None if there were none to
    compare.
    agreement_deviation: standard deviation of `agreement` over replies drawn like these, since the positions of one
    reply
    are not independent.
    """

    runtime: str
    form: str
    positions: int
    agreement: float
    greedy_tokens: float
    greedy_replies: float
    logprob_difference: float
    mean_logprob_difference: float
    logit_difference: float | None = None
    alike: float | None = None
    agreement_deviation: float = 0.0
    wall_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the figures and the least agreement that they must reach."""
        return {**asdict(self), "least_agreement": LEAST_AGREEMENT[self.form]}


def compare(runtime: str, form: str, traces: Sequence[Trace], answers: RuntimeOutputs) -> Figures:
    """Return the parity figures of a runtime's outputs."""
    matches: list[int] = []
    differences: list[torch.Tensor] = []
    for trace, top_tokens in zip(traces, answers.likeliest, strict=True):
        logprobs = trace.logits.log_softmax(-1)
        matches.append(sum(likeliest[0][0] == token for token, likeliest in zip(trace.reply, top_tokens, strict=True)))
        for index, likeliest in enumerate(top_tokens):
            reported = {token: value for token, value in likeliest if value is not None}
            differences.append((logprobs[index, list(reported)] - torch.tensor(list(reported.values()))).abs())
    tokens, exact_count, length = 0, 0, 0
    for trace, greedy in zip(traces, answers.greedy, strict=True):
        tokens += sum(
            reference_id == runtime_id for reference_id, runtime_id in zip(trace.reply, greedy, strict=False)
        )
        length += max(len(trace.reply), len(greedy))
        exact_count += list(trace.reply) == greedy
    # agreement p = sum_i m_i / sum_i n_i over replies i (m_i matches of n_i positions); a ratio estimator with
    # sd(p) ~ sqrt(sum_i (m_i - p n_i)^2) / sum_i n_i, where the replies are independent and positions are not
    lengths = [len(trace.reply) for trace in traces]
    positions, agreement = sum(lengths), sum(matches) / sum(lengths)
    deviation = (
        sum((match_count - agreement * count) ** 2 for match_count, count in zip(matches, lengths, strict=True)) ** 0.5
    )
    all_differences = torch.cat([*differences, torch.zeros(1)])
    logit_differences = [
        float((trace.logits - runtime_logits).abs().max())
        for trace, runtime_logits in zip(traces, answers.logits or [], strict=False)
    ]
    return Figures(
        runtime,
        form,
        positions=positions,
        agreement=agreement,
        greedy_tokens=tokens / length,
        greedy_replies=exact_count / len(traces),
        logprob_difference=round(float(all_differences.max()), 6),
        mean_logprob_difference=round(float(all_differences.mean()), 6),
        logit_difference=round(max(logit_differences), 6) if logit_differences else None,
        agreement_deviation=round(deviation / positions, 6),
    )


def with_prompts(figures: Figures, traces: Sequence[Trace], rendered: Sequence[Sequence[int]]) -> Figures:
    """Return the figures with the fraction of plain prompts that were rendered to the same tokens.

    rendered: token ids of each plain prompt, in order.
    """
    plain_traces = [trace for trace in traces if trace.parity_prompt.is_plain]
    same_count = sum(trace.prompt == list(ids) for trace, ids in zip(plain_traces, rendered, strict=True))
    return replace(figures, alike=same_count / len(plain_traces) if plain_traces else None)


def check(figures: Figures, name: str) -> None:
    """Raise GateError with the numbers if a form's figures are beyond the limits."""
    min_agreement = LEAST_AGREEMENT[figures.form]
    problems = []
    if not figures.agreement >= min_agreement:
        problems.append(
            f"{figures.agreement:.4f} of {figures.positions} next tokens are the Release's, and {min_agreement} must "
            "be "
            f"(chance moves that by {figures.agreement_deviation:.4f})"
        )
    max_difference = MOST_LOGIT_DIFFERENCE.get(figures.form)
    if max_difference is not None and not (figures.logit_difference or 0) <= max_difference:
        problems.append(f"a logit differs by {figures.logit_difference:.3g}, and at most {max_difference} may")
    if figures.alike is not None and figures.alike < LEAST_ALIKE:
        problems.append(f"{figures.alike:.2f} of the prompts become the same tokens, and {LEAST_ALIKE} must")
    if problems:
        raise GateError(
            f"the {figures.form} export of {name} does not answer as it does in {figures.runtime}: "
            f"{'; '.join(problems)}; "
            f"whole greedy replies alike {figures.greedy_replies:.2f}, largest logprob difference "
            f"{figures.logprob_difference:.3g}; nothing was written",
            _REMEDIES.get(
                figures.form, "this is a fault of Sartor or of the runtime's version; --to peft is what was signed"
            ),
        )


# With few bits, rounding may remove the changes of a tune, most of all if the base was already on the same grid
_FEWER = "--quantise q8_0 has finer steps; the adapter's GGUF on the base's own file is rounded nowhere"
_REMEDIES = {form: _FEWER for form in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")}


LLAMA_CPP = "xllamacpp"
# limit for a whole run of llama.cpp; a model of a few billion parameters needs minutes on two cores
TIME_LIMIT_S = 6 * 3600.0


def check_own_decoding(traces: Sequence[Trace]) -> Figures:
    """Compare Sartor with itself: cached token-by-token decoding (the replies) with one forward pass (the logits)."""
    likeliest = [_likeliest(trace.logits) for trace in traces]
    return compare("sartor", "sartor", traces, RuntimeOutputs([list(trace.reply) for trace in traces], likeliest))


def ask_peft(
    part: Path,
    base: Path,
    chat: ChatTokenizer,
    traces: Sequence[Trace],
    device: torch.device,
    progress: Answered = lambda count: None,
) -> Figures:
    """Measure PeftModel on transformers' own model, in fp32."""
    with quiet_transformers():
        model = _load_model(base, device)
        model = peft.PeftModel.from_pretrained(model, str(part), torch_device="cpu").to(device).eval()
    return _ask_torch("peft", "peft", model, chat=chat, traces=traces, part=part, progress=progress)


def ask_merged(
    part: Path,
    chat: ChatTokenizer,
    traces: Sequence[Trace],
    device: torch.device,
    progress: Answered = lambda count: None,
) -> Figures:
    """Measure transformers on the merged files alone, in fp32.

    The differences show what the narrower dtype of the files rounds away.
    """
    with quiet_transformers():
        model = _load_model(part, device)
    return _ask_torch("transformers", "merged", model, chat=chat, traces=traces, part=part, progress=progress)


def _load_model(path: Path, device: torch.device) -> Any:
    load_options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    return (
        transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, **load_options)
        .to(device)
        .eval()
    )


def _ask_torch(
    runtime: str, form: str, model: Any, chat: ChatTokenizer, traces: Sequence[Trace], part: Path, progress: Answered
) -> Figures:
    start_time = time.monotonic()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(part), local_files_only=True, trust_remote_code=False)
    rendered = [
        tokenizer.apply_chat_template(trace.parity_prompt.as_json(), add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for trace in traces
        if trace.parity_prompt.is_plain
    ]
    logits = [logits_along(model, trace.prompt, trace.reply[:-1]) for trace in traces]
    greedy: list[list[int]] = []
    for start in range(0, len(traces), ROWS_TOGETHER):
        batch = traces[start : start + ROWS_TOGETHER]
        greedy += _generate(model, chat, [trace.prompt for trace in batch])
        progress(len(batch))
    answers = RuntimeOutputs(greedy, [_likeliest(logit) for logit in logits], logits)
    figures = compare(f"{runtime} {importlib.metadata.version(runtime)}", form, traces, answers)
    return replace(with_prompts(figures, traces, rendered), wall_s=round(time.monotonic() - start_time, 1))


@torch.inference_mode()
def _generate(model: Any, chat: ChatTokenizer, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return greedy replies by transformers' own decoding; a stop token is the last of a reply."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[chat.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with quiet_transformers():
        outputs = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=REPLY_TOKENS,
            eos_token_id=chat.stops,
            pad_token_id=chat.pad,
        )
    replies = []
    for row in outputs[:, width:].tolist():
        end = next((index for index, token in enumerate(row) if token in chat.stops), len(row))
        replies.append(row[: end + 1])
    return replies


def _likeliest(logits: torch.Tensor) -> list[list[tuple[int, float | None]]]:
    """Return the likeliest tokens with logprobs for each row of logits (T, V), best first."""
    best = logits.log_softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
    return [
        list(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def has_llama_cpp() -> bool:
    """Return whether llama.cpp is installed."""
    return importlib.util.find_spec(LLAMA_CPP) is not None


def need_llama_cpp() -> ExtraError:
    """Return the error for a receipt without llama.cpp."""
    error = missing_package(LLAMA_CPP, "llamacpp")
    return ExtraError(
        f"{error.problem}, so how a GGUF file answers cannot be measured", f"{error.remedy}; or --allow-unmeasured"
    )


def ask_llama_cpp(
    file: Path,
    form: str,
    traces: Sequence[Trace],
    template: str,
    adapter: Path | None = None,
    progress: Answered = lambda count: None,
) -> Figures:
    """Measure llama.cpp on a GGUF file, with or without an adapter file, in a process of its own.

    Raises GateError if it cannot run the file, or finds another chat template than `template`.
    """
    start_time = time.monotonic()
    context_length = max(len(trace.parity_prompt.ids) for trace in traces) + REPLY_TOKENS + 8
    job = {
        "model": str(file),
        "adapter": str(adapter) if adapter else "",
        "context": -(-context_length // 256) * 256,
        # its threads spin, so one that waits for a core holds up all the others
        "threads": max(1, (os.cpu_count() or 2) - 1),
        "likeliest": LIKELIEST,
        "longest": REPLY_TOKENS,
        "conversations": [trace.parity_prompt.as_json() for trace in traces if trace.parity_prompt.is_plain],
        "traces": [{"prompt": trace.prompt, "reply": list(trace.reply)} for trace in traces],
    }
    response = _in_a_process(job, progress)
    if "error" in response:
        raise GateError(
            f"llama.cpp cannot run {file.name}: {response['error']}",
            "sartor export --to merged is what transformers runs",
        )
    if response["template"] != template:
        raise GateError(f"llama.cpp finds another chat template in {file.name} than the Release is bound to", REPORT)
    answers = RuntimeOutputs(
        [item["greedy"] for item in response["traces"]], [item["likeliest"] for item in response["traces"]]
    )
    version = importlib.metadata.version(LLAMA_CPP)
    figures = compare(f"llama.cpp ({LLAMA_CPP} {version})", form, traces, answers)
    figures = replace(figures, wall_s=round(time.monotonic() - start_time, 1))
    return with_prompts(figures, traces, [item["ids"] for item in response["rendered"]])


def _in_a_process(job: dict[str, Any], progress: Answered) -> dict[str, Any]:
    """Run a job in a child process; return its result.

    A crash of llama.cpp and the time limit are returned as `error` too.
    """
    with tempfile.TemporaryDirectory() as folder:
        answered_file, answered = Path(folder) / "answered", 0

        def report_progress() -> bool:
            """Report the newly answered prompts, and stop nothing."""
            nonlocal answered
            count = answered_file.stat().st_size if answered_file.exists() else 0
            progress(count - answered)
            answered = count
            return False

        finished = run_job(
            "sartor.release.export.llamacpp_process",
            {**job, "answered": str(answered_file)},
            ResourceLimits(wall_s=TIME_LIMIT_S),
            stop=report_progress,
        )
    if finished.usage.killed:
        return {"error": f"it was not done in {TIME_LIMIT_S:.0f} s"}
    if finished.payload is None:
        return {"error": f"its process ended with {finished.usage.exit_code}: {' | '.join(finished.log_tail)[-300:]}"}
    return finished.payload
