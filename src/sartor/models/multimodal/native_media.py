"""Media inputs and generation through the model's processor.

A placeholder of the processor becomes a virtual id (`models/media_tokens.py`). `embedded` returns what the model
itself puts in the positions of placeholders before its first layer, captured where it enters the decoder.

Some models do more with media: positions in two dimensions, bidirectional attention, features for deeper layers. For
them `inputs` converts a row back to the arguments of the model's own forward. `is_plain` measures which of the two is
right on the first prompt with the same kinds of media; `transformers_backend.matches_single_rows` uses it.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from sartor.core.errors import MediaError, ModelError, SourceError
from sartor.core.installation import pip_command
from sartor.core.records import Part
from sartor.media import audio, images
from sartor.models.media_tokens import PLACE_BITS, content_of, embedding_of, key_of, keys_in, virtual_ids

# Bytes of decoded media, and of embeddings, that are cached in memory; others are computed again
HELD_BYTES = 1 << 29
KINDS = ("image", "audio")
BLANK = 1e-6
# If a change of this many seconds at the end of a recording does not change the processor's output, it was cut. A
# shorter change may fall between frames
END_S = 0.05


class MediaTokens(list[int]):
    """Token ids of one media part.

    text: what the processor writes for it, placeholders with the text around them.
    """

    def __init__(self, ids: Sequence[int], text: str) -> None:
        super().__init__(ids)
        self.text = text


class BoundedCache:
    """Least-recently-used cache bounded by bytes; the newest entry is always kept."""

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._entries: OrderedDict[int, tuple[Any, int]] = OrderedDict()

    def get(self, key: int) -> Any:
        """Return the value of a key; None if it is not cached."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: int, value: Any, size: int) -> None:
        """Cache `value`, of `size` bytes."""
        self._entries[key] = (value, size)
        self._free_bytes -= size
        while self._free_bytes < 0 and len(self._entries) > 1:
            self._free_bytes += self._entries.popitem(last=False)[1][1]


class _Reached(Exception):
    """Signal that the decoder was reached: its input is known, and the rest need not be computed."""


