"""A Whisper as a base: rows of one recording and its transcript.

The recording's one virtual id stands where `<|startoftranscript|>` does: the decoder reads that token there, and through its
cross-attention the encoder's features of the recording. So a row has a token for each place of the decoder, and nothing else
of a loss or a loop has to know that there is an encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from sartor.core import sounds
from sartor.core.errors import MediaError, SourceError
from sartor.core.records import Part
from sartor.models.media import content_of, key_of, keys_in, virtual_ids
from sartor.models.native.media import BLANK, HELD_BYTES, Held, NativeMedia, Written

START = "<|startoftranscript|>"
# One recording and nothing else is asked; Whisper's transcripts begin with a space
TEMPLATE = (
    "{%% for message in messages %%}{%% if message.role == 'user' %%}{%% for part in message.content %%}"
    "{%% if part.type == 'audio' %%}" + START + "%s{%% else %%}{{ part.text | trim }}{%% endif %%}{%% endfor %%}"
    "{%% else %%}{{ ' ' + message.content }}<|endoftext|>{%% endif %%}{%% endfor %%}"
)


class WhisperMedia(NativeMedia):
    """See `NativeMedia`."""

    def __init__(self, features: Any, model: Any) -> None:
        self._features, self._model = features, model
        self.tokens, self.placeholders = {"audio": START}, {"audio": int(model.config.decoder_start_token_id)}
        self.apart = {}
        self._origins: dict[int, tuple[Part, Path | None]] = {}
        self._held = Held(HELD_BYTES)

    def ids(self, part: Part, folder: Path | None) -> Written:
        """See `media.Media`. Raises MediaError for a recording that is longer than the encoder hears."""
        if part.kind != "audio":
            raise SourceError(f"this base reads no {part.kind}", "use a base that does, or leave these rows out")
        key = key_of("whisper", hashlib.sha256(content_of(part, folder)).hexdigest())
        self._origins[key] = (part, folder)
        self._spectrogram(key)
        return Written(virtual_ids(key, 1), START)

    def embedded(self, keys: Sequence[int]) -> list[torch.Tensor]:
        """See `media.Media`: never, since what is heard goes in by cross-attention."""
        raise NotImplementedError

    def inputs(self, ids: torch.Tensor, *, is_blank: bool = False) -> dict[str, torch.Tensor]:
        """See `media.Media`."""
        keys = keys_in(ids[0].tolist())
        heard = self._spectrogram(keys[0]).to(self._model.device, self._model.dtype)
        if is_blank:
            heard = torch.full_like(heard, BLANK)
        return {"input_features": heard, "decoder_input_ids": ids.masked_fill(ids < 0, self.placeholders["audio"])}

    def _spectrogram(self, key: int) -> torch.Tensor:
        if (held := self._held.get(key)) is not None:
            return held  # type: ignore[no-any-return]
        part, folder = self._origins[key]
        sound = sounds.read_sound(content_of(part, folder), self._features.sampling_rate)
        if len(sound) > self._features.n_samples:
            seconds = len(sound) / self._features.sampling_rate
            problem = f"the recording has {seconds:.0f} s, and the base hears {self._features.chunk_length} s"
            raise MediaError("long_audio", problem, "cut it, with its transcript")
        made = self._features(sound, sampling_rate=self._features.sampling_rate, return_tensors="pt").input_features
        self._held.put(key, made, made.nbytes)
        return made  # type: ignore[no-any-return]


@torch.inference_mode()
def reply(
    model: Any, media: WhisperMedia, prompt: Sequence[int], stop: Sequence[int], most: int, chosen: Callable[..., Any]
) -> list[int]:
    """Token ids of one transcript by transformers' generation; Whisper's own would write the prompt anew."""
    given = media.inputs(torch.tensor([list(prompt)], device=model.device))
    said = model.generation_config
    settings = transformers.GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=list(stop), pad_token_id=stop[0],
        suppress_tokens=said.suppress_tokens, begin_suppress_tokens=said.begin_suppress_tokens,
        decoder_start_token_id=model.config.decoder_start_token_id,
    )  # fmt: skip
    made = transformers.GenerationMixin.generate(
        model, **given, generation_config=settings, logits_processor=transformers.LogitsProcessorList([chosen])
    )
    return [int(token) for token in made[0, len(prompt) :]]
