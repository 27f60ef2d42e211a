"""Probes of a judge's options: what an endpoint on loopback is asked, and what comes of its answers."""

from __future__ import annotations

from typing import Any

from judge_server import judging, likes_the_reference
from option_probes import Probe, Workspace, probes_of
from sartor.core.config import load
from sartor.evaluate.judge import JudgedRow, JudgePlan
from sartor.evaluate.judge_options import JudgeOptions

ROWS = [
    JudgedRow(
        f"switch on light {index}", f"light {index} is on now", base="no", tuned=f"light {index}", group=str(index)
    )
    for index in range(13)
]
ENDPOINT = {"url": "SERVER", "model": "m", "at_once": 1, "tries": 1}


def _judged(values: Any, workspace: Workspace) -> Any:
    """Bodies that the endpoint got, its keys, the outcome, and whether two questions came at the same time."""
    values = {"judge": ENDPOINT, "rubric": "the right one", "planted": 20, **values}
    # repeated questions wait for a hundredth of a second
    workspace.patch.setattr("sartor.inference.endpoint_client.LONGEST_PAUSE_S", 0.01)
    workspace.patch.setenv("PROBE_KEY", "key")
    with judging(likes_the_reference, status=503, fails_after=55, delay_s=0.005) as server:
        if isinstance(values["judge"], dict) and values["judge"]["url"] == "SERVER":
            values["judge"] = {**values["judge"], "url": server.url}
        facts = JudgePlan(load(JudgeOptions, values)).run(ROWS, lambda line: None).facts
        is_at_once = server.peak > 1
        return is_at_once or server.asked, server.keys, facts["outcome"]


def _judged_by(values: Any, workspace: Workspace) -> Any:
    """The same of options of the endpoint."""
    return _judged({"judge": {**ENDPOINT, **values}}, workspace)


PROBES: tuple[Probe, ...] = (
    *probes_of(
        "JudgeOptions",
        _judged,
        {
            "judge": (ENDPOINT, "./no-such-base"),
            "rubric": ("the right one", "the kind one"),
            "max_characters": (4000, 5),
            "planted": (20, 25),
            "seed": (0, 1),
        },
    ),
    *probes_of(
        "JudgeEndpoint",
        _judged_by,
        {
            "url": ("SERVER", "http://127.0.0.1:9/v1"),
            "model": ("m", "n"),
            "key_env": ("", "PROBE_KEY"),
            "at_once": (1, 4),
            "tries": (1, 3),
            "max_tokens": (16, 32),
        },
    ),
)
