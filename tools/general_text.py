"""Sample asset:general-text, the rows on which `data.rehearsal` auto holds a model at its base.

    python tools/general_text.py --out general_text.jsonl [--rows 200] [--seed 0]

The starter base writes both sides of most: questions from its chat template alone, as Magpie does (Xu et al. 2024,
arXiv:2406.08464), and those of asset:small-talk for a third; then its replies, cut after their last whole sentence.
Rows with addresses, links or long numbers are left out. A fifth, in eleven languages other than English, were written
for Sartor (general_text_languages.tsv). Which texts they are hardly matters, since a run compares predictions on them
and learns none of their words; that they are of many kinds does.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from sartor.core.assets import install
from sartor.core.records import Message
from sartor.inference.engine import Sampling
from sartor.inference.generate import Generation, generate
from sartor.models.base import Base, open_base

QUESTION_TOKENS, REPLY_TOKENS = 48, 64
# Of the questions that are sampled this many are kept, about: those that end by themselves and have no address
KEPT_FRACTION = 0.5
_PRIVATE = re.compile(r"@|https?:|www\.|\d{4,}")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_MARK = "QUESTION"
LANGUAGES = Path(__file__).with_name("general_text_languages.tsv")


def sample(base: Base, prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> list[Generation]:
    """Return a reply to each prompt, by its token ids."""
    sampling = Sampling(tokens, temperature=0.9, seed=seed)
    return generate(base.model, prompts, stop=base.chat.stops, pad=base.chat.pad, sampling=sampling)


def questions(base: Base, count: int, seed: int) -> list[str]:
    """Return questions that the base asks, given the beginning of a user's turn."""
    text = base.chat.write([Message.of("user", _MARK)], reply_next=True)
    beginning = base.chat.tokens(text.partition(_MARK)[0])
    replies = sample(base, [beginning] * round(count / KEPT_FRACTION), QUESTION_TOKENS, seed)
    texts = dict.fromkeys(base.chat.decode(reply.ids).strip() for reply in replies if reply.finish == "stop")
    return [text for text in texts if len(text) > 10 and not _PRIVATE.search(text)][:count]


def small_talk() -> list[str]:
    """Return the questions of asset:small-talk."""
    [file] = Path(install("small-talk")).rglob("*.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines]


def _row(question: str, reply: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def rows(base: Base, count: int, seed: int) -> list[dict[str, object]]:
    """Return `count` rows of a question and the base's reply; fewer if the base writes too few whole sentences."""
    talk = small_talk()[:: 3 * 200 // count]
    asked = [*talk, *questions(base, 2 * count, seed)]
    prompts = [base.chat.prompt_ids([Message.of("user", question)]) for question in asked]
    result: list[dict[str, object]] = []
    for question, reply in zip(asked, sample(base, prompts, REPLY_TOKENS, seed + 1), strict=True):
        text = base.chat.decode(reply.ids).strip()
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        text = text[: ends[-1]] if ends else ""
        if len(text) > 20 and not _PRIVATE.search(text):
            result.append(_row(question, text))
    return result[:count]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines to write")
    parser.add_argument("--rows", type=int, default=200, help="rows to write")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    arguments = parser.parse_args()
    written = [line.split("\t") for line in LANGUAGES.read_text(encoding="utf-8").splitlines()]
    found = rows(open_base("starter", bits=32), arguments.rows - len(written), arguments.seed)
    found += [_row(question, reply) for question, reply in written]
    arguments.out.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in found), encoding="utf-8")
    print(f"{len(found)} rows in {arguments.out}")


if __name__ == "__main__":
    main()
