"""Tiny tokenizers with control tokens as the published ones have them, and templates of their families. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sartor.models.chat import ChatTokenizer

_WORDS = (
    "the sky is blue what colour system user assistant tool call think name arguments model im start end INST it on"
)
WORDS = _WORDS.split()
# Qwen's, cut to what matters: tools, calls, results, and reasoning that it looks for in the content as well
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}"
    "{% endif %}# Tools\n\n<tools>{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{% elif m.role == 'assistant' %}{% set said = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}{% if thought %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{% if loop.index0 or said %}{{ '\\n' }}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
    "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + (tools | tojson(indent=4)) "
    "+ '<|eot_id|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' }}"
    "{% if m.tool_calls %}{{ '<|python_tag|>' }}{% for call in m.tool_calls %}"
    "{{ '{\"name\": \"' + call.function.name + '\", \"parameters\": ' + (call.function.arguments | tojson) + '}' }}{% endfor %}"
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ m.content | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "<s>{% if tools %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    '{% elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}{{ \'{"name": "\' + call.function.name '
    "+ '\", \"arguments\": ' + (call.function.arguments | tojson) + '}' }}{% endfor %}]</s>"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|image_pad|>")
QWEN_WORDS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
GEMMA_TOKENS, GEMMA_WORDS = (
    ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    ("\n\n", "▁▁", "<table>", "</table>", "<unused7>"),
)
MISTRAL_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
MISTRAL_MORE = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)


def _bpe(alphabet: Sequence[str], words: Sequence[str], **options: Any) -> Any:
    """A BPE whose merges spell these words from the left."""
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(alphabet))}
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(1, len(word)):
            merges.setdefault((word[:end], word[end]))
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    return models.BPE(vocabulary, list(merges), **options)


def byte_level(*, prefix_space: bool = False, words: Sequence[str] = ()) -> Any:
    """GPT-2's, Llama 3's and Qwen's."""
    spelt = [*words, *WORDS, *(f"Ġ{word}" for word in WORDS), "ĊĊ", "ĠĠ"]
    made = Tokenizer(_bpe(sorted(pre_tokenizers.ByteLevel.alphabet()), spelt))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not words)
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(**options: Any) -> Any:
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet += ["▁", *(chr(code) for code in range(33, 127)), "é", "ß"]
    made = Tokenizer(
        _bpe(alphabet, [*WORDS, *(f"▁{word}" for word in WORDS)], byte_fallback=True, fuse_unk=False, **options)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps)
    return made


def metaspace() -> Any:
    """Mistral's of today: a word mark goes before the text."""
    made = _sentencepiece()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def prepending() -> Any:
    """Llama 2's and the first Mistral's: a word mark goes before the text, and behind each control token."""
    made = _sentencepiece()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def gemma_like() -> Any:
    """Gemma's: spaces are word marks, none is put before."""
    made = _sentencepiece()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return made


def composing() -> Any:
    """As Qwen's, with a normalizer that makes plain letters of full-width ones, before added words are looked for."""
    made = byte_level()
    made.normalizer = normalizers.NFKC()
    return made


@dataclass(frozen=True)
class Family:
    """A tokenizer, its template, its control tokens, and added words that are not special."""

    make: Callable[[], Any]
    template: str | None
    special: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    eos: str = "<|im_end|>"
    # what the tokenizer matches after it has normalised the text
    normalized: bool = False
    takes_system: bool = True
    takes_tools: bool = True

    @cache
    def chat(self) -> ChatTokenizer:
        return ChatTokenizer(self.tokenizer())

    def tokenizer(self) -> Any:
        fast = PreTrainedTokenizerFast(tokenizer_object=self.make(), eos_token=self.eos, pad_token="<|pad|>")
        fast.add_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self.special], special_tokens=True
        )
        fast.add_tokens([AddedToken(word, special=False, normalized=self.normalized) for word in self.words])
        fast.chat_template = self.template
        return fast


MISTRAL_ALL = (*MISTRAL_TOKENS, *MISTRAL_MORE)
FAMILIES = {
    "chatml, byte level": Family(byte_level, CHATML, QWEN_TOKENS, QWEN_WORDS),
    "chatml, a space put first": Family(lambda: byte_level(prefix_space=True), CHATML, QWEN_TOKENS, QWEN_WORDS),
    "chatml, words normalised": Family(composing, CHATML, QWEN_TOKENS, QWEN_WORDS, normalized=True),
    "chatml, words of the vocabulary": Family(lambda: byte_level(words=QWEN_WORDS), CHATML, QWEN_TOKENS),
    "chatml without tools": Family(byte_level, PLAIN_CHATML, QWEN_TOKENS, QWEN_WORDS, takes_tools=False),
    "llama 3": Family(byte_level, LLAMA_3, LLAMA_TOKENS, eos="<|eot_id|>"),
    "gemma": Family(
        gemma_like, GEMMA, GEMMA_TOKENS, GEMMA_WORDS, eos="<end_of_turn>", takes_system=False, takes_tools=False
    ),
    "mistral, word mark first": Family(metaspace, MISTRAL, MISTRAL_ALL, eos="</s>"),
    "mistral, word marks put before": Family(prepending, MISTRAL, MISTRAL_ALL, eos="</s>"),
    "mistral, byte level": Family(byte_level, MISTRAL, MISTRAL_ALL, eos="</s>"),
    "llama 2, roles in plain text": Family(
        prepending, LLAMA_2, ("<s>", "</s>"), eos="</s>", takes_system=False, takes_tools=False
    ),
    "no template": Family(byte_level, None, ("<|endoftext|>",), eos="<|endoftext|>", takes_tools=False),
}
