"""Part of edge.personal.adapting."""

from __future__ import annotations

from sartor.evaluate.bootstrap import LEAST_GROUPS

# Fewer held-out prompts cannot reach the level: every verdict on them would be "cannot tell"
LEAST_HELD_OUT, LEAST_TRAINED = LEAST_GROUPS, 5
