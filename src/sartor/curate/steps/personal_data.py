"""Step personal_data: masks or drops personal data and credentials."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import TEXT_KEPT, Drop, Example
from sartor.core.row_warnings import DataWarning
from sartor.curate.step import RowFunction
from sartor.text.pii.entities import ENTITIES, EntityName, PiiEntity
from sartor.text.pii.example_layout import FieldName, TextSlot
from sartor.text.pii.masking import (
    MOST_PASSES,
    Placeholders,
    RowEntities,
    entity_counts,
    find_in_row,
    masked,
    select_hits,
    text_masker,
)
from sartor.text.pii.scanner import Scanner

Action = Literal["mask", "drop", "keep"]
# rows that a Dataset made without the step is searched in
MOST_SEARCHED = 5_000
# reliable detection of names needs a model; detection by patterns must be selected explicitly
DEFAULT: tuple[EntityName, ...] = tuple(name for name in get_args(EntityName) if name != "person")


@dataclass(frozen=True)
class EntityActions:
    """Action for each entity: `keep` does not look for it; an entity without an action takes the step's `action`."""

    email: Action | None = option(None, "mail addresses, also written out: bob [at] example [dot] com")
    phone: Action | None = option(None, "telephone numbers in international and national forms")
    credit_card: Action | None = option(None, "card numbers, by issuer's range and check digit")
    iban: Action | None = option(None, "bank accounts, by country's length and check digits")
    national_id: Action | None = option(
        None, "social security, tax, health and identity numbers; passports after their name"
    )
    ip_address: Action | None = option(None, "IPv4 and IPv6 addresses")
    mac_address: Action | None = option(None, "hardware addresses")
    secret: Action | None = option(
        None, "passwords after their name, API keys, tokens, private keys, credentials in URLs"
    )
    crypto_wallet: Action | None = option(None, "Bitcoin, its kin and Ethereum")
    address: Action | None = option(None, "streets with a number, British postcodes, boxes at a post office")
    birth_date: Action | None = option(None, "dates after a word for birth")
    person: Action | None = option(None, "names that are introduced or follow a title; not looked for by default")


@dataclass(frozen=True)
class FieldActions:
    """Action for each field: `keep` leaves the field as it is; a field without an action takes the step's `action`."""

    prompt: Action | None = option(None, "the turns before the last reply, but for system messages")
    reply: Action | None = option(None, "the last message, and the rejected reply of a pair")
    system: Action | None = option(None, "system messages")
    tools: Action | None = option(None, "the declarations of tools")


@dataclass(frozen=True)
class PersonalData:
    """Mask personal data, or drop the rows that hold any."""

    entities: tuple[EntityName, ...] | EntityActions = option(
        DEFAULT, "what to look for: a list of names, or name: mask | drop | keep"
    )
    action: Literal["mask", "drop"] = option("mask", "what is done where neither entity nor field says it")
    fields: Literal["all"] | FieldName | tuple[FieldName, ...] | FieldActions = option(
        "all", "where to look: prompt, reply, system, tools, a list of them, all, or field: mask | drop | keep"
    )
    mask: Literal["numbered", "plain"] = option(
        "numbered", "numbered: <EMAIL_1>, the same value of a row has one number; plain: <EMAIL>"
    )
    min_score: float = option(0.5, "how sure a finding must be, 0 to 1")
    countries: tuple[str, ...] = option(
        (), "ISO codes whose national ids and national phone numbers are looked for; empty: all known"
    )
    allow: tuple[str, ...] = option(
        (), "values that are not personal, in any spelling, or /regular expressions/ of whole findings"
    )
    kind: Literal["personal_data"] = "personal_data"

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ConfigError(
                f"min_score is {self.min_score:g}; it must be from 0 to 1",
                f"min_score: {min(1.0, max(0.0, self.min_score)):g}",
            )
        for country in self.countries:
            if not (len(country) == 2 and country.isascii() and country.isupper()):
                near = {"UK": "GB"}.get(country.upper(), country[:2].upper())
                raise ConfigError(
                    f"countries holds {country!r}; a country is two capital letters of ISO 3166",
                    f"countries: [{near}]",
                )
        if "UK" in self.countries:
            raise ConfigError("countries holds 'UK'; the code of the United Kingdom is GB", "countries: [GB]")
        if not self._wanted_entities():
            raise ConfigError(
                "no entity is looked for", f"entities: [{', '.join(DEFAULT[:3])}, ...], or leave the step out"
            )
        Scanner((), (), self.min_score, self.allow)  # raises for a bad expression

    def open(self, folder: Path) -> RowFunction:
        """Return the row function.

        It is a `Counting`: its `tally` counts findings by entity and field (`email.reply`).
        """
        return Masking(self, self._scanner())

    def masker(self) -> Callable[[str], str]:
        """Return a function that masks all entities of this step in a text.

        Other steps use it for their evidence. The actions by field do not apply.
        """
        return text_masker(self._scanner(), self.mask == "numbered", TEXT_KEPT)

    def row_masker(self) -> Callable[[Example], Example]:
        """Return a function that masks all entities in every field of a row, for rows that are set aside."""
        return self.masking().everywhere

    def masking(self) -> Masking:
        """Return a row function with a tally of its own."""
        return Masking(self, self._scanner())

    def entity_actions(self) -> Mapping[str, str]:
        """Return entity -> action of `entities`; "" if the entity is looked for and has no action of its own."""
        if not isinstance(self.entities, EntityActions):
            return {entity: "" for entity in ENTITIES if entity in self.entities}
        actions = {field.name: getattr(self.entities, field.name) for field in fields(self.entities)}
        return {entity: action or "" for entity, action in actions.items() if action or entity in DEFAULT}

    def field_actions(self) -> Mapping[str, str]:
        """Return field -> action of `fields`; "" if the field is read and has no action of its own."""
        names = [field.name for field in fields(FieldActions)]
        if isinstance(self.fields, FieldActions):
            return {name: getattr(self.fields, name) or "" for name in names}
        if self.fields == "all":
            return dict.fromkeys(names, "")
        selected = [self.fields] if isinstance(self.fields, str) else self.fields
        return {name: "" if name in selected else "keep" for name in names}

    def _wanted_entities(self) -> list[str]:
        return [entity for entity, action in self.entity_actions().items() if action != "keep"]

    def _scanner(self) -> Scanner:
        return Scanner(self._wanted_entities(), self.countries, self.min_score, self.allow)


