"""What an adapter, or one client's update, tells of the rows that it learnt from: measured, and held against what is claimed.

    canaries.py      rows with a secret, made up and trained on: how far their loss stands out among other secrets
    inversion.py     which tokens stand in the rows of a first update
    audit.py         coins decide which canaries are trained on: guessing them bounds epsilon from below
    report.py        all of it beside an adapter, and the refusal where epsilon is above the claim

Whether a row was among them is guessed by `sartor.evaluate.audit.membership`.

All but the inversion take losses in nats, one a row; who measures them is the caller.
"""
