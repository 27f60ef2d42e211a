"""Whisper as a base for transcription rows.

The recording's single virtual id is in the position of `<|startoftranscript|>`. There the decoder reads that token,
and through cross-attention the encoder's features of the recording. So a row has one token for each position of the
decoder, and no other part of a loss or a loop has to know that there is an encoder. A text beside the recording is
placed where Whisper was trained to read one, behind `<|startofprev|>`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from sartor.core.errors import MediaError, ModelError, SourceError
from sartor.core.records import Example, Message, Part
from sartor.media import audio
from sartor.models.media_tokens import content_of, key_of, keys_in, virtual_ids
from sartor.models.multimodal.native_chat import NativeChat
from sartor.models.multimodal.native_media import (
    BLANK,
    HELD_BYTES,
    BoundedCache,
    ForcedToken,
    MediaTokens,
    NativeMedia,
)
from sartor.models.packing import TokenizedExample

_MARK = re.compile(r"<\|.+\|>")
START = "<|startoftranscript|>"
# Whisper's texts begin with a space, the text before the recording and the transcript alike
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}{% else "
    "%}"
    "{% for part in message.content if part.type == 'text' and part.text | trim %}"
    "{% if loop.first %}<|startofprev|>{% endif %}{{ ' ' + part.text | trim }}{% endfor %}"
    "{% for part in message.content if part.type == 'audio' %}" + START + "TASK{% endfor %}{% endif %}{% endfor %}"
)


def template(generation: Any) -> str:
    """Return the chat template of a Whisper with this generation config.

    It has no timestamps, and the config's language or English.
    """
    task = "<|notimestamps|>"
    if getattr(generation, "is_multilingual", False):
        language = (getattr(generation, "language", None) or "en").strip("<|>").lower()
        task = f"<|{TO_LANGUAGE_CODE.get(language, language)}|><|transcribe|>{task}"
    return TEMPLATE.replace("TASK", task)


class WhisperMedia(NativeMedia):
    """`NativeMedia` of a Whisper.

    features: transformers' feature extractor. max_positions: number of tokens that the decoder can hold.
    """

    def __init__(self, features: Any, model: Any) -> None:
        self._features, self._model = features, model
        self.tokens, self.placeholders = {"audio": START}, {"audio": int(model.config.decoder_start_token_id)}
        # recordings enter by cross-attention, so every row needs the model's own forward
        self.deviations = {frozenset({"audio"}): math.inf}
        self.max_positions = int(model.config.max_target_positions)
        self.template = template(model.generation_config)
        self._origins: dict[int, tuple[Part, Path | None]] = {}
        self._cache = BoundedCache(HELD_BYTES)

    def ids(self, part: Part, folder: Path | None) -> MediaTokens:
        """Return the token ids of one recording. Raises MediaError for one that is longer than the encoder's window.

        Raises SourceError for another kind of media.
        """
        if part.kind != "audio":
            raise SourceError(f"this base reads no {part.kind}", "use a base that does, or leave these rows out")
        key = key_of("whisper", hashlib.sha256(content_of(part, folder)).hexdigest())
        self._origins[key] = (part, folder)
        self._spectrogram(key)
        return MediaTokens(virtual_ids(key, 1), START)

    def embedded(self, keys: Sequence[int]) -> list[torch.Tensor]:
        """Raise ModelError: a recording has no token embeddings of shape (T, D).

        It enters by cross-attention, and rows are computed one at a time.
        """
        raise ModelError(
            "a Whisper's recordings are no embeddings of tokens", "read them by its own forward: `inputs`"
        )

    def inputs(self, ids: torch.Tensor, *, is_blank: bool = False) -> dict[str, torch.Tensor]:
        """Return the arguments of Whisper's forward for one row of ids (1, T).

        is_blank: the spectrogram is replaced by a constant.
        """
        weight = self._model.get_output_embeddings().weight
        features = self._spectrogram(keys_in(ids[0].tolist())[0]).to(weight.device, weight.dtype)
        if is_blank:
            features = torch.full_like(features, BLANK)
        return {"input_features": features, "decoder_input_ids": ids.masked_fill(ids < 0, self.placeholders["audio"])}

    def _spectrogram(self, key: int) -> torch.Tensor:
        """Return the spectrogram (1, mels, frames) of a recording, fp32. Raises MediaError if it is too long."""
        if (cached := self._cache.get(key)) is not None:
            return cached  # type: ignore[no-any-return]
        part, folder = self._origins[key]
        rate = self._features.sampling_rate
        sound = audio.read_sound(content_of(part, folder), rate)
        if len(sound) > self._features.n_samples:
            problem = (
                f"the recording has {len(sound) / rate:.1f} s, and the base hears "
                f"{self._features.n_samples / rate:.0f} s"
            )
            raise MediaError(
                "long_audio",
                problem,
                "ffmpeg -i RECORDING -f segment -segment_time 30 PART%03d.flac, each with its part of the transcript",
            )
        spectrogram = self._features(sound, sampling_rate=rate, return_tensors="pt").input_features
        self._cache.put(key, spectrogram, spectrogram.nbytes)
        return spectrogram  # type: ignore[no-any-return]


class WhisperChat(NativeChat):
    """`ChatTokenizer` of a Whisper: turns are one recording and its transcript."""

    def __init__(self, tokenizer: Any, media: WhisperMedia, extra_stops: Sequence[int] = ()) -> None:
        tokenizer.chat_template = media.template
        # a tokenizer without a list of added tokens would split a control token into characters
        known = tokenizer.added_tokens_encoder
        marks = [token for token in tokenizer.get_vocab() if _MARK.fullmatch(token) and token not in known]
        tokenizer.add_tokens(sorted(marks), special_tokens=True)
        super().__init__(tokenizer, media, extra_stops)
        self._max_positions = media.max_positions

    def encode(self, example: Example, folder: Path | None = None) -> TokenizedExample:
        """Return token ids and loss mask of one Example, as `ChatTokenizer.encode` does.

        Raises MediaError also for a transcript that exceeds the decoder's positions.
        """
        if example.is_document:
            raise _not_heard("a document")
        row = super().encode(example, folder)
        if len(row.ids) > self._max_positions:
            problem = f"the row has {len(row.ids)} tokens, and the base's decoder {self._max_positions} places"
            raise MediaError(
                "long_transcript",
                problem,
                "ffmpeg -i RECORDING -f segment -segment_time 30 PART%03d.flac, each with its part of the transcript",
            )
        return row

    def prompt_ids(self, messages: Sequence[Message], tools: str = "", folder: Path | None = None) -> list[int]:
        """Return the token ids of a conversation, as `ChatTokenizer.prompt_ids` does.

        Raises SourceError also for one that leaves no position for a reply.
        """
        ids = super().prompt_ids(messages, tools, folder)
        if len(ids) >= self._max_positions:
            raise SourceError(
                f"a prompt of {len(ids)} tokens leaves none of {self._max_positions} for the reply",
                f"leave {len(ids) - self._max_positions + 1} tokens or more out of the text",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a reply, without its leading space."""
        return super().decode(ids).removeprefix(" ")

    def write(self, messages: Sequence[Message], *, tools: str = "", reply_next: bool = False) -> str:
        """Return the template's text as `NativeChat.write` does.

        Raises SourceError also unless the turns are one recording, or one with its transcript.
        """
        if [message.role for message in messages] not in (["user"], ["user", "assistant"]):
            raise _not_heard(f"the turns ({', '.join(message.role for message in messages)})")
        count = sum(part.kind == "audio" for message in messages for part in message.content)
        if count != 1:
            raise _not_heard(f"{count} recordings")
        return super().write(messages, tools=tools, reply_next=reply_next)


