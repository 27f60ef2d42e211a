"""The input as the pipeline sees it: `plan` cuts the sources into units, `read` gives the Examples and Drops of one."""

from sartor.curate.planning import Plan, plan
from sartor.curate.reading import InputFile, Unit, read, unit_of_json
from sartor.curate.sources import FileFacts

__all__ = ["FileFacts", "InputFile", "Plan", "Unit", "plan", "read", "unit_of_json"]
