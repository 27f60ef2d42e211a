"""Replies that are spoken beside their text: `modalities: ["text", "audio"]` of a chat."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sartor.agents.serve.replies import Answers
from sartor.agents.serve.speaker import Speaker
from sartor.media.speech.text_normalization import spoken
from sartor.media.speech.voice import Voice


@dataclass(frozen=True)
class Aloud:
    """Who speaks the replies, into which form of file."""

    speaker: Speaker
    voice: Voice
    form: str

    async def add(self, choices: Sequence[dict[str, Any]], opened: Answers) -> None:
        """Give each choice's message its `audio`. A reply without words, as a call of a tool, has none."""
        for choice, answer in zip(choices, opened.answers, strict=True):
            message = choice["message"]
            if not spoken(message["content"] or "").text:
                continue
            said = await self.speaker.say(message["content"], self.voice, self.form)
            message["audio"] = {
                "id": f"audio_{answer.receipt}",
                "data": base64.b64encode(said.sound).decode(),
                "transcript": said.text,
                "expires_at": int(time.time()),
            }
