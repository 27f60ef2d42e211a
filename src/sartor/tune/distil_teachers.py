"""Teachers of distillation: a base or adapter in this process, or the model behind an endpoint.

A teacher reads the same conversation as the student, by its own chat template and tokenizer. Where its supervised
tokens are the student's, distributions are compared token by token; elsewhere chunk by chunk (`text_alignment.py`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from sartor.core import records
from sartor.core.artifacts import Artifact, kind_of, open_artifact
from sartor.core.errors import ConfigError, ModelError, SourceError, about_option
from sartor.core.model_refs import locate_base
from sartor.inference.endpoint_client import (
    Access,
    EndpointClient,
    IncompleteResponseError,
    Patience,
    QuestionRefused,
    RequestThrottle,
    bounded_lines,
    json_body,
    key_of,
)
from sartor.models import adapters, packing
from sartor.models.base import Base, open_base, read_chat
from sartor.models.chat import ChatTokenizer
from sartor.models.losses.loss_backend import LossBackend, LossOptions
from sartor.models.losses.soft_targets import NO_BIN
from sartor.models.losses.token_scores import top_tokens
from sartor.models.packing import TokenizedExample
from sartor.models.tuned_model import open_tuned
from sartor.tune import text_alignment
from sartor.tune.recipe import Distil, ResolvedRecipe, TeacherEndpoint
from sartor.tune.teacher_scores import TeacherScore
from sartor.tune.text_alignment import Chunk, supervised_ids
from sartor.tune.tokenized_dataset import DistilExample

Notice = Callable[[str], object]
# The teacher's name for the student's own base, untouched
OWN_BASE = "base"
# Tokens that a local teacher computes at once
_TEACHER_TOKENS = 512
_OPTION = "objective.teacher"
FEW_TOKENS = 5
# Log-probabilities up to this are taken for 0: servers round
_ROUNDING = 1e-3
# Probabilities of the likeliest tokens may sum to so much more than 1
_SUM_ROUNDING = 0.02
_TOKEN_ID = "token_id:"  # vLLM's spelling of a token by its id


class DistilTeacher(Protocol):
    """Teacher that scores replies.

    name: for people. identity: digest of its weights and tokenizer, or of an endpoint's model.
    licence: of what it states; empty for none.
    parent: Adapter or Release that it is; None for a base or an endpoint.
    """

    name: str
    identity: str
    licence: str
    parent: Artifact | None
    is_remote: bool

    @property
    def note(self) -> str:
        """How its tokens compare with the student's, for the log."""
        ...

    def score(self, rows: Sequence[DistilExample]) -> list[TeacherScore]:
        """Return the scores of rows, in order. Raises what reaching the teacher raises."""
        ...


@dataclass
class Translation:
    """Rows of the student as the teacher reads them.

    student, teacher: tokenizers with their templates.
    """

    student: ChatTokenizer
    teacher: ChatTokenizer

    def __post_init__(self) -> None:
        vocabularies = [chat.tokenizer.get_vocab() for chat in (self.student, self.teacher)]
        self.is_same_vocabulary = vocabularies[0] == vocabularies[1]
        self._is_same = self.is_same_vocabulary and self.student.template_digest == self.teacher.template_digest
        self.vocabulary = len(vocabularies[1])

    @property
    def note(self) -> str:
        """How replies are compared, for the log."""
        if self.is_same_vocabulary:
            return "has the student's vocabulary: distributions are compared token by token"
        return "has another vocabulary: replies are compared by chunks of text at whose ends both have a boundary"

    def row(self, row: DistilExample) -> TokenizedExample | None:
        """Return a row of the student as the teacher's tokens; None if its template refuses the row."""
        if self._is_same or row.example is None:
            return row
        try:
            return self.teacher.encode(row.example)
        except SourceError:
            return None

    def chunks(self, row: TokenizedExample, teacher_row: TokenizedExample) -> list[Chunk] | None:
        """Return the chunks of a row; None if the supervised tokens of both are the same."""
        if self.is_same_vocabulary and supervised_ids(row) == supervised_ids(teacher_row):
            return None
        return text_alignment.align((row, self.student), (teacher_row, self.teacher))


