"""Personal versions of a served agent: tuned from one user's own rows, gated, listed, and forgotten with a signed proof.

    tuning.py   the verb tune      rows.py       a user's rows -> a Dataset      gate.py  may it answer?
    people.py   list, show, allow  forgetting.py the verb forget                 remains.py  what of somebody's words is on disk

How they are served: `sartor.agents.people`.
"""