class NativeMedia:
    """Implementation of `media_tokens.Media` by a multimodal model and its processor.

    deviations: by media kinds, difference in nats between embeddings and the model's own forward.
    """

    def __init__(self, processor: Any, model: Any) -> None:
        self._processor, self._model = processor, model
        self.tokens = {
            kind: str(token) for kind in KINDS if (token := getattr(processor, f"{kind}_token", None)) is not None
        }
        self.placeholders = {kind: self._placeholder(kind) for kind in self.tokens}
        self.deviations: dict[frozenset[str], float] = {}
        self._origins: dict[int, tuple[Part, Path | None]] = {}
        self._counts: dict[int, int] = {}
        self._decoded, self._embeddings = BoundedCache(HELD_BYTES), BoundedCache(HELD_BYTES)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Media kinds that the model reads."""
        return tuple(self.tokens)

    def tower_fields(self) -> dict[str, dict[str, Any]]:
        """Return no fields: the towers are part of the base."""
        return {}

    def ids(self, part: Part, folder: Path | None) -> MediaTokens:
        """Return the token ids of one media part. Raises MediaError for a recording that the processor would cut.

        Raises SourceError for a kind that the model does not read.
        """
        if part.kind not in self.tokens:
            raise SourceError(f"this base reads no {part.kind}", "use a base that does, or leave these rows out")
        content = content_of(part, folder)
        key = key_of(f"native:{part.kind}", hashlib.sha256(content).hexdigest())
        self._origins[key] = (part, folder)
        self._decode(key, content)
        model_inputs = self._process([key], None)
        if part.kind == "audio":
            self._check_heard(key, model_inputs)
        replacements = model_inputs.get("text_replacement_offsets")
        text = replacements[0][0]["replacement"] if replacements else self.tokens[part.kind]
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        placeholder = self.placeholders[part.kind]
        self._counts[key] = tokens.count(placeholder)
        if self._counts[key] != int((model_inputs["input_ids"] == placeholder).sum()):
            problem = f"the processor does not say what it writes for {part.kind} parts"
            raise ModelError(problem, f"{pip_command()} install -U transformers; or another base")
        virtual = iter(virtual_ids(key, self._counts[key]))
        return MediaTokens([next(virtual) if token == placeholder else token for token in tokens], text)

    def embedded(self, keys: Sequence[int]) -> list[torch.Tensor]:
        """Return the embeddings (T, D) of each key's tokens.

        Raises ModelError if the decoder of this model receives no embeddings.
        """
        is_fixed = self._is_fixed
        if not is_fixed:  # the modules may have changed when they are fixed again: by a merge
            self._embeddings = BoundedCache(HELD_BYTES)
        embeddings = {key: self._embeddings.get(key) if is_fixed else None for key in keys}
        if missing := [key for key, embedding in embeddings.items() if embedding is None]:
            ids: list[int] = []
            for key in missing:  # separated by a plain token: some models treat neighbours of a kind as one media
                ids += [self._between, *virtual_ids(key, self._counts[key])]
            with torch.set_grad_enabled(torch.is_grad_enabled() and not is_fixed):
                hidden = self._entering(torch.tensor([ids], device=self._model.device))
            virtual = torch.tensor([token < 0 for token in ids], device=hidden.device)
            parts = hidden[virtual].split([self._counts[key] for key in missing])
            for key, part in zip(missing, parts, strict=True):
                embeddings[key] = part
                if is_fixed:
                    with torch.inference_mode(False):  # inference tensors could not be used in training later
                        self._embeddings.put(key, part.clone(), part.nbytes)
        return [embeddings[key] for key in keys]

    def inputs(self, ids: torch.Tensor, *, is_blank: bool = False) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's own forward for one row of ids (1, T).

        is_blank: media are replaced by a constant: grey images, silence.
        """
        row = ids[0].tolist()
        keys = keys_in(row)
        if not keys:
            # an explicit mask, since transformers' generation would mask pad tokens wherever they are
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kinds = {key: self._origins[key][0].kind for key in keys}
        token_ids = [token if token >= 0 else self.placeholders[kinds[(-1 - token) >> PLACE_BITS]] for token in row]
        model_inputs = self._process(keys, token_ids)
        model_inputs.pop("text_replacement_offsets", None)
        dtype = self._model.get_output_embeddings().weight.dtype
        on_device = {}
        for name, tensor in model_inputs.items():
            if tensor.is_floating_point():
                # some models take an image of zeros for padding; masks hold the size of the media and stay
                is_emptied = is_blank and not name.endswith("mask")
                tensor = torch.full_like(tensor, BLANK, dtype=dtype) if is_emptied else tensor.to(dtype)
            on_device[name] = tensor.to(self._model.device)
        return on_device

    def kinds_of(self, keys: Sequence[int]) -> frozenset[str]:
        """Return the kinds of some media."""
        return frozenset(self._origins[key][0].kind for key in keys)

    @property
    def _tokenizer(self) -> Any:
        return self._processor.tokenizer

    @property
    def _is_fixed(self) -> bool:
        """True if embeddings never change.

        Nothing outside the decoder is trained, or has an adapter that may be on or off.
        """
        decoder = {id(module) for module in self._model.get_decoder().modules()}
        other_modules = [module for module in self._model.modules() if id(module) not in decoder]
        if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in other_modules):
            return False
        return not any(part.requires_grad for module in other_modules for part in module.parameters(recurse=False))

    @property
    def _between(self) -> int:
        return next(token for token in range(1, 9) if token not in self.placeholders.values())

    def _placeholder(self, kind: str) -> int:
        """Return the id that is repeated for each feature.

        It is not always that of the token that a template writes (Gemma 3). Raises ModelError unless there is exactly
        one.
        """
        config, processor = self._model.config, self._processor
        for token_id in (getattr(config, f"{kind}_token_id", None), getattr(config, f"{kind}_token_index", None)):
            if isinstance(token_id, int):
                return token_id
        token_ids = [token for token in getattr(processor, f"{kind}_token_ids") if token is not None]
        if len(token_ids) != 1:
            raise ModelError(
                f"the processor has {len(token_ids)} placeholders for {kind}, and one is expected",
                "base: a model of docs/multimodal.md, whose processor has one placeholder for each kind",
            )
        return int(token_ids[0])

    def _decode(self, key: int, content: bytes | None) -> Any:
        """Return the image, or the samples of a recording, of a key."""
        if (cached := self._decoded.get(key)) is not None:
            return cached
        part, folder = self._origins[key]
        content = content_of(part, folder) if content is None else content
        if part.kind == "image":
            image = images.open_image(content)
            self._decoded.put(key, image, image.width * image.height * 3)
            return image
        sound = audio.read_sound(content, self._rate)
        self._decoded.put(key, sound, sound.nbytes)
        return sound

    @property
    def _rate(self) -> int:
        names = [name for name in ("feature_extractor", "audio_processor") if name in self._processor.get_attributes()]
        return int(getattr(self._processor, names[0]).sampling_rate)

    def _check_heard(self, key: int, model_inputs: dict[str, Any]) -> None:
        """Raise MediaError if the processor's `model_inputs` do not depend on the end of a recording.

        Most processors cut at 30 s.
        """
        sound, rate = self._decode(key, None), self._rate
        altered = sound.copy()
        end = altered[-max(1, int(END_S * rate)) :]
        end[::2], end[1::2] = 0.5, -0.5
        altered_inputs = self._process([key], None, {key: altered})
        for name, tensor in model_inputs.items():
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            # a change of shape or of a value: the end was read
            if tensor.shape != altered_inputs[name].shape or not torch.equal(tensor, altered_inputs[name]):
                return
        problem = f"the recording has {len(sound) / rate:.1f} s, and the base's processor cuts it"
        raise MediaError(
            "long_audio",
            problem,
            "ffmpeg -i RECORDING -f segment -segment_time 30 PART%03d.flac, each with its part of the transcript",
        )

    def _process(
        self, keys: Sequence[int], ids: list[int] | None, replacements: Mapping[int, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Return the processor's tensors for media in order.

        ids: token ids that replace those of its text, if given. replacements: media to use instead of those of the
        keys.
        """
        kinds = [self._origins[key][0].kind for key in keys]
        processor = copy.copy(self._processor)
        processor.tokenizer = _FixedIdsTokenizer(self._tokenizer, ids)
        media: dict[str, list[Any]] = {"images": [], "audio": []}
        for key, kind in zip(keys, kinds, strict=True):
            media["images" if kind == "image" else kind].append(
                replacements[key] if key in replacements else self._decode(key, None)
            )
        text = "".join(self.tokens[kind] for kind in kinds)
        processor_kwargs: dict[str, Any] = {name: items for name, items in media.items() if items}
        if media["audio"]:
            processor_kwargs["sampling_rate"] = self._rate
        try:
            model_inputs = processor(
                text=[text], return_tensors="pt", return_text_replacement_offsets=True, **processor_kwargs
            )
        except (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError) as error:
            message = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            problem = f"the base's processor refuses it: {message}"
            raise MediaError(f"unreadable_{kinds[0]}", problem, "leave the row out, or scale the media") from None
        return dict(model_inputs)

    def _entering(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the input of the decoder, (T, D), for one row of ids (1, T). Raises ModelError if there is none."""
        embeddings: list[torch.Tensor] = []

        def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("inputs_embeds") is not None:
                embeddings.append(kwargs["inputs_embeds"][0])
            raise _Reached

        hook = self._model.get_decoder().register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self._model(**self.inputs(ids), use_cache=False)
        except _Reached:
            pass
        finally:
            hook.remove()
        if not embeddings:
            raise ModelError("this base's decoder is given no embeddings", "its rows are computed one at a time")
        return embeddings[0]


def is_native(model: Any) -> bool:
    """Return whether a model is a native multimodal base, with an adapter or without."""
    return native_media(model) is not None


def native_media(model: Any) -> NativeMedia | None:
    """Return the media reader of a native multimodal base; None for another model."""
    embedding = embedding_of(model)
    return embedding.media if embedding is not None and isinstance(embedding.media, NativeMedia) else None


class _FixedIdsTokenizer:
    """Tokenizer that returns the given ids for any text."""

    def __init__(self, tokenizer: Any, ids: list[int] | None) -> None:
        self._tokenizer, self._ids = tokenizer, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        options.pop("return_tensors", None)
        coded = self._tokenizer(text, **options)
        if self._ids is not None:
            coded["input_ids"], coded["attention_mask"] = [self._ids], [[1] * len(self._ids)]
            coded.pop("token_type_ids", None)
        return coded


# Largest difference in nats between the log-probabilities of the two computations: the maximum, and in 16 bits the
# root mean square. Both run one row through the same operations, so the bounds are tight: the effect of bidirectional
# attention can be smaller than the rounding of a pack
MOST_APART, MOST_SPREAD = 1e-3, 1e-2


@torch.inference_mode()
def is_plain(model: Any, media: NativeMedia, prompt: Sequence[int]) -> bool:
    """Return whether rows with such media may be computed with virtual ids, in batches and packs.

    `media.deviations` records the measured difference in nats.
    """
    kinds = media.kinds_of(keys_in(prompt))
    is_exact = model.get_output_embeddings().weight.dtype not in (torch.bfloat16, torch.float16)
    if kinds not in media.deviations:
        ids = torch.tensor([list(prompt)], device=model.device)
        reference = model(**media.inputs(ids), use_cache=False).logits[0].float().log_softmax(-1)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        try:
            outputs = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False
            )
            deviation = outputs.logits[0].float().log_softmax(-1) - reference
            media.deviations[kinds] = float(deviation.abs().max() if is_exact else deviation.pow(2).mean().sqrt())
        except Exception:  # each architecture raises its own exceptions, and each means "no"
            media.deviations[kinds] = math.inf
    return media.deviations[kinds] <= (MOST_APART if is_exact else MOST_SPREAD)


class ForcedToken(transformers.LogitsProcessor):
    """Logits processor that leaves only the token that `choose` returns for logits (1, V)."""

    def __init__(self, choose: Callable[[torch.Tensor], int]) -> None:
        self._choose = choose

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (1, V): 0 for the chosen token, -inf for the others."""
        forced = torch.full_like(scores, -torch.inf)
        forced[0, self._choose(scores)] = 0.0
        return forced


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
    """Return the token ids of one reply, at most `max_new_tokens`, with its stop token if it ends in one.

    model: without PEFT's wrapper. choose: returns the next token for logits of shape (1, V).
    """
    inputs = media.inputs(torch.tensor([list(prompt)], device=model.device))
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(stop), pad_token_id=pad
    )
    output_ids = model.generate(
        **inputs, generation_config=settings, logits_processor=transformers.LogitsProcessorList([ForcedToken(choose)])
    )
    return [int(token) for token in output_ids[0, inputs["input_ids"].shape[1] :]]