def chunk_scores(row: TokenizedExample, chunks: Sequence[Chunk], targets: torch.Tensor) -> TeacherScore:
    """Return the scores of a row by chunks. targets: the teacher's log-probabilities (S',) of its own tokens."""
    unit = torch.full((row.supervised_tokens,), -1)
    sums = torch.zeros(len(chunks))
    for index, chunk in enumerate(chunks):
        unit[chunk.student.start : chunk.student.stop] = index
        sums[index] = targets[chunk.teacher.start : chunk.teacher.stop].sum()
    return TeacherScore(unit, torch.tensor(supervised_ids(row))[:, None], sums[:, None], sums)


def nothing_scored(row: TokenizedExample) -> TeacherScore:
    """Return the scores of a row that the teacher cannot read."""
    return chunk_scores(row, [], torch.zeros(0))


@dataclass
class LocalTeacher:
    """Teacher in this process: a model, and the tokenizers of both sides."""

    name: str
    identity: str
    licence: str
    model: Any
    base: Base
    translation: Translation
    top_k: int
    parent: Artifact | None = None
    is_remote: bool = False
    _backend: LossBackend | None = field(default=None, repr=False)

    @property
    def note(self) -> str:
        """How its tokens compare with the student's."""
        return self.translation.note

    def score(self, rows: Sequence[DistilExample]) -> list[TeacherScore]:
        """Return the scores of rows, in order; of a row that its template refuses they are empty."""
        readable: list[tuple[int, TokenizedExample]] = []
        for index, row in enumerate(rows):
            teacher_row = self.translation.row(row)
            if teacher_row is not None and teacher_row.supervised_tokens:
                readable.append((index, teacher_row))
        results = [nothing_scored(row) for row in rows]
        if self._backend is None and readable:
            self._backend = self.base.path(self.model, [row for _, row in readable], LossOptions(share=False))
        lengths = [len(row.ids) for _, row in readable]
        for group in packing.group_by_capacity(lengths, max([_TEACHER_TOKENS, *lengths])):
            assert self._backend is not None
            batch = [readable[place][1] for place in group]
            top = top_tokens(self._backend, batch, self.top_k, self.translation.vocabulary)
            counts = [row.supervised_tokens for row in batch]
            parts = (part.split(counts) for part in (top.ids, top.log_probabilities, top.targets))
            for place, ids, values, targets in zip(group, *parts, strict=True):
                index, teacher_row = readable[place]
                chunks = self.translation.chunks(rows[index], teacher_row)
                if chunks is None:
                    results[index] = TeacherScore.of_tokens(ids, values, targets)
                else:
                    results[index] = chunk_scores(rows[index], chunks, targets.float().cpu())
        return results


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of the tokens of a prompt, as an endpoint states them.

    targets: (T,) of each token; nan of the first. tops: for each token the likeliest ones, by their text.
    """

    targets: list[float]
    tops: list[dict[str, float]]


@dataclass
class RemoteTeacher:
    """Teacher behind an endpoint, which is asked for the log-probabilities of a prompt (`echo`)."""

    client: EndpointClient
    options: TeacherEndpoint
    translation: Translation
    top_k: int
    parent: Artifact | None = None
    is_remote: bool = True

    def __post_init__(self) -> None:
        self.name, self.licence = self.client.name, self.options.licence
        tokenizer = records.digest(sorted(self.translation.teacher.tokenizer.get_vocab().items()))
        self.identity = f"endpoint:{self.options.model}:{tokenizer[:32]}"
        # a text that several tokens spell names none of them: bytes of a character, all of which decode to U+FFFD
        self._ids: dict[str, int] = {}
        tokens = self.translation.teacher.tokenizer
        for token in sorted(tokens.get_vocab().values()):
            text = str(tokens.decode([token], clean_up_tokenization_spaces=False))
            self._ids[text] = -1 if text in self._ids else token

    @property
    def note(self) -> str:
        """How its tokens compare with the student's."""
        return self.translation.note

    def score(self, rows: Sequence[DistilExample]) -> list[TeacherScore]:
        """Return the scores of rows, in order.

        Raises ModelError if the endpoint gives no log-probabilities of a prompt, UnavailableError or BusyError once
        all tries are used, KeyRefusedError, ConfigError.
        """
        with ThreadPoolExecutor(self.options.at_once) as pool:
            return list(pool.map(self._score, rows))

    def _score(self, row: DistilExample) -> TeacherScore:
        """Return the endpoint's likeliest tokens at each position of a row's reply, in the student's tokens."""
        teacher_row = self.translation.row(row)
        if teacher_row is None or not teacher_row.supervised_tokens:
            return nothing_scored(row)
        body = {
            "model": self.options.model,
            "prompt": teacher_row.ids,
            "echo": True,
            "logprobs": self.top_k,
            "max_tokens": 1,
            "temperature": 0,
        }

        def read(lines: Iterable[bytes], content_type: str) -> PromptScores:
            return self._read(lines, teacher_row.ids)

        seed = hashlib.sha256(repr(teacher_row.ids).encode()).hexdigest()
        try:
            scores = self.client.ask(json.dumps(body).encode(), len(teacher_row.ids), read, seed=seed)
        except ConfigError as error:
            if remedy := self._fewer_tokens(error.problem):
                raise about_option(ConfigError(error.problem, remedy), _OPTION) from None
            raise
        if isinstance(scores, QuestionRefused):
            long_row = f"the row {row.example_id} of {len(teacher_row.ids):,} of its tokens"
            problem = f"{self.name} refuses {long_row}: {scores.problem}"
            if scores.is_too_long:  # the option counts the student's tokens
                remedy = f"--data.max_length_tokens {len(row.ids) - 1}, or a longer context there"
            else:
                server = f"{_OPTION}: a server whose /completions takes token ids, echo and logprobs"
                remedy = self._fewer_tokens(scores.problem) or f"{server}; or leave the row out"
            raise about_option(ModelError(problem, remedy), _OPTION)
        places = [place for place in range(1, len(teacher_row.ids)) if teacher_row.learnt[place]]
        targets = torch.tensor([scores.targets[place] for place in places])
        chunks = self.translation.chunks(row, teacher_row)
        if chunks is not None:
            return chunk_scores(row, chunks, targets)
        if places and not any(scores.tops[place] for place in places):
            raise self._lacks(f"its answer has no `top_logprobs`, and objective.top_k is {self.top_k}")
        bins = [self._bins(scores.tops[place], teacher_row.ids[place], scores.targets[place]) for place in places]
        width = max(map(len, bins), default=1)
        ids, values = torch.zeros(len(bins), width, dtype=torch.long), torch.full((len(bins), width), NO_BIN)
        for index, tokens in enumerate(bins):
            ids[index, : len(tokens)] = torch.tensor(list(tokens))
            values[index, : len(tokens)] = torch.tensor(list(tokens.values()))
        return TeacherScore.of_tokens(ids, values, targets)

    def _fewer_tokens(self, words: str) -> str:
        """Return the remedy if an endpoint's words refuse so many likeliest tokens; empty for another refusal.

        OpenAI's /completions gives FEW_TOKENS, vLLM 20 unless it is started with more.
        """
        if "logprobs" not in words or "echo" in words or self.top_k <= FEW_TOKENS:
            return ""
        server = f"or raise the server's limit: vLLM --max-logprobs {self.top_k}"
        return f"--objective.top_k {FEW_TOKENS}, or as many as it gives; {server}"

    def _bins(self, top: dict[str, float], target: int, value: float) -> dict[int, float]:
        """Return the likeliest tokens that a text names, with the row's own token: id -> log-probability."""
        bins = {target: value}
        for text, log_probability in top.items():
            token = self._ids[text] if text in self._ids else _stated_id(text)
            if 0 <= token < self.translation.vocabulary and log_probability > -math.inf:
                bins.setdefault(token, log_probability)
        return bins

    def _read(self, lines: Iterable[bytes], ids: Sequence[int]) -> PromptScores:
        """Return the scores in an answer about the prompt `ids`."""
        tokens = len(ids)
        fields = json_body(b"".join(bounded_lines(lines)).decode("utf-8", "replace"))
        choices = fields.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise IncompleteResponseError("there is no choice in it")
        found = choices[0].get("logprobs")
        if not isinstance(found, dict) or not isinstance(found.get("token_logprobs"), list):
            raise self._lacks("its answer has no `logprobs`")
        values, tops = found["token_logprobs"], found.get("top_logprobs") or []
        if len(values) < tokens:
            raise self._lacks(f"its answer has log-probabilities of {len(values)} tokens, and the prompt has {tokens}")
        try:
            targets = [float("nan") if value is None else float(value) for value in values[:tokens]]
            named = [{str(name): float(value) for name, value in (top or {}).items()} for top in tops[:tokens]]
        except (TypeError, ValueError, AttributeError, KeyError, OverflowError):
            raise IncompleteResponseError("its log-probabilities are no numbers") from None
        if any(math.isnan(value) for value in targets[1:]):
            raise self._lacks("it gives no log-probability of some tokens of the prompt")
        for value in (*targets[1:], *(value for top in named[1:] for value in top.values())):
            if not value <= _ROUNDING:
                raise self._lacks(f"one of its log-probabilities is {value}; they must be at most 0")
        for top in named[1:]:
            if (total := sum(math.exp(value) for value in top.values())) > 1 + _SUM_ROUNDING:
                raise self._lacks(f"the probabilities of the likeliest tokens at one place sum to {total:.2f}")
        if -math.inf in targets:
            raise self._lacks("one of its log-probabilities of the prompt's tokens is -inf")
        self._check_tokens(found.get("tokens"), ids)
        return PromptScores(targets, named + [{} for _ in range(tokens - len(named))])

    def _check_tokens(self, echoed: Any, ids: Sequence[int]) -> None:
        """Raise ModelError if most of the echoed tokens are other texts than `ids` have in the student's tokenizer.

        The student's was never stated to be the teacher's. Special tokens and parts of characters are not compared.
        """
        if self.options.tokenizer or not isinstance(echoed, list):
            return
        tokenizer = self.translation.teacher.tokenizer
        special = set(tokenizer.all_special_ids)
        compared, differing = 0, list[str]()
        for token, text in zip(ids, echoed, strict=False):
            own, piece = _bare(tokenizer.decode([token])), _bare(tokenizer.convert_ids_to_tokens(token))
            is_comparable = isinstance(text, str) and own and "\ufffd" not in own + text
            if not is_comparable or token in special or text.startswith("bytes:"):
                continue
            compared += 1
            if _bare(text) not in (own, piece) and _stated_id(text) != token:
                differing.append(f"id {token} is {own!r} here and {text[:40]!r} there")
        if 2 * len(differing) > compared:
            raise self._lacks(
                f"it has another tokenizer than the student: {len(differing)} of {compared} tokens are other texts, "
                f"{differing[0]}",
                f"{_OPTION}.tokenizer: BASE, a directory or hub name that has the tokenizer of {self.options.model}",
            )

    def _lacks(self, lack: str, remedy: str = "") -> ModelError:
        problem = f"{self.client.access.url} ({self.options.model}) cannot teach: {lack}"
        other = f"{_OPTION}: a server whose /completions takes echo and logprobs (vLLM, SGLang), or a base on disk"
        return about_option(ModelError(problem, remedy or other), _OPTION)


