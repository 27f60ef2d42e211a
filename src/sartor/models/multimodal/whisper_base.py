"""Whisper as a base for transcription rows.

The recording's one virtual id stands where `<|startoftranscript|>` does: the decoder reads that token there, and
through its cross-attention the encoder's features of the recording. So a row has a token for each place of the
decoder, and nothing else of a loss or a loop has to know that there is an encoder. A text beside the recording stands
where Whisper was trained to read one, behind `<|startofprev|>`.
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
# Whisper's texts begin with a space, what is said before and what is said alike
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}{% else "
    "%}"
    "{% for part in message.content if part.type == 'text' and part.text | trim %}"
    "{% if loop.first %}<|startofprev|>{% endif %}{{ ' ' + part.text | trim }}{% endfor %}"
    "{% for part in message.content if part.type == 'audio' %}" + START + "TASK{% endfor %}{% endif %}{% endfor %}"
)


def template(generation: Any) -> str:
    """The chat template of a Whisper with this generation config: without time stamps, in the config's language or
    English.
    """
    task = "<|notimestamps|>"
    if getattr(generation, "is_multilingual", False):
        language = (getattr(generation, "language", None) or "en").strip("<|>").lower()
        task = f"<|{TO_LANGUAGE_CODE.get(language, language)}|><|transcribe|>{task}"
    return TEMPLATE.replace("TASK", task)


class WhisperMedia(NativeMedia):
    """See `NativeMedia`. features: transformers' feature extractor. `max_positions`: tokens that the decoder has room
    for.
    """

    def __init__(self, features: Any, model: Any) -> None:
        self._features, self._model = features, model
        self.tokens, self.placeholders = {"audio": START}, {"audio": int(model.config.decoder_start_token_id)}
        # what is heard goes in by cross-attention, so no row can be computed without the model's own forward
        self.deviations = {frozenset({"audio"}): math.inf}
        self.max_positions = int(model.config.max_target_positions)
        self.template = template(model.generation_config)
        self._origins: dict[int, tuple[Part, Path | None]] = {}
        self._cache = BoundedCache(HELD_BYTES)

    def ids(self, part: Part, folder: Path | None) -> MediaTokens:
        """See `media_tokens.Media`. Raises MediaError for a recording that is longer than the encoder hears."""
        if part.kind != "audio":
            raise SourceError(f"this base reads no {part.kind}", "use a base that does, or leave these rows out")
        key = key_of("whisper", hashlib.sha256(content_of(part, folder)).hexdigest())
        self._origins[key] = (part, folder)
        self._spectrogram(key)
        return MediaTokens(virtual_ids(key, 1), START)

    def embedded(self, keys: Sequence[int]) -> list[torch.Tensor]:
        """See `media_tokens.Media`. Raises ModelError: what is heard goes in by cross-attention, and rows go one at a
        time.
        """
        raise ModelError(
            "a Whisper's recordings are no embeddings of tokens", "read them by its own forward: `inputs`"
        )

    def inputs(self, ids: torch.Tensor, *, is_blank: bool = False) -> dict[str, torch.Tensor]:
        """See `media_tokens.Media`."""
        weight = self._model.get_output_embeddings().weight
        features = self._spectrogram(keys_in(ids[0].tolist())[0]).to(weight.device, weight.dtype)
        if is_blank:
            features = torch.full_like(features, BLANK)
        return {"input_features": features, "decoder_input_ids": ids.masked_fill(ids < 0, self.placeholders["audio"])}

    def _spectrogram(self, key: int) -> torch.Tensor:
        """(1, mels, frames) of a recording, fp32."""
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
    """See `Chat`: turns are one recording and its transcript."""

    def __init__(self, tokenizer: Any, media: WhisperMedia, extra_stops: Sequence[int] = ()) -> None:
        tokenizer.chat_template = media.template
        # a vocabulary without a list of added tokens reads a mark as the characters that it is written with
        known = tokenizer.added_tokens_encoder
        marks = [token for token in tokenizer.get_vocab() if _MARK.fullmatch(token) and token not in known]
        tokenizer.add_tokens(sorted(marks), special_tokens=True)
        super().__init__(tokenizer, media, extra_stops)
        self._max_positions = media.max_positions

    def encode(self, example: Example, folder: Path | None = None) -> TokenizedExample:
        """See `Chat.encode`. Raises MediaError too for a transcript that the decoder has no room for."""
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
        """See `Chat.prompt_ids`. Raises SourceError too for one that leaves no room for a reply."""
        ids = super().prompt_ids(messages, tools, folder)
        if len(ids) >= self._max_positions:
            raise SourceError(
                f"a prompt of {len(ids)} tokens leaves none of {self._max_positions} for the reply",
                f"leave {len(ids) - self._max_positions + 1} tokens or more out of the text",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Chat.decode`."""
        return super().decode(ids).removeprefix(" ")

    def write(self, messages: Sequence[Message], *, tools: str = "", reply_next: bool = False) -> str:
        """See `Chat.write`. Raises SourceError too for turns that are not one recording, or that and its
        transcript.
        """
        if [message.role for message in messages] not in (["user"], ["user", "assistant"]):
            raise _not_heard(f"the turns ({', '.join(message.role for message in messages)})")
        count = sum(part.kind == "audio" for message in messages for part in message.content)
        if count != 1:
            raise _not_heard(f"{count} recordings")
        return super().write(messages, tools=tools, reply_next=reply_next)


def _not_heard(description: str) -> SourceError:
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
    """See `native_media.reply`: one transcript, at most as long as the decoder has places.

    By transformers' general generation with what Whisper's own suppresses; its own would write the prompt anew.
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
