"""Tuning on a device, within limits that the system holds.

    within.py    plan, run the tuner under limits, go on smaller where memory fails, sign a receipt
    plan.py      which way to tune fits: rungs in order; peak.py: what each holds; floor.py: what is always held
    limits.py    a command under limits: cgroup v2 or v1, else RLIMIT_DATA; what it used
    energy.py    when a device may tune: battery, plug, warmth, read from sysfs
    receipt.py   what was planned and used, signed
    job.py       what is to be tuned
    tuner.py     the process that tunes: the loop of `tune` on llama.py (mapped weights) and tokens.py (rows as tokens)
    learning.py  that loop with layers held still (adamw.py), or without gradients
    narrow.py    a base in 4 bits (NF4), by torch alone
    words.py     tokenizer and chat template from a base's files alone
    smallest.py  a tuning of a few numbers, to measure the floor

The first five lines load no torch. Of the others, none loads transformers or peft.
"""