def _stated_id(text: str) -> int:
    """Return the id in a text such as `token_id:17`; -1 if it has none."""
    digits = text.removeprefix(_TOKEN_ID)
    return int(digits) if digits != text and digits.isascii() and digits.isdigit() and len(digits) < 10 else -1


def _bare(text: str) -> str:
    """Return a token's text without spaces around it, however its vocabulary writes them."""
    return text.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", " ").strip()


def open_teacher(recipe: ResolvedRecipe, base: Base, notice: Notice) -> DistilTeacher | None:
    """Return the teacher of a recipe; None if its objective is not distil. Call it before the adapter is injected.

    The base and an adapter on it share the student's weights. Raises ConfigError, ArtifactError, and what opening the
    base or adapter raises.
    """
    objective = recipe.objective
    if not isinstance(objective, Distil):
        return None
    if base.media is not None:
        raise ConfigError(f"{base.ref.name} reads media, and distillation reads text alone", "objective: {kind: sft}")
    if isinstance(objective.teacher, TeacherEndpoint):
        return _open_remote(objective, objective.teacher, base, notice)
    return _open_local(recipe, objective.teacher, base, notice)


def _open_remote(objective: Distil, options: TeacherEndpoint, base: Base, notice: Notice) -> RemoteTeacher:
    access = Access(options.url, options.model, key_of(options.key_env, _OPTION))
    client = EndpointClient(
        access,
        RequestThrottle(),
        Patience(options.tries),
        route="/completions",
        option=_OPTION,
        notice=notice,
    )
    chat = base.chat
    if options.tokenizer:
        chat = read_chat(locate_base(options.tokenizer, option=f"{_OPTION}.tokenizer"))
    return RemoteTeacher(client, options, Translation(base.chat, chat), objective.top_k)


