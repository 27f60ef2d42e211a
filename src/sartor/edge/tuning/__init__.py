"""Tuning on a device, within limits that the system holds.

    limits.py    a command under limits: cgroup v2 or v1, else RLIMIT_DATA; what it used
    energy.py    when a device may tune: battery, plug, warmth, read from sysfs
    tuner.py     the process that tunes: the loop of `tune` on llama.py (mapped weights) and tokens.py (rows as tokens)
    words.py     tokenizer and chat template from a base's files alone

Of these, tuner.py, tokens.py and llama.py load torch, and neither transformers nor peft.
"""
