"""Reasons for which a device refuses a version.

Their text in the store is a word, a colon, and the detail.
"""

from __future__ import annotations

from enum import StrEnum


class HealthReason(StrEnum):
    """Reason for which a version is refused; the closed list that a device's report may state.

    OPENS to EVALUATION: the health check failed.
    STARTS: the trial was not confirmed.
    PERSON: a person rolled the version back.
    OTHER: a text that `text` did not write.
    """

    OPENS = "opens"
    TIME = "time"
    MEMORY = "memory"
    CRASH = "crash"
    CANARY = "canary"
    DEGENERATE = "degenerate"
    EVALUATION = "evaluation"
    STARTS = "starts"
    PERSON = "person"
    OTHER = "other"

    def text(self, detail: str) -> str:
        """Return the text that errors show and the store keeps."""
        return f"{self.value}: {detail}"

    @classmethod
    def parse(cls, text: str) -> HealthReason:
        """Return the reason of a text in the store; OTHER for one that `text` did not write."""
        try:
            return cls(text.partition(":")[0])
        except ValueError:
            return cls.OTHER
