"""What the options of a recipe take, by its JSON Schema: controls of a form, and values as texts.

An option is a scalar, a list, a mapping of options, or one of several such mappings that their `kind` tells apart; it
may have short forms beside these, such as `auto` beside a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import yaml

Schema = Mapping[str, Any]


class Control(Enum):
    """Control of a form. CHOICE: one of several values. CHOICES: any of several. LINES: a list, one value a line.

    YAML: for what is none of the others.
    """

    TEXT = "text"
    NUMBER = "number"
    CHOICE = "choice"
    CHOICES = "choices"
    LINES = "lines"
    YAML = "yaml"


class OptionSchema:
    """Schema of a recipe.

    schema: as `sartor.schema` returns it. properties: schemas of the recipe's own options, by name.
    """

    def __init__(self, schema: Schema) -> None:
        self.properties: Mapping[str, Schema] = schema["properties"]
        self._definitions: Mapping[str, Schema] = schema["$defs"]

    def members(self, option: Schema) -> dict[str, Schema]:
        """Return {kind: definition} of the mappings that an option takes; a class without kinds has the kind ""."""
        members: dict[str, Schema] = {}
        for variant in variants(option):
            parts: Sequence[Schema] = [variant, *variant.get("allOf", ())]
            reference = next((part["$ref"] for part in parts if "$ref" in part), "")
            definition = self._definitions.get(str(reference).removeprefix("#/$defs/"), {})
            if definition.get("type") == "object":
                members[str(definition["properties"].get("kind", {}).get("const", ""))] = definition
        return members

    def control(self, option: Schema) -> Control:
        """Return the control of an option that is shown as one field."""
        forms = variants(option)
        if _values_of(option):
            return Control.CHOICE
        items = _item_variants(option)
        if items and not self.members(option):  # else a mapping, or a list of its names
            if all("enum" in item for item in items):
                return Control.CHOICES
            is_plain = all(item.get("type") == "string" or "enum" in item for item in items)
            return Control.LINES if is_plain else Control.YAML
        types = {str(form.get("type", "")) for form in forms if form.get("type") != "null"}
        has_number = any(form.get("$ref") == "#/$defs/number" for form in forms)
        if types <= {"integer", "number", ""} and (has_number or "integer" in types):
            return Control.NUMBER
        return Control.TEXT if types == {"string"} else Control.YAML


def variants(option: Schema) -> Sequence[Schema]:
    """Return the schemas of which one applies, among them that of the option itself."""
    return [option, *option.get("anyOf", ())]


def is_list(option: Schema) -> bool:
    """Return whether an option may be a list."""
    return any(variant.get("type") == "array" for variant in variants(option))


def words(option: Schema) -> list[Any]:
    """Return the single values that an option may have, such as `auto` beside numbers or mappings."""
    return [value for variant in variants(option) for value in variant.get("enum", ())]


def choices(option: Schema) -> list[Any]:
    """Return the values that an option, or each item of a list, is limited to; empty if others are possible."""
    if values := _values_of(option):
        return values
    items = _item_variants(option)
    return [value for item in items for value in item["enum"]] if all("enum" in item for item in items) else []


def _values_of(option: Schema) -> list[Any]:
    forms = [form for form in option.get("anyOf", (option,)) if form.get("type") != "null"]
    if all("enum" in form for form in forms):
        return [value for form in forms for value in form["enum"] if value != ""]
    return [True, False] if all(form.get("type") == "boolean" for form in forms) else []


def _item_variants(option: Schema) -> Sequence[Schema]:
    """Return the schemas of the items of an option that may be a list; empty for others."""
    lists = [variant for variant in variants(option) if variant.get("type") == "array"]
    return variants(lists[0]["items"]) if lists else ()


def text_of(value: Any, control: Control) -> str:
    """Return a value as the text of a control; empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if control in (Control.LINES, Control.CHOICES) and isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    if isinstance(value, (dict, list, tuple)):
        plain = list(value) if isinstance(value, tuple) else value
        return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None)).strip()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e9:
        return str(int(value))
    return str(value)


def value_of(text: str, control: Control, allowed: Sequence[Any] = ()) -> Any:
    """Return the value of a control's text, but for YAML.

    allowed: values of a CHOICE. A text that is no value stays as it is, for the recipe's own error.
    """
    text = text.strip()
    if control is Control.CHOICE:
        return next((value for value in allowed if text_of(value, control) == text), text)
    if control in (Control.LINES, Control.CHOICES):
        return [line.strip() for line in text.splitlines() if line.strip()]
    if control is Control.NUMBER:
        for parse in (int, float):
            try:
                return parse(text)
            except ValueError:
                continue
    return text
