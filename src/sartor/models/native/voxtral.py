"""A Voxtral: recordings of 30 s and their multiples, in Mistral's form.

transformers' processor prepares its recordings by mistral-common's tokenizer alone, which says of no token where it stands, and
refuses them beside a text. So here the tokenizer is made of the same `tekken.json`, and the processor writes what
mistral-common does; the chat template is mistral-common's own, or the one in the base's directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.mistral import convert_tekken_tokenizer

from sartor.core.errors import ModelError

TEKKEN = "tekken.json"
# Frames of the spectrogram for one token: the encoder's convolutions take two, the projector four of what is left
FRAMES = 8


class VoxtralProcessor(transformers.VoxtralProcessor):
    """Voxtral's processor, with recordings beside a text as other processors take them."""

    text_kwargs = {"padding": True}

    def __call__(self, text: Any = None, audio: Any = None, **options: Any) -> Any:
        """Tensors for texts and the recordings of their placeholders."""
        return transformers.ProcessorMixin.__call__(self, text=text, audio=audio, **options)

    def _process_audio(self, audio: Any, **options: Any) -> tuple[dict[str, Any], list[str]]:
        positions = int(options.pop("max_source_positions"))
        chunks = [self._retrieve_input_features([one], positions, **options) for one in audio]
        texts = [f"[BEGIN_AUDIO]{self.audio_token * (len(one) * positions // FRAMES)}" for one in chunks]
        return {"input_features": torch.cat(chunks)}, texts


def tokenizer(path: Path) -> Any:
    """The tokenizer in a base's `tekken.json`. Raises ModelError where there is no chat template and none can be made."""
    made = convert_tekken_tokenizer(str(path / TEKKEN))
    if made.chat_template is None:
        raise ModelError(
            f"mistral-common writes the chat template of {path}, and is not installed", "pip install mistral-common"
        )
    return made