def _not_heard(description: str) -> SourceError:
    """Return the error for turns that are not one recording and its transcript."""
    return SourceError(
        f"a Whisper takes one recording and its transcript, not {description}", "use another base for these rows"
    )


@torch.inference_mode()
def reply(
    model: Any,
    media: NativeMedia,
    prompt: Sequence[int],
    stop: Sequence[int],
    pad: int,
    max_new_tokens: int,
    choose: Callable[[torch.Tensor], int],
) -> list[int]:
    """Return the token ids of one transcript, as `native_media.reply` does.

    It has at most as many tokens as the decoder has positions. It uses transformers' general generation with Whisper's
    suppressed tokens, since Whisper's own generation would rewrite the prompt. choose: returns the next token for
    logits of shape (1, V).
    """
    inputs = media.inputs(torch.tensor([list(prompt)], device=model.device))
    generation_config = model.generation_config
    settings = transformers.GenerationConfig(
        max_length=min(len(prompt) + max_new_tokens, model.config.max_target_positions),
        do_sample=False,
        eos_token_id=list(stop),
        pad_token_id=pad,
        suppress_tokens=generation_config.suppress_tokens,
        begin_suppress_tokens=generation_config.begin_suppress_tokens,
        decoder_start_token_id=model.config.decoder_start_token_id,
    )
    processors = transformers.LogitsProcessorList([ForcedToken(choose)])
    output_ids = transformers.GenerationMixin.generate(
        model, **inputs, generation_config=settings, logits_processor=processors
    )
    return [int(token) for token in output_ids[0, len(prompt) :]]
