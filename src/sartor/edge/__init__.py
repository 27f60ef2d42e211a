"""Release -> device: a store that keeps one version of each release working, whatever fails in an update.

    disk.py      every operation on files that the store makes, one method each: tests kill, fill and cut the power at them
    pointers.py  NAME.json: which version is current, previous, staged, refused; two copies, each written whole or not at all
    blobs.py     content by its sha256: downloads that go on where they stopped, checked and durable when finished
    trees.py     a version's files as a directory that can be opened as a Release
    rot.py       bytes that differ from what was written: mended from a second copy, or fetched again
    room.py      the bound on the disk: what would be freed, what fits, and what is said where it does not
    store.py     stage, activate, rollback, verify, collect: an A/B update, as Android, RAUC and Mender make it

Nothing here loads torch.
"""
