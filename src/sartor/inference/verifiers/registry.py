"""List of the verifiers that a recipe can name."""

from __future__ import annotations

from sartor.inference.verifiers.entry_point import EntryPointVerifier
from sartor.inference.verifiers.json_fields import JsonFieldsVerifier
from sartor.inference.verifiers.json_schema import JsonSchemaVerifier
from sartor.inference.verifiers.numeric import NumericVerifier
from sartor.inference.verifiers.regular_expression import RegexVerifier
from sartor.inference.verifiers.tool_call import ToolCallVerifier
from sartor.inference.verifiers.unit_tests import UnitTestsVerifier

AnyVerifier = (
    JsonSchemaVerifier
    | JsonFieldsVerifier
    | NumericVerifier
    | RegexVerifier
    | ToolCallVerifier
    | UnitTestsVerifier
    | EntryPointVerifier
)
