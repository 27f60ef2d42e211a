"""Recordings -> what is said in them, by a Whisper: greedy, so that the same recording gives the same words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from sartor.core import model_refs
from sartor.core.errors import ModelError
from sartor.models.device import best_device
from sartor.models.loading import first_line, quiet
from sartor.models.towers import whisper
from sartor.models.towers.contract import WHOLE

BATCH = 8  # windows that are transcribed together
_START = "<|startoftranscript|>"


class SpeechToText:
    """A Whisper in memory. `rate`: of the samples that it hears."""

    def __init__(self, ref: model_refs.TowerRef, model: Any, prepare: Any, tokenizer: Any) -> None:
        self.name, self.digest, self.licence = ref.name, ref.digest, ref.licence
        self.rate = int(prepare.sampling_rate)
        self.model, self.prepare, self.tokenizer = model, prepare, tokenizer

    def transcribe(self, sounds: Sequence[NDArray[np.float32]], language: str = "") -> list[str]:
        """The words of each recording, windows of a long one joined by spaces; of an empty one none.

        `language`: for a Whisper of several, such as `de`; without it each window's is found out.
        """
        pieces = [(n, piece) for n, sound in enumerate(sounds) for piece in whisper.windows(sound, self.prepare.n_samples)]
        texts: list[list[str]] = [[] for _ in sounds]
        for at in range(0, len(pieces), BATCH):
            batch = pieces[at : at + BATCH]
            for (n, _), text in zip(batch, self._said([piece for _, piece in batch], language), strict=True):
                texts[n].append(text.strip())
        return [" ".join(text for text in said if text) for said in texts]

    @torch.inference_mode()
    def _said(self, pieces: list[NDArray[np.float32]], language: str) -> list[str]:
        heard = whisper.spectrogram(self.prepare, pieces, self.model.model.encoder.conv1.weight)
        several = self.model.generation_config.is_multilingual
        how = {"language": language or None, "task": "transcribe"} if several else {}
        with quiet():
            tokens = self.model.generate(heard, do_sample=False, num_beams=1, **how)
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))


def open_speech_to_text(
    name: str, device: torch.device | None = None, notice: Callable[[str], object] = lambda line: None
) -> SpeechToText:
    """The Whisper that `name` means: an asset, a directory or a hub name. Raises as `open_tower`."""
    ref = model_refs.locate_tower(name, "audio")
    model, prepare = whisper.open_model(ref, device or best_device(), notice)
    try:
        tokenizer = transformers.WhisperTokenizer.from_pretrained(str(ref.path), local_files_only=True)
        if _START not in tokenizer.get_vocab():  # transformers makes an empty one where there is no file of it
            raise ValueError(f"it has no token {_START}")
    except Exception as error:  # tokenizers raises its own, undocumented kinds
        raise ModelError(f"{ref.path} has no usable tokenizer: {first_line(error)}", WHOLE) from None
    return SpeechToText(ref, model, prepare, tokenizer)
