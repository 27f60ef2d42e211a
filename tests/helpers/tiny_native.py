"""Tiny native multi-modal bases: random weights of the real classes, with real processors over a tokenizer made here."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from PIL import Image
from transformers.integrations.mistral import convert_tekken_tokenizer

import tiny
from sartor.core.records import Example, Message, Part
from sartor.media.audio import read_sound
from sartor.media.images import open_image
from sartor.models.media_tokens import content_of
from sartor.models.multimodal.native_loading import without_video

# The form of published templates: content is a text or a list of parts
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'audio' %}AUDIO{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.2,
}


def tokenizer(*special: str, image: str = "", audio: str = "", **named: str) -> Any:
    """The tiny tokenizer with placeholders. named: tokens that a processor looks for on it (`boi_token`)."""
    plain = tiny.tokenizer()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token="<|endoftext|>",
        extra_special_tokens=list(special),
        model_specific_special_tokens=named,
    )
    made.chat_template = TEMPLATE.replace("IMAGE", image).replace("AUDIO", audio)
    return made


def llava() -> tuple[Any, Any]:
    coded = tokenizer("<image>", image="<image>\n")
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=coded.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        pictures,
        coded,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=coded.chat_template,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    coded = tokenizer("<image>", image="<image>\n")
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaNextConfig(
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=coded.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=pinpoints,
    )
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        pictures,
        coded,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=coded.chat_template,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    coded = tokenizer("<image>", "<video>", image="<image>\n")
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        image_token_index=coded.convert_tokens_to_ids("<image>"),
        video_token_index=coded.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    pictures = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    processor = without_video(transformers.LlavaOnevisionProcessor)(
        pictures, coded, num_image_tokens=4, vision_feature_select_strategy="full", chat_template=coded.chat_template
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    coded = tokenizer("<video>", image="<IMG_CONTEXT>\n", **named, video_token="<video>")
    vision = {**VISION, "image_size": [28, 28], "patch_size": [7, 7]}
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=transformers.InternVLVisionConfig(**vision),
        image_token_id=coded.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    pictures = transformers.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=False)
    processor = without_video(transformers.InternVLProcessor)(
        pictures, coded, image_seq_length=4, chat_template=coded.chat_template
    )
    return transformers.InternVLForConditionalGeneration(config), processor


_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 7,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "initializer_range": 0.2,
}
_QWEN_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _qwen_pictures() -> Any:
    return transformers.Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 56 * 56}
    )


def qwen2_5_vl() -> tuple[Any, Any]:
    coded = tokenizer(*_QWEN, image="<|vision_start|><|image_pad|><|vision_end|>")
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": _QWEN_ROPE},
        vision_config={**_QWEN_VISION, "window_size": 28, "fullatt_block_indexes": [1]},
        **_qwen_ids(coded),
    )
    processor = without_video(transformers.Qwen2_5_VLProcessor)(
        _qwen_pictures(), coded, chat_template=coded.chat_template
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    coded = tokenizer(*_QWEN, image="<|vision_start|><|image_pad|><|vision_end|>")
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": {**_QWEN_ROPE, "mrope_interleaved": True}},
        vision_config={**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_qwen_ids(coded),
    )
    processor = without_video(transformers.Qwen3VLProcessor)(
        _qwen_pictures(), coded, chat_template=coded.chat_template
    )
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def _qwen_ids(coded: Any) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, coded.convert_tokens_to_ids(list(_QWEN)), strict=True))


def idefics3() -> tuple[Any, Any]:  # and the first SmolVLM, which is of this class
    coded = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", image="<image>")
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config={**VISION, "patch_size": 7},
        image_token_id=coded.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    pictures = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = transformers.Idefics3Processor(pictures, coded, image_seq_len=4, chat_template=coded.chat_template)
    return transformers.Idefics3ForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    coded = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", image="<image>")
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config={**VISION, "patch_size": 7},
        image_token_id=coded.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    pictures = transformers.SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = without_video(transformers.SmolVLMProcessor)(
        pictures, coded, None, image_seq_len=4, chat_template=coded.chat_template
    )
    return transformers.SmolVLMForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    named = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    coded = tokenizer(image="<start_of_image>", **named)
    text = {**TEXT, "tie_word_embeddings": True, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**VISION, "patch_size": 7},
        mm_tokens_per_image=4,
        boi_token_index=coded.boi_token_id,
        eoi_token_index=coded.eoi_token_id,
        image_token_index=coded.image_token_id,
    )
    pictures = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = transformers.Gemma3Processor(pictures, coded, image_seq_length=4, chat_template=coded.chat_template)
    return transformers.Gemma3ForConditionalGeneration(config), processor


def gemma3n() -> tuple[Any, Any]:
    named = {
        "boi_token": "<start_of_image>",
        "boa_token": "<start_of_audio>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "eoa_token": "<end_of_audio>",
        "audio_token": "<audio_soft_token>",
    }
    coded = tokenizer(image="<image_soft_token>", audio="<audio_soft_token>", **named)
    begins = {
        "vision": coded.eoi_token_id,
        "audio": coded.eoa_token_id,
    }  # ids from which on another embedding has them
    text = {
        **TEXT,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "tie_word_embeddings": True,
        "head_dim": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": begins["vision"],
    }
    config = transformers.Gemma3nConfig(
        text_config=text,
        vision_config={
            "architecture": "mobilenetv5_base",
            "model_args": {"channel_multiplier": 0.01, "msfa_output_resolution": 2},
            "vocab_offset": begins["vision"],
            "vocab_size": begins["audio"] - begins["vision"],
        },
        audio_config={
            "input_feat_size": 16,
            "hidden_size": 32,
            "conf_num_attention_heads": 4,
            "conf_num_hidden_layers": 2,
            "sscp_conv_channel_size": [8, 4],
            "vocab_offset": begins["audio"],
            "vocab_size": TEXT["vocab_size"] - begins["audio"],
        },
        vision_soft_tokens_per_image=4,
        audio_soft_tokens_per_image=12,
        boi_token_id=coded.boi_token_id,
        eoi_token_id=coded.eoi_token_id,
        image_token_id=coded.image_token_id,
        boa_token_id=coded.boa_token_id,
        eoa_token_id=coded.eoa_token_id,
        audio_token_id=coded.audio_token_id,
        initializer_range=0.2,
    )
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(feature_size=16),
        transformers.SiglipImageProcessorPil(size={"height": 64, "width": 64}),
        coded,
        audio_seq_length=12,
        image_seq_length=4,
        chat_template=coded.chat_template,
    )
    return transformers.Gemma3nForConditionalGeneration(config), processor


def phi4_multimodal() -> tuple[Any, Any]:
    coded = tokenizer(image="<|image|>", audio="<|audio|>", image_token="<|image|>", audio_token="<|audio|>")
    config = transformers.Phi4MultimodalConfig(
        **TEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        vision_config={  # a picture has 273 tokens and more: its processor counts with 448 and 14 whatever it is given
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_token_id": coded.image_token_id,
        },
        audio_config={
            "input_size": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_blocks": 2,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
            "initializer_range": 0.2,
            "audio_token_id": coded.audio_token_id,
        },
    )
    processor = transformers.Phi4MultimodalProcessor(
        transformers.Phi4MultimodalImageProcessor(),
        transformers.Phi4MultimodalFeatureExtractor(feature_size=16),
        coded,
        chat_template=coded.chat_template,
    )
    return transformers.Phi4MultimodalForCausalLM(config), processor


def mllama() -> tuple[Any, Any]:
    coded = tokenizer("<|image|>", "<|python_tag|>", image="<|image|>")
    coded.chat_template = "{{ bos_token }}" + coded.chat_template  # which its processor would add
    config = transformers.MllamaConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 64,
            "vision_output_dim": 64,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "initializer_range": 0.2,
        },
        image_token_index=coded.convert_tokens_to_ids("<|image|>"),
    )
    pictures = transformers.MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=2)
    model = transformers.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):  # at 0 what is seen would not reach the text
            torch.nn.init.constant_(parameter, 0.7)
    return model, transformers.MllamaProcessor(pictures, coded, chat_template=coded.chat_template)


def _ears() -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2)


def qwen2_audio() -> tuple[Any, Any]:
    named = {"audio_bos_token": "<|audio_bos|>", "audio_token": "<|AUDIO|>", "audio_eos_token": "<|audio_eos|>"}
    coded = tokenizer(audio="<|audio_bos|><|AUDIO|><|audio_eos|>\n", **named)
    config = transformers.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **TEXT},
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "max_source_positions": 100,
            "initializer_range": 0.2,
        },
        audio_token_index=coded.audio_token_id,
    )
    processor = transformers.Qwen2AudioProcessor(_ears(), coded, chat_template=coded.chat_template)
    return transformers.Qwen2AudioForConditionalGeneration(config), processor


def qwen2_5_omni() -> tuple[Any, Any]:
    named = {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    image, audio = "<|vision_bos|><|IMAGE|><|vision_eos|>", "<|audio_bos|><|AUDIO|><|audio_eos|>"
    coded = tokenizer(image=image, audio=audio, **named)
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": _QWEN_ROPE},
        vision_config={**_QWEN_VISION, "window_size": 28, "fullatt_block_indexes": [1]},
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "max_source_positions": 100,
            "n_window": 50,
            "output_dim": 32,
            "initializer_range": 0.2,
        },
        image_token_index=coded.image_token_id,
        audio_token_index=coded.audio_token_id,
        video_token_index=coded.video_token_id,
        audio_start_token_id=coded.audio_bos_token_id,
        audio_end_token_id=coded.audio_eos_token_id,
        vision_start_token_id=coded.vision_bos_token_id,
        vision_end_token_id=coded.vision_eos_token_id,
        initializer_range=0.2,
    )
    kind = without_video(transformers.Qwen2_5OmniProcessor)
    processor = kind(_qwen_pictures(), None, _ears(), coded, chat_template=coded.chat_template)
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config), processor


# The published ids of what Mistral's form has: its processor takes 24 for a recording's features
_MISTRAL = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
    24: "[AUDIO]",
    25: "[BEGIN_AUDIO]",
    34: "[TRANSCRIBE]",
}
# As much of mistral-common's template as the contract takes; recordings have OpenAI's word there
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST]"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'input_audio' %}[AUDIO]"
    "{% else %}{{ raise_exception('only text and input_audio') }}{% endif %}{% endfor %}{% endif %}[/INST]"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def write_tekken(folder: Path) -> Path:
    """A tokenizer in Mistral's own file: a token for each byte."""
    special = [_MISTRAL.get(rank, f"<SPECIAL_{rank}>") for rank in range(40)]
    said = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": 256,
            "default_vocab_size": 256 + len(special),
            "default_num_special_tokens": len(special),
            "version": "v7",
        },
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
            for byte in range(256)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)
        ],
        "audio": {
            "sampling_rate": 16000,
            "frame_rate": 12.5,
            "chunk_length_s": 30.0,
            "audio_encoding_config": {"num_mel_bins": 16, "hop_length": 160, "window_size": 400},
        },
    }
    (folder / "tekken.json").write_text(json.dumps(said))
    return folder / "tekken.json"


