"""Examples with a system prompt, and the facts of training that are counted over them."""

from __future__ import annotations

from sartor.core.records import Example, Message, Origin
from sartor.evaluate.training_facts import TrainingFacts


def example(question: str, reply: str, split: str = "train", system: str = "Be brief.", **more: object) -> Example:
    messages = (Message.of("system", system), Message.of("user", question), Message.of("assistant", reply))
    return Example(messages, (Origin("f", "1"),), split=split, **more)  # type: ignore[arg-type]


def facts(*examples: Example) -> TrainingFacts:
    made = TrainingFacts()
    for one in examples:
        made.add(one)
    return made
