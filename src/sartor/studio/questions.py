"""Wrong replies that are followed to their training rows; files below `.studio/questions/ID/`.

Beside `question.json`, which holds the reply, what was asked of it and the jobs of its steps, the files are what the
commands read: `messages.json` (turns before the reply), `reply.txt`, `receipt.json` (of a team's reply), and
`correct.jsonl` (corrected replies of rows).
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sartor.core.filesystem import PRIVATE, make_private_folder, write_file_atomic
from sartor.serving.http.http_errors import NotFoundError

FILE, MESSAGES, REPLY, RECEIPT, CORRECTIONS = (
    "question.json",
    "messages.json",
    "reply.txt",
    "receipt.json",
    "correct.jsonl",
)
_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Question:
    """A reply whose cause is looked for.

    by: name of the user. agent: exact version that replied.
    target: absolute path of the Adapter or Release; empty for a team's reply, whose receipt names it.
    team: absolute path of the team's file; empty for an artefact that was served alone.
    prompt: text of the last question. is_first: whether nothing was said before it and nothing was attached to it, so
        that commands that take a prompt alone can repeat it.
    suspects: ids of training rows that a person has marked.
    jobs: id of the last job of each verb. proof, fix: absolute paths of what those commands write.
    """

    id: str
    by: str
    at: float
    agent: str
    prompt: str
    reply: str
    target: str = ""
    team: str = ""
    is_first: bool = True
    suspects: Sequence[str] = ()
    jobs: Mapping[str, str] = field(default_factory=dict)
    proof: str = ""
    fix: str = ""


class Questions:
    """The folder of questions of a studio."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(
        self, question: Question, messages: Sequence[Mapping[str, Any]], receipt: Mapping[str, Any] | None
    ) -> Question:
        """Write a new question and return it with its id."""
        question = replace(question, id=secrets.token_hex(8), at=time.time())
        make_private_folder(self._folder)
        make_private_folder(self.path(question.id))
        self.write(question.id, MESSAGES, json.dumps(list(messages), ensure_ascii=False))
        self.write(question.id, REPLY, question.reply)
        if receipt is not None:
            self.write(question.id, RECEIPT, json.dumps(dict(receipt), ensure_ascii=False))
        self.save(question)
        return question

    def path(self, question_id: str) -> Path:
        """Return the folder of a question. Raises NotFoundError for what is no id."""
        if not _ID.fullmatch(question_id):
            raise _unknown()
        return self._folder / question_id

    def write(self, question_id: str, name: str, text: str) -> Path:
        """Write a file of a question and return its path."""
        file = self.path(question_id) / name
        write_file_atomic(file, text.encode("utf-8", "replace"), mode=PRIVATE)
        return file

    def save(self, question: Question) -> None:
        """Write a question as it stands."""
        self.write(question.id, FILE, json.dumps(asdict(question), ensure_ascii=False))

    def open(self, question_id: str) -> Question:
        """Return a question. Raises NotFoundError for an unknown or damaged one."""
        try:
            return Question(**json.loads((self.path(question_id) / FILE).read_bytes()))
        except (OSError, ValueError, TypeError):
            raise _unknown() from None


def _unknown() -> NotFoundError:
    return NotFoundError("there is no such question", "ask again on the page Talk: Why did it say that?")
