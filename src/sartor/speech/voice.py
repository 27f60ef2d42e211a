"""What every voice is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from sartor.core.errors import ConfigError
from sartor.speech import pieces
from sartor.speech.sound import Sound, joined

MOST_CHARACTERS = 100_000


class Voice(ABC):
    """Who speaks. speeds: the slowest and the fastest; 1.0 is the voice's own. Safe to use from several threads.

    Equal text and speed are equal samples, on one machine.
    """

    name: str
    speeds: tuple[float, float]

    def say(self, text: str, speed: float = 1.0) -> Sound:
        """The text, spoken. Raises what `cut` and `speak` raise."""
        return joined([self.speak(piece, speed) for piece in self.cut(text, speed)])

    def cut(self, text: str, speed: float = 1.0) -> list[str]:
        """The text in pieces, each of which `speak` takes. Raises ConfigError for a text or a speed that it cannot say."""
        slowest, fastest = self.speeds
        if not slowest <= speed <= fastest:
            raise ConfigError(
                f"the voice {self.name!r} speaks at {slowest:g} to {fastest:g} times its speed, not {speed:g}",
                f"a speed from {slowest:g} to {fastest:g}, or another voice",
            )
        if len(text) > MOST_CHARACTERS:
            raise ConfigError(f"the text has {len(text):,} characters; the limit is {MOST_CHARACTERS:,}", "say it in parts")
        made = pieces.pieces(pieces.clean(text))
        if not made:
            raise ConfigError("nothing in the text can be said", "give a text with words in it")
        return made

    @abstractmethod
    def speak(self, piece: str, speed: float) -> Sound:
        """One piece of `cut`, spoken.

        Raises DeadlineError for a program that was killed since it took too long, UnavailableError for one that ended early.
        """

    def close(self) -> None:
        """End what the voice keeps running. It may speak again afterwards."""
        return
