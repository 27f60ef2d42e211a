"""What a device learns from its own person: rows that never leave it, and a delta on top of the shipped release.

    personal.py    the whole: add, adapt, undo, forget, status
    rows.py        one row: what was said, how it was rated, what it should have been; what of it is learnt
    keys.py        the key of the rows, wrapped by a file, the system's keyring or a passphrase
    diary.py       the encrypted file of the rows: add, read, forget
    adapting.py    rows -> a delta that is better on rows it never saw, or none
    work.py        tokens in memory alone, the tuner's job and process
    judge.py       losses before and after, and the verdict
    local.py       the deltas as versions of NAME.local in the device's store; which one works
    forgetting.py  the intent that a power cut cannot lose, and the signed receipt

Nothing here uses the network.
"""
