"""Detection of multimodal bases, and their processors.

transformers' processor for Voxtral prepares its recordings by mistral-common's tokenizer alone, which gives no
character offsets, and refuses recordings beside a text. So here the tokenizer is built from the same `tekken.json`,
and the processor writes what mistral-common writes. The chat template is mistral-common's own, or the one in the
base's directory.
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
# Spectrogram frames per token: the encoder's convolutions combine two, the projector four of the result
FRAMES = 8


class VoxtralProcessor(transformers.VoxtralProcessor):
    """Voxtral's processor, which accepts recordings beside a text as other processors do."""

    text_kwargs = {"padding": True}

    def __call__(self, text: Any = None, audio: Any = None, **options: Any) -> Any:
        """Return tensors for texts and the recordings of their placeholders."""
        return transformers.ProcessorMixin.__call__(self, text=text, audio=audio, **options)

    def _process_audio(self, audio: Any, **options: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the spectrograms of recordings, and the text that replaces each placeholder."""
        positions = int(options.pop("max_source_positions"))
        chunks = [self._retrieve_input_features([item], positions, **options) for item in audio]
        texts = [f"[BEGIN_AUDIO]{self.audio_token * (len(chunk) * positions // FRAMES)}" for chunk in chunks]
        return {"input_features": torch.cat(chunks)}, texts


def tokenizer(path: Path) -> Any:
    """Return the tokenizer in a base's `tekken.json`.

    Raises ModelError if there is no chat template and none can be built.
    """
    result = convert_tekken_tokenizer(str(path / TEKKEN))
    if result.chat_template is None:
        raise ModelError(
            f"mistral-common writes the chat template of {path}, and is not installed",
            f"{pip_command()} install mistral-common",
        )
    return result


# Packages that transformers needs for some model types, beside those that Sartor installs
PACKAGES = {"smolvlm": "num2words", "gemma3n": "timm", "phi4_multimodal": "torchvision"}
_FILES = ("processor_config.json", "preprocessor_config.json")


def thinker(config: Any) -> Any:
    """Return an omni model's config of the part that reads and writes text; any other config unchanged."""
    return getattr(config, "thinker_config", config)


def is_whisper(config: Any) -> bool:
    """Return whether it is a Whisper, the only encoder-decoder model that can be a base."""
    return isinstance(config, transformers.WhisperConfig)


def kind_of(path: Path, config: Any) -> Any:
    """Return the class of transformers that opens the base in `path`.

    Raises ModelError for a multimodal one without a processor, or without a package that it needs.
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
    """Return whether the base in `path` reads media by itself.

    Without a processor's files it is read as a text model if possible, else ModelError is raised.
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
    """Return the processor in a base's directory. Raises ModelError.

    Images are prepared by Pillow wherever possible, so that a model's input does not depend on other installed
    packages. The part that prepares videos is left out, since none are read.
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
    except Exception as error:  # each part of a processor raises its own exceptions
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ModelError(
            f"{path} has no usable processor: {message}",
            f"transformers.AutoProcessor.from_pretrained('OWNER/MODEL').save_pretrained({str(path)!r})",
        ) from None


def _kind(path: Path, config: Any) -> Any:
    """Return the class of a processor.

    It is ours if there is one, else the one that its files name, else the one of the model type. (An omni model's
    thinker has none of its own.)
    """
    if replacement := _ours(config):
        return replacement.VoxtralProcessor
    for name in _FILES:
        if (path / name).is_file() and (class_name := json.loads((path / name).read_text()).get("processor_class")):
            return getattr(transformers, class_name)
    return PROCESSOR_MAPPING[type(config)]


def _ours(config: Any) -> Any:
    """Return the module here that replaces transformers' processor and tokenizer, or None."""
    return native_loading if isinstance(config, transformers.VoxtralConfig) else None


def _part(path: Path, config: Any, name: str) -> Any:
    """Return one part of a processor; None for the video processor."""
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
    """Return a subclass of the processor class `kind` that accepts None for a part."""

    def check(self: Any, name: str, part: Any) -> Any:
        """Skip the class check of a part that is None."""
        return None if part is None else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
