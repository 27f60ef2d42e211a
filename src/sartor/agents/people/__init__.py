"""Personal versions of agents as they are served: a few ranks of one user's own on top of an agent's live version.

    names.py     who a person is here: an HMAC, never a name        book.py      the registry's rows of them
    serving.py   who is answered by which, loaded on demand         presence.py  which servers run, and what they have heard
    admitting.py what one must pass before a worker loads it        erasing.py   lines of files that must not be read again

They are tuned, listed and forgotten in `sartor.personal`. No torch here.

    STATE/people/<person>/<agent>/adapter/    one stacked Adapter, PEFT's directory
    STATE/people/<person>/<agent>/rows/       the Dataset that it was tuned on
    STATE/servers/                            servers that run
"""
