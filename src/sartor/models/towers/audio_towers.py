"""Whisper encoder as audio tower; transcription.

The encoder reads windows of 30 s. A longer recording is cut into windows. Of each window the features of its samples
are kept, and those of the padding silence are not. So T = ceil(samples / 320) per window: one feature for 20 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from sartor.core import model_refs
from sartor.core.errors import ModelError
from sartor.core.model_refs import TowerRef
from sartor.media.audio import read_sound
from sartor.models import whisper_conversion
from sartor.models.hardware import best_device
from sartor.models.loading import first_line, quiet_transformers
from sartor.models.towers.tower import WHOLE, Located, stored

F32 = NDArray[np.float32]
STRIDE = 2  # stride of the second convolution: spectrogram frames per feature


class WhisperTower(Located):
    """Audio tower: the encoder of a Whisper."""

    def __init__(self, ref: TowerRef, model: Any, prepare: Any) -> None:
        super().__init__(ref)
        self.encoder, self.prepare = model.model.encoder, prepare
        self.width = int(model.config.d_model)
        self.samples_per_feature = prepare.hop_length * STRIDE

    def features(self, content: bytes) -> Any:
        """Return the features (T, width) of an audio file, fp16 on the CPU."""
        return self.heard(read_sound(content, self.prepare.sampling_rate))

    @torch.inference_mode()
    def heard(self, sound: F32) -> Any:
        """Return the features (T, width), fp16, of samples at the model's sampling rate."""
        parts = []
        for window in windows(sound, self.prepare.n_samples):
            states = self.encoder(spectrogram(self.prepare, [window], self.encoder.conv1.weight)).last_hidden_state[0]
            # without the states (T, width) of the window's padding
            parts.append(stored(states[: -(-len(window) // self.samples_per_feature)]))
        return torch.cat(parts)


def windows(sound: F32, size: int) -> Iterator[F32]:
    """Yield the samples (N,) in pieces of `size`; the last may be shorter."""
    yield from (sound[start : start + size] for start in range(0, len(sound), size))


def spectrogram(prepare: Any, pieces: list[F32], like: Any) -> Any:
    """Return spectrograms (B, mels, frames of a whole window) of pieces of at most a window.

    They have the device and the dtype of `like`.
    """
    features = prepare(pieces, sampling_rate=prepare.sampling_rate, return_tensors="pt").input_features
    return features.to(like.device, like.dtype)


def open_model(ref: TowerRef, device: torch.device, notice: Callable[[str], object]) -> tuple[Any, Any]:
    """Return the Whisper of a ref in fp32, and its feature extractor.

    An asset is fetched and converted first, once. Raises ModelError.
    """
    if ref.is_asset:
        whisper_conversion.convert(ref, notice)
    options = {"pretrained_model_name_or_path": str(ref.path), "local_files_only": True}
    try:
        with quiet_transformers():
            model, info = transformers.WhisperForConditionalGeneration.from_pretrained(
                **options, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            prepare = transformers.WhisperFeatureExtractor.from_pretrained(**options)
    except Exception as error:  # truncated safetensors, another model's config: various exceptions
        raise ModelError(f"{ref.path} cannot be opened as a Whisper: {first_line(error)}", WHOLE) from None
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{ref.path} lacks {len(missing)} of the weights, the first is {missing[0]}", WHOLE)
    return model.eval().requires_grad_(False).to(device), prepare


def open_whisper(ref: TowerRef, device: torch.device, notice: Callable[[str], object]) -> WhisperTower:
    """Return the tower of a Whisper."""
    return WhisperTower(ref, *open_model(ref, device, notice))


BATCH = 8  # windows that are transcribed together
_START = "<|startoftranscript|>"


class SpeechToText:
    """Whisper in memory, for transcription. rate: sampling rate of its input, Hz."""

    def __init__(self, ref: model_refs.TowerRef, model: Any, prepare: Any, tokenizer: Any) -> None:
        self.name, self.digest, self.licence = ref.name, ref.digest, ref.licence
        self.rate = int(prepare.sampling_rate)
        self.model, self.prepare, self.tokenizer = model, prepare, tokenizer

    def transcribe(self, sounds: Sequence[NDArray[np.float32]], language: str = "") -> list[str]:
        """Return the text of each recording; empty for an empty one.

        sounds: samples of shape (N,) at `rate`. The texts of a long recording's windows are joined by spaces.
        language: for a multilingual Whisper, such as `de`; empty detects it for each window.
        """
        pieces = []
        for index, sound in enumerate(sounds):
            pieces += [(index, piece) for piece in windows(sound, self.prepare.n_samples)]
        texts: list[list[str]] = [[] for _ in sounds]
        for start in range(0, len(pieces), BATCH):
            batch = pieces[start : start + BATCH]
            batch_texts = self._transcribe_windows([piece for _, piece in batch], language)
            for (index, _), text in zip(batch, batch_texts, strict=True):
                if text.strip():
                    texts[index].append(text.strip())
        return [" ".join(window_texts) for window_texts in texts]

    @torch.inference_mode()
    def _transcribe_windows(self, pieces: list[NDArray[np.float32]], language: str) -> list[str]:
        """Return the text of each window of samples (N,)."""
        features = spectrogram(self.prepare, pieces, self.model.model.encoder.conv1.weight)
        is_multilingual = self.model.generation_config.is_multilingual
        options = {"language": language or None, "task": "transcribe"} if is_multilingual else {}
        with quiet_transformers():
            tokens = self.model.generate(features, do_sample=False, num_beams=1, **options)
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))


def open_speech_to_text(
    name: str, device: torch.device | None = None, notice: Callable[[str], object] = lambda line: None
) -> SpeechToText:
    """Return the Whisper that `name` denotes: an asset, a directory or a hub name. Raises as `open_tower`."""
    ref = model_refs.locate_tower(name, "audio")
    model, prepare = open_model(ref, device or best_device(), notice)
    try:
        tokenizer = transformers.WhisperTokenizer.from_pretrained(str(ref.path), local_files_only=True)
        if _START not in tokenizer.get_vocab():  # transformers makes an empty one where there is no file of it
            raise ValueError(f"it has no token {_START}")
    except Exception as error:  # tokenizers raises its own, undocumented exceptions
        raise ModelError(f"{ref.path} has no usable tokenizer: {first_line(error)}", WHOLE) from None
    return SpeechToText(ref, model, prepare, tokenizer)
