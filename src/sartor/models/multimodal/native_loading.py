"""Detects multimodal bases and opens their processors.

transformers' processor prepares its recordings by mistral-common's tokenizer alone, which says of no token where it
stands, and refuses them beside a text. So here the tokenizer is made of the same `tekken.json`, and the processor
writes what mistral-common does; the chat template is mistral-common's own, or the one in the base's directory.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.mistral import convert_tekken_tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from sartor.core.errors import ModelError
from sartor.core.installation import pip_command
from sartor.models.multimodal import native_loading

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
        chunks = [self._retrieve_input_features([item], positions, **options) for item in audio]
        texts = [f"[BEGIN_AUDIO]{self.audio_token * (len(chunk) * positions // FRAMES)}" for chunk in chunks]
        return {"input_features": torch.cat(chunks)}, texts


def tokenizer(path: Path) -> Any:
    """The tokenizer in a base's `tekken.json`. Raises ModelError where there is no chat template and none can be
    made.
    """
    result = convert_tekken_tokenizer(str(path / TEKKEN))
    if result.chat_template is None:
        raise ModelError(
            f"mistral-common writes the chat template of {path}, and is not installed",
            f"{pip_command()} install mistral-common",
        )
    return result


# What transformers needs for some of them, beside what Sartor installs
PACKAGES = {"smolvlm": "num2words", "gemma3n": "timm", "phi4_multimodal": "torchvision"}
_FILES = ("processor_config.json", "preprocessor_config.json")


def thinker(config: Any) -> Any:
    """Of an omni model the part that reads and writes text; any other config as it is."""
    return getattr(config, "thinker_config", config)


def is_whisper(config: Any) -> bool:
    """Whether it is a Whisper: the one model of an encoder and a decoder that is a base."""
    return isinstance(config, transformers.WhisperConfig)


def kind_of(path: Path, config: Any) -> Any:
    """The class of transformers that opens the base in `path`.

    Raises ModelError for a multi-modal one without a processor, and without a package that it needs.
    """
    if is_whisper(config):
        return transformers.WhisperForConditionalGeneration
    if not is_native(path, config):
        return transformers.AutoModelForCausalLM
    package = PACKAGES.get(config.model_type)
    if package and find_spec(package) is None:
        problem = (
            f"{path} is a {config.model_type} model, for which transformers needs {package}, and it is not installed"
        )
        raise ModelError(problem, f"{pip_command()} install {package}")
    return transformers.AutoModelForMultimodalLM


def is_native(path: Path, config: Any) -> bool:
    """Whether the base in `path` reads media by itself. Without a processor's files it is read as text, if it can
    be.
    """
    if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return False
    if any((path / name).is_file() for name in _FILES):
        return True
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    problem = f"{path} is a {config.model_type} model without a processor, so what it sees cannot be made ready"
    raise ModelError(problem, "save the processor beside it: AutoProcessor.from_pretrained(...).save_pretrained(...)")


def open_processor(path: Path, config: Any) -> Any:
    """The processor in a base's directory. Raises ModelError.

    Pictures are prepared by Pillow wherever there is a way by it: what a model sees then does not depend on what else
    is installed. A part that prepares videos is left out, since none are read.
    """
    try:
        kind = _kind(path, config)
        parts = [_part(path, config, name) for name in kind.get_attributes()]
        settings, unused = kind.get_processor_dict(str(path), local_files_only=True)
        return without_video(kind).from_args_and_dict(parts, settings, **unused)
    except ModelError:
        raise
    except ImportError as error:
        message = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the processor of {path} needs a package: {message}",
            f"{pip_command()} install PACKAGE, the one that this message names",
        ) from None
    except Exception as error:  # each part of a processor raises its own kinds
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ModelError(
            f"{path} has no usable processor: {message}",
            f"transformers.AutoProcessor.from_pretrained('OWNER/MODEL').save_pretrained({str(path)!r})",
        ) from None


def _kind(path: Path, config: Any) -> Any:
    """The class of a processor: ours; as its files name it (an omni model's thinker has none of its own); by the
    model's.
    """
    if replacement := _ours(config):
        return replacement.VoxtralProcessor
    for name in _FILES:
        if (path / name).is_file() and (class_name := json.loads((path / name).read_text()).get("processor_class")):
            return getattr(transformers, class_name)
    return PROCESSOR_MAPPING[type(config)]


def _ours(config: Any) -> Any:
    """The module here that has a processor and a tokenizer in place of transformers', or None."""
    return native_loading if isinstance(config, transformers.VoxtralConfig) else None


def _part(path: Path, config: Any, name: str) -> Any:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if "tokenizer" in name:
        if (replacement := _ours(config)) and (path / replacement.TEKKEN).is_file():
            return replacement.tokenizer(path)
        return transformers.AutoTokenizer.from_pretrained(str(path), mistral_format=False, **options)
    if name == "image_processor":
        return transformers.AutoImageProcessor.from_pretrained(str(path), backend="pil", **options)
    if name == "video_processor":
        return None
    return transformers.AutoFeatureExtractor.from_pretrained(str(path), **options)


def without_video(kind: Any) -> Any:
    """`kind` of processor, which takes None in the place of a part."""

    def check(self: Any, name: str, part: Any) -> Any:
        return None if part is None else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
