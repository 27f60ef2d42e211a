"""Home-assistant-intents templates as training rows.

The asset `home-intents` holds templates such as `<turn> on [<the>] {area} fan[s]`. Each is expanded at random along
`hassil`'s own parse of it, so the slots of a sentence are known by construction. The template is the row's `group`: a
held-out row has a wording that tuning never saw.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.core import assets
from sartor.core.errors import missing_package

SYSTEM_PROMPT = "Command to JSON."
# Some intents have a hundred sentences in the asset's grammar, most have under ten; with a few each, the demo's rows
# show every sentence in several wordings (docs/decisions/003-demo-rows.md).
SENTENCES_PER_INTENT = 3
# Names of devices. The asset leaves names, areas and free text to the installation. A name belongs to a domain, so a
# template that needs a lock gets a lock. No name contains the word of an area or of a kind of device: "the porch
# light" may be a light of that name or the light of the porch, and the text does not say which.
NAMES = {
    "light": ("chandelier", "spotlight", "lantern", "candelabra"),
    "switch": ("coffee maker", "kettle", "water pump", "christmas tree"),
    "fan": ("breeze", "cyclone", "tornado"),
    "cover": ("skylight", "pergola", "sunroof"),
    "lock": ("deadbolt", "safe", "mailbox"),
    "valve": ("main valve", "sprinkler"),
    "climate": ("thermostat", "heat pump"),
    "media_player": ("radio", "jukebox", "soundbar"),
    "binary_sensor": ("smoke alarm", "motion sensor", "leak sensor"),
    "sensor": ("thermometer", "power meter"),
    "person": ("Alice", "Bob", "Carla"),
    "weather": ("Berlin", "Zaragoza", "Oslo"),
    "lawn_mower": ("Shaun", "Dolly"),
    "vacuum": ("Dusty", "Rosie"),
    "todo": ("chores", "homework", "errands"),
    "scene": ("movie night", "sunrise", "party time"),
    "button": ("doorbell", "reset"),
    "script": ("good night", "leave home"),
}
AREAS = (
    "attic",
    "basement",
    "bathroom",
    "bedroom",
    "dining room",
    "garage",
    "garden",
    "guest room",
    "hallway",
    "kitchen",
    "living room",
    "office",
    "patio",
    "nursery",
)
FLOORS = ("upstairs", "downstairs", "top level", "ground level")
WILDCARDS = {
    "message": ("dinner is ready", "the taxi is here", "time to go to bed"),
    "search_query": ("abbey road", "the beatles", "jazz", "morning news"),
    "zone": ("work", "school", "gym"),
    "timer_name": ("pizza", "laundry", "tea", "pasta"),
    "timer_command": ("open the garage door", "turn off the lights", "lock the front door"),
    "shopping_list_item": ("apples", "bread", "milk", "oat flakes"),
    "todo_list_item": ("buy stamps", "call the plumber", "water the plants"),
}


# Number of rows of general talk in the demo (from the asset `small-talk`, without the system prompt above). A model
# that saw nothing but commands answers a greeting in JSON; these rows show it that the system prompt makes the
# difference.
REHEARSAL_ROWS = 24


def rehearsal_rows(count: int = REHEARSAL_ROWS) -> list[dict[str, Any]]:
    """Return the first `count` of the asset `small-talk`'s 200 rows of general talk, in the OpenAI form.

    None of them is in the forgetting probe.
    """
    lines = (assets.install("small-talk") / "small_talk.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


@dataclass
class Walk:
    """Random expansion of a template.

    slots: the slot values that the words filled.
    """

    rng: random.Random
    lists: dict[str, Any]
    rules: dict[str, Any]
    slots: dict[str, Any] = field(default_factory=dict)

    def words(self, node: Any) -> tuple[str, str]:
        """Return the spoken text of a node of hassil's parse tree, and the same with slots left open.

        An open slot is written as `{slot}`.
        """
        kind = type(node).__name__
        if kind == "TextChunk":
            return node.original_text, node.original_text
        if kind == "Alternative":
            return self.words(self.rng.choice(node.items))
        if kind == "RuleReference":
            return self.words(self.rules[node.rule_name].expression)
        if kind == "ListReference":
            spoken, self.slots[node.slot_name] = self.value(node.list_name)
            return spoken, f"{{{node.slot_name}}}"
        items = self.rng.sample(node.items, len(node.items)) if kind == "Permutation" else node.items
        pairs = [self.words(item) for item in items]
        return "".join(spoken for spoken, _ in pairs), "".join(wording for _, wording in pairs)

    def value(self, list_name: str) -> tuple[str, Any]:
        """Return spoken words and slot value, drawn from a list."""
        values = self.lists[list_name]
        kind = type(values).__name__
        if kind == "WildcardSlotList":
            word = self.rng.choice(WILDCARDS[list_name])
            return word, word
        if kind == "RangeSlotList":
            number = self.rng.randrange(values.start, values.stop + 1, values.step)
            # the asset's own recogniser turns "down by 10" into -10 by `multiplier`
            return str(number), int(number * (values.multiplier or 1))
        chosen = self.rng.choice(values.values)
        return self.words(chosen.text_in)[0], chosen.value_out


def rows(asset: Path, *, per_intent: int = 30, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows in the OpenAI form, up to `per_intent` wordings of each of the asset's English intents.

    Each row has `messages` (system, user, assistant) and `group`, the template: the wording with its slots left open,
    as in `turn on the {area} fan`. No template is drawn twice. An intent gives at most SENTENCES_PER_INTENT sentences
    of its grammar. One with fewer than `per_intent` wordings is left out: there would be nothing to learn its held-out
    wordings from. The order is shuffled by `seed`, so any first `n` rows are a fair sample. Raises ExtraError without
    `hassil`.
    """
    try:
        from hassil.intents import Intents, TextSlotList
    except ImportError:
        raise missing_package("hassil", "demo") from None
    data = json.loads((asset / "home_assistant_intents/data/en.json").read_text(encoding="utf-8"))
    intents = Intents.from_dict(data)
    lists = {
        **intents.slot_lists,
        "area": TextSlotList.from_strings(AREAS),
        "floor": TextSlotList.from_strings(FLOORS),
    }
    rng = random.Random(seed)
    drawn: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for intent_name, intent in intents.intents.items():
        sentences = [(block, sentence) for block in intent.data for sentence in block.sentences]
        rng.shuffle(sentences)
        sentences = sentences[:SENTENCES_PER_INTENT]
        results: dict[str, dict[str, Any]] = {}
        # cycle through the sentences; the bound ends the loop for an intent that has no more wordings
        for block, sentence in itertools.islice(itertools.cycle(sentences), 8 * per_intent):
            names = [name for domain in block.requires_context.get("domain", []) for name in NAMES.get(domain, ())]
            local = {**lists, **block.slot_lists, "name": TextSlotList.from_strings(names)}
            walk = Walk(rng, local, {**intents.expansion_rules, **block.expansion_rules})
            spoken, template = (" ".join(text.split()) for text in walk.words(sentence.expression))
            if template not in seen:
                slots = dict(sorted({**block.slots, **walk.slots}.items()))
                results[template] = _row(spoken, template, {"intent": intent_name, **slots})
                seen.add(template)
            if len(results) == per_intent:
                drawn |= results
                break
    shuffled = list(drawn.values())
    rng.shuffle(shuffled)
    return shuffled


def _row(spoken: str, template: str, reply: dict[str, Any]) -> dict[str, Any]:
    """Return one row in the OpenAI form."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": spoken},
            {"role": "assistant", "content": json.dumps(reply, ensure_ascii=False, separators=(",", ":"))},
        ],
        "group": template,
    }
