"""Audits of the tuned model itself, base beside tuned.

Only benchmarks, memorisation, refusals, run and sides need torch.
"""

from sartor.evaluate.audit.probes import chitchat_rows

__all__ = ["chitchat_rows"]
