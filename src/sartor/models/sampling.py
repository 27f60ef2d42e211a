"""How the next token is chosen, as an option of a request, a Release and `ask`. No torch: the server's front has none."""

from __future__ import annotations

from dataclasses import dataclass

from sartor.core.errors import ConfigError

MOST_STOPS = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a reply ends.

    temperature: 0 is greedy. top_p: in (0, 1], keeps the smallest likely set. stop: texts before which a reply ends.
    frequency_penalty, presence_penalty: in [-2, 2], taken from a token's logit per time it was written, and once if it was
    (OpenAI's definition).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"max_tokens is {self.max_tokens}, temperature {self.temperature}, top_p {self.top_p}; "
                "they must be at least 1, not negative, and above 0 up to 1",
                "temperature: 0.7, top_p: 0.9",
            )
        if not (-2 <= self.frequency_penalty <= 2 and -2 <= self.presence_penalty <= 2):
            raise ConfigError(
                f"frequency_penalty is {self.frequency_penalty}, presence_penalty {self.presence_penalty}; both lie in -2..2",
                "frequency_penalty: 0",
            )
        object.__setattr__(self, "stop", tuple(self.stop))
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            raise ConfigError(
                f"stop holds {len(self.stop)} texts; at most {MOST_STOPS}, none of them empty", 'stop: ["\\n\\n"]'
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the same prompt gives the same reply on the same machine, whatever the seed."""
        return self.temperature == 0
