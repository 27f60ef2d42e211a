"""Scores of training rows for replies: Sartor's methods, and the peers of trace.py in plain code.

Each gives (Q, N) of Q queries and N rows; larger if the row made the reply likelier.

unrolled            trace/unrolling.py
gradient            Sartor's gradient method (trace/ensemble.py), with the weights that are packaged
gradient_alone, hidden_states    its parts, each alone
retrieval           what `sartor trace` shows beside each method (trace/retrieval.py)
bm25                Robertson and Zaragoza 2009, equation 3.15, over prompt and reply of a row as one text
embedding           cosine of minilm's vectors of prompt and reply
hidden              cosine of the tuned model's last hidden states, mean of the reply's tokens
gradient_dot        dot product of the gradients of the reply's summed loss by the adapter's weights, after the tuning
gradient_cosine     the same over their norms
bergson             TrackStar of bergson 2.5.1 on the CPU, in a venv of its own (peers/bergson/run.py)
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import parts
import torch
from numpy.typing import NDArray
from peers import venvs
from trace_setup import notice, open_tokenized

from sartor.core.encoder_registry import open_encoder
from sartor.core.records import Example
from sartor.models import adapters
from sartor.models.base import open_base
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.packing import TokenizedExample
from sartor.trace.ensemble import GRADIENT_ALONE, PACKAGED, combine, part_scores
from sartor.trace.prepare import prepare
from sartor.trace.retrieval_store import retrieval_scores
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery
from sartor.trace.unrolling import unrolled_scores

F64 = NDArray[np.float64]
BERGSON, BERGSON_S = Path(__file__).resolve().parent / "peers" / "bergson" / "run.py", 3600.0
# (Q, N) by the name of a method
Scores = dict[str, F64]
Scorer = Callable[[TracedAdapter, Sequence[TraceQuery]], Scores]
# saturation of a word's count, and weight of the text's length
K1, B = 1.2, 0.75


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


class Bm25:
    """BM25 index of N texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        lengths = np.array([max(1, count.total()) for count in counts], float)
        postings: dict[str, list[tuple[int, int]]] = {}
        for row, count in enumerate(counts):
            for word, number in count.items():
                postings.setdefault(word, []).append((row, number))
        self._size = len(texts)
        # norm_d = k1 (1 - b + b |d| / mean |d|)
        self._norms = K1 * (1 - B + B * lengths / lengths.mean())
        self._postings = {word: np.array(rows) for word, rows in postings.items()}

    def scores(self, query: str) -> F64:
        """Return the scores (N,) of the texts for a query."""
        scores = np.zeros(self._size)
        for word in set(words(query)):
            if word not in self._postings:
                continue
            rows, numbers = self._postings[word].T
            # idf = log(1 + (N - n + 0.5) / (n + 0.5));  score += idf f (k1 + 1) / (f + norm_d)
            idf = math.log(1 + (self._size - len(rows) + 0.5) / (len(rows) + 0.5))
            scores[rows] += idf * numbers * (K1 + 1) / (numbers + self._norms[rows])
        return scores


def text_of(example: Example) -> str:
    """Return the last question and the reply; a system prompt that all rows share tells nothing."""
    return f"{example.prompt[-1].text if example.prompt else ''}\n{example.reply}"