class Masking:
    """Row function of a PersonalData step, with a tally of its findings."""

    def __init__(self, step: PersonalData, scanner: Scanner) -> None:
        self.tally: Counter[str] = Counter()
        self._step = step
        self._scanner = scanner
        self._entity_actions = step.entity_actions()
        self._field_actions = step.field_actions()

    def __call__(self, example: Example) -> Example | Drop:
        """Return the row unchanged without findings, else masked, or a Drop.

        The Drop names kinds and fields, and holds no text of the row.
        """
        entities = select_hits(find_in_row(self._scanner, example), self._is_looked_at)
        if not entities.hits:
            return example
        dropped_entities = select_hits(entities, lambda slot, finding: self._action(slot, finding) == "drop")
        if dropped_entities.hits:
            self.tally.update(entity_counts(entities))
            origin = example.origins[0]
            return Drop(
                "personal_data",
                origin.source,
                locator=origin.locator,
                detail=dropped_entities.describe(),
                step=self._step.kind,
                id=example.id,
            )
        return self._masked(example, entities, self._is_looked_at)

    def everywhere(self, example: Example) -> Example:
        """Return the row masked in every field, whatever the options."""
        entities = find_in_row(self._scanner, example)
        return self._masked(example, entities, lambda slot, finding: True) if entities.hits else example

    def _masked(self, example: Example, entities: RowEntities, keep: Callable[[TextSlot, PiiEntity], bool]) -> Example:
        names = Placeholders(self._step.mask == "numbered", (slot.text for slot in entities.layout.slots))
        for _ in range(MOST_PASSES):
            self.tally.update(entity_counts(entities))
            example = masked(example, entities, names)
            entities = select_hits(find_in_row(self._scanner, example), keep)
            if not entities.hits:
                break
        return example

    def _is_looked_at(self, slot: TextSlot, finding: PiiEntity) -> bool:
        return slot.location[0] == "group" or self._field_actions[slot.field] != "keep"

    def _action(self, slot: TextSlot, finding: PiiEntity) -> str:
        """Return the stricter of the actions of entity and field; the step's own if neither has one."""
        if slot.location[0] == "group":
            return "mask"
        fields = {self._entity_actions[finding.entity], self._field_actions[slot.field]} - {""}
        if "drop" in fields:
            return "drop"
        return "mask" if fields else self._step.action


def personal_data_warning(examples: Iterable[Example]) -> DataWarning | None:
    """Return a warning of personal data in the messages of rows, as the step finds it by default; None without any.

    Only the first MOST_SEARCHED rows are read.
    """
    scanner = PersonalData()._scanner()
    found: Counter[str] = Counter()
    rows = with_findings = 0
    for example in itertools.islice(examples, MOST_SEARCHED):
        rows += 1
        entities = find_in_row(scanner, example)
        kinds = {hit.finding.entity for hit in entities.hits if entities.slot(hit).location[0] != "group"}
        found.update(kinds)
        with_findings += bool(kinds)
    if not with_findings:
        return None
    kinds_text = ", ".join(f"{kind} in {count}" for kind, count in found.most_common())
    first = "the first " if rows == MOST_SEARCHED else ""
    return DataWarning(
        "personal_data",
        f"{with_findings:,} of {first}{rows:,} rows may hold personal data, and a model can learn it by heart: "
        f"{kinds_text}",
        "steps: [{kind: personal_data}] in the curation recipe masks it, or sartor tailor ... --personal-data mask",
    )
