"""Release -> device: signed updates, a store that keeps one version of each working, and a tuner that needs torch alone.

    publish.py   verified Release -> a directory that any file server can serve; roles.py the keys, content.py what is in it
    delta.py     the tensors that changed, exact to the byte, where that is smaller than the file
    fetch.py     ranged downloads from a mirror that nobody trusts
    sync.py      TUF's client: which version is this device's, and how it gets there
    store.py     stage, activate, rollback, verify, collect: an A/B update, as Android, RAUC and Mender make it
    disk.py      every operation on files that the store makes, one method each: tests kill, fill and cut the power at them
    pointers.py  NAME.json: which version is current, previous, staged, refused; two copies, each written whole or not at all
    blobs.py     content by its sha256: downloads that go on where they stopped, checked and durable when finished
    trees.py     a version's files as a directory that can be opened as a Release
    rot.py       bytes that differ from what was written: mended from a second copy, or fetched again
    room.py      the bound on the disk: what would be freed, what fits, and what is said where it does not
    limits.py    a command under limits that the system holds: cgroup v2 or v1, else RLIMIT_DATA
    tuner.py     the process that tunes: the loop of `tune` on llama.py (mapped weights) and tokens.py (rows as tokens)
    words.py     tokenizer and chat template from a base's files alone

None but tuner.py, tokens.py and llama.py loads torch, and those neither transformers nor peft.
"""
