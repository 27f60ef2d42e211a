"""Part of curate.synthesize.reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema

from sartor.core.errors import ConfigError


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises ConfigError for what is no JSON Schema of draft 2020-12."""
    try:
        jsonschema.Draft202012Validator.check_schema(dict(schema))
    except jsonschema.SchemaError as error:
        raise ConfigError(f"that is no JSON Schema: {error.message[:200]}", "see json-schema.org/draft/2020-12") from None
