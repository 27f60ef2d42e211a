"""Several agents for one request: plans that TEAM.yaml declares, run by one conductor. No agent speaks to another. No torch.

declared.py   the options: steps, checks, budgets, and what is refused when the file is read
handover.py   what one step gives to the next, typed: request, draft, findings, verdict, parts
checks.py     checks that compute: JSON Schema, pattern, arithmetic, citations
uniting.py    several replies -> one: a vote, or JSON objects merged field by field
steps.py      one step: a hand-over -> a reply within the budget, or why it is left out
running.py    a plan: its steps in order, drafts checked and mended, the best of them answered
log.py        every step in one file, by digest or by content
front.py      Request -> Answer, for plans and agents alike
replay.py     a logged run, made again and compared
"""
