"""Audits of the tuned model itself, base beside tuned.

    probe.py         what was forgotten: the rows of the probe
    run.py           the whole audit of an adapter: `sartor evaluate --audit`
    pairs.py         prompts that differ in a group alone: of templates, of the user's own rows
    bias.py          what such pairs show: rates, gaps, the four-fifths rule, tests corrected by Holm
    outcomes.py      which replies are an outcome, and which are to be wished for
    benchmarks.py    BBQ, CrowS-Pairs, StereoSet, WinoBias, by likelihood
    memorisation.py  verbatim extraction, repeated secrets, membership; membership.py its statistics. No torch in the latter
    refusals.py      what should be refused, and what only looks like it
    sides.py         likelihoods and replies of base and tuned: all that an audit asks of a model
    verdicts.py      the gate's checks of an audit

Only benchmarks, memorisation, refusals, run and sides need torch.
"""

from sartor.evaluate.audit.probes import chitchat_rows

__all__ = ["chitchat_rows"]