def voxtral() -> tuple[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        coded = convert_tekken_tokenizer(str(write_tekken(Path(folder))), MISTRAL_TEMPLATE)
    config = transformers.VoxtralConfig(
        text_config={"model_type": "llama", **TEXT, "head_dim": 8},
        audio_config={
            "num_mel_bins": 16,
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.2,
        },
        audio_token_id=24,
    )
    ears = transformers.WhisperFeatureExtractor(feature_size=16)
    return transformers.VoxtralForConditionalGeneration(config), transformers.VoxtralProcessor(ears, coded)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    made.__name__: made
    for made in (
        llava,
        llava_next,
        llava_onevision,
        internvl,
        qwen2_5_vl,
        qwen3_vl,
        idefics3,
        smolvlm,
        gemma3,
        gemma3n,
        phi4_multimodal,
        mllama,
        qwen2_audio,
        qwen2_5_omni,
        voxtral,
    )
}
# What a template calls parts of a kind, where that is not the kind
NAMED = {"voxtral": {"audio": "input_audio"}}


def write(name: str, folder: Path) -> Path:
    """One of MODELS as a directory in transformers' layout."""
    torch.manual_seed(0)
    model, processor = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # a projection that begins at 0 would hide what is seen
                parameter.normal_(0, 0.2)
    model.eval().save_pretrained(str(folder))
    # not `save_pretrained`, which wants the part for videos too; that needs torchvision
    said = {key: value for key, value in processor.to_dict().items() if value is not None}
    (folder / "processor_config.json").write_text(json.dumps(said))
    if name == "voxtral":  # which is published without a tokenizer.json
        write_tekken(folder)
        (folder / "chat_template.jinja").write_text(MISTRAL_TEMPLATE)
    else:
        processor.tokenizer.save_pretrained(str(folder))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return folder


def picture(seed: int, width: int = 40, height: int = 28) -> bytes:
    """A PNG of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def sound(seed: int, seconds: float = 0.6) -> bytes:
    """A WAV of noise at 16 kHz."""
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).normal(0, 0.1, int(16000 * seconds)), 16000, format="WAV")
    return file.getvalue()


def part(kind: str, seed: int, **how: Any) -> Part:
    content = picture(seed, **how) if kind == "image" else sound(seed, **how)
    name = "image/png" if kind == "image" else "audio/wav"
    return Part(kind, media=f"data:{name};base64," + base64.b64encode(content).decode())  # type: ignore[arg-type]


def image_of(one: Part) -> Any:
    return open_image(content_of(one, None))


def samples_of(one: Part) -> Any:
    return read_sound(content_of(one, None), 16000)


def row(*parts: Part | str, reply: str = "the sky is blue") -> Example:
    content = tuple(Part("text", one) if isinstance(one, str) else one for one in parts)
    return Example((Message("user", content), Message.of("assistant", reply)), ())