def bm25(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> Scores:
    """Return the BM25 scores."""
    index = Bm25([text_of(row.example) for row in traced.rows])
    return {"bm25": np.stack([index.scores(text_of(query.example)) for query in queries])}


def embedding(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> Scores:
    """Return the cosines of the sentence encoder's vectors. Raises MissingError without minilm."""
    examples = [*(row.example for row in traced.rows), *(query.example for query in queries)]
    vectors = np.asarray(open_encoder("minilm").encode([text_of(example) for example in examples]), float)
    return {"embedding": np.asarray(vectors[len(traced.rows) :] @ vectors[: len(traced.rows)].T)}


def hidden(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> Scores:
    """Return the cosines of the mean last hidden states of the reply's tokens."""
    base, examples = open_tokenized(traced, queries)
    model = adapters.open_adapter(base.model, traced.artifact.path)
    states = np.stack([_reply_state(model, example, base.device) for example in examples])
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    return {"hidden": np.asarray(states[len(traced.rows) :] @ states[: len(traced.rows)].T, float)}


@torch.no_grad()
def _reply_state(model: Any, example: TokenizedExample, device: torch.device) -> F64:
    """Return the mean last hidden state of the positions that predict the last reply, (D,)."""
    start, end = example.last_reply
    output = model(input_ids=torch.tensor([example.ids[:end]], device=device), output_hidden_states=True)
    return np.asarray(output.hidden_states[-1][0, start - 1 : end - 1].mean(0).double().cpu())


def gradients(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> Scores:
    """Return dot products and cosines of gradients.

    The rows' gradients are computed one after the other and not kept, so memory holds Q of them.
    """
    base, examples = open_tokenized(traced, queries)
    model = adapters.open_adapter(base.model, traced.artifact.path)
    parameters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    path = base.path(model, examples, LossOptions())
    rows = examples[: len(traced.rows)]
    targets = torch.stack(list(_gradients(path, parameters, examples[len(rows) :])))
    norms = targets.norm(dim=1)
    dots, cosines = [], []
    for row, gradient in enumerate(_gradients(path, parameters, rows)):
        if row and row % 500 == 0:
            notice(f"gradients of {row} of {len(rows)} rows")
        product = targets @ gradient
        dots.append(product.double().cpu().numpy())
        cosines.append((product / (norms * gradient.norm()).clamp_min(1e-30)).double().cpu().numpy())
    return {"gradient_dot": np.stack(dots, 1), "gradient_cosine": np.stack(cosines, 1)}


def _gradients(
    path: Any, parameters: Sequence[torch.nn.Parameter], examples: Sequence[TokenizedExample]
) -> Iterator[torch.Tensor]:
    """Yield the gradient (D,) of each example's loss, summed over its supervised tokens."""
    for example in examples:
        for parameter in parameters:
            parameter.grad = None
        path.losses([example])[0].sum().backward()
        yield torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])


def bergson(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> dict[str, Any]:
    """Return the `scores` (Q, N) of bergson, or under `failed` why there are none."""
    try:
        python = venvs.interpreter("bergson")
    except venvs.NotInstalled as error:
        return {"failed": f"not installed: {error}"}
    base = open_base(traced.recipe.base.name, bits=32)
    messages = [
        [{"role": message.role, "content": message.text} for message in example.messages]
        for example in [*(row.example for row in traced.rows), *(query.example for query in queries)]
    ]
    job = {"base": str(base.ref.path), "adapter": str(traced.artifact.path)}
    job |= {"rows": messages[: len(traced.rows)], "queries": messages[len(traced.rows) :]}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("job.json", "result.json")]
        files[0].write_text(json.dumps(job), encoding="utf-8")
        command = [str(python), str(BERGSON), *map(str, files)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BERGSON_S)
        except subprocess.TimeoutExpired:
            return {"failed": f"it took more than {BERGSON_S:g} s"}
        if not files[1].is_file():
            return {"failed": f"it ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}"}
        result: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
    return {"failed": result["failed"]} if "failed" in result else {"scores": result["scores"]}


def unrolled(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> Scores:
    """Return the scores of unrolling, in nats."""
    return {"unrolled": np.asarray(unrolled_scores(traced, queries, notice=notice).scores)}


def sketched(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> Scores:
    """Return the scores of Sartor's gradients and hidden states, from sketches that `prepare` made."""
    parts_of, _ = part_scores(traced, queries, notice=notice)
    return {name: np.asarray(scores, float) for name, scores in parts_of.items()}


def retrieved(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> Scores:
    """Return the scores of retrieval."""
    return {"retrieval": np.asarray(retrieval_scores(traced, queries).scores, float)}


def with_ensemble(scores: Scores) -> Scores:
    """Return the scores with those of the verb's method as `gradient`, and of its sketches as `gradient_alone`."""
    return {**scores, "gradient_alone": combine(scores, GRADIENT_ALONE), "gradient": combine(scores, PACKAGED)}


SKETCHES: dict[str, Scorer] = {"sketches": sketched, "retrieval": retrieved}
OURS: dict[str, Scorer] = {"unrolling": unrolled, **SKETCHES}
PEERS: dict[str, Scorer] = {"bm25": bm25, "embedding": embedding, "hidden": hidden, "plain gradients": gradients}
PEER_NAMES = ("bm25", "embedding", "hidden", "gradient_dot", "gradient_cosine")


def scores_of(
    label: str, scorers: Mapping[str, Scorer], traced: TracedAdapter, queries: Sequence[TraceQuery]
) -> Scores:
    """Return the scores of every method; each scorer is a part of the call. Sketches of all rows are made before."""
    if "sketches" in scorers:
        parts.run(f"{label}: preparing", lambda: prepare(traced, notice=notice).wall_s)
    scores: Scores = {}
    for name, scorer in scorers.items():

        def score(scorer: Scorer = scorer) -> dict[str, list[list[float]]]:
            return {method: matrix.tolist() for method, matrix in scorer(traced, queries).items()}

        measured = parts.run(f"{label}: {name}", score)
        scores |= {method: np.asarray(matrix) for method, matrix in measured.items()}
    return scores