def _open_local(recipe: ResolvedRecipe, name: str, base: Base, notice: Notice) -> LocalTeacher:
    """Return a teacher in this process: the student's untouched base, another base, an Adapter or a Release."""
    assert isinstance(recipe.objective, Distil)
    top_k = recipe.objective.top_k
    if name == OWN_BASE:
        return LocalTeacher(
            f"{base.ref.name}, untouched",
            f"base:{base.ref.digest}",
            base.ref.licence,
            model=shared_copy(base.model),
            base=base,
            translation=Translation(base.chat, base.chat),
            top_k=top_k,
        )
    if kind_of(Path(name)) not in ("adapter", "release"):
        teacher = _open_base(name, base, notice)
        return LocalTeacher(
            teacher.ref.name,
            f"base:{teacher.ref.digest}",
            teacher.ref.licence,
            model=teacher.model,
            base=teacher,
            translation=Translation(base.chat, teacher.chat),
            top_k=top_k,
        )
    artifact = open_artifact(name, ("adapter", "release"))
    if artifact.manifest["base"]["digest"] == base.ref.digest:
        teacher, model = base, adapters.open_adapter(shared_copy(base.model), artifact.path)
    else:
        teacher, model = open_tuned(artifact, notice, device=base.device)
    return LocalTeacher(
        f"{artifact.path.name} on {teacher.ref.name}",
        f"adapter:{records.digest(artifact.manifest['files'])}:{teacher.ref.digest}",
        artifact.licence,
        model=model.requires_grad_(False),
        base=teacher,
        translation=Translation(base.chat, teacher.chat),
        top_k=top_k,
        parent=artifact,
    )


def _open_base(name: str, base: Base, notice: Notice) -> Base:
    teacher = open_base(name, device=base.device, notice=notice, option=_OPTION)
    if teacher.media is not None:
        raise ConfigError(f"the teacher {name} reads media, and distillation reads text alone", f"{_OPTION}: base")
    return teacher


def shared_copy(model: Any) -> Any:
    """Return a copy of the modules of a model around the same tensors: an adapter in one does not touch the other."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


def check_aligned(rows: Sequence[DistilExample], scores: Sequence[TeacherScore], teacher: DistilTeacher) -> int:
    """Return how many of the rows have nothing to compare. Raises SourceError if that is all of them."""
    count = sum(not score.units for score in scores)
    if rows and count == len(rows):
        raise SourceError(
            f"in none of {len(rows):,} rows do the student and {teacher.name} spell a reply alike",
            f"{_OPTION}: a teacher whose chat template writes replies as they are; the first row is "
            f"{rows[0].example_id}",
        )
    return count
