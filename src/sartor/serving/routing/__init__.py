"""How `auto` tells whom a prompt is for: a part for each agent, a few figures that they share, and a threshold. No torch.

    exemplars.py    what a Release says of itself (`router/exemplars.jsonl`), and general prompts that are nobody's
    near_misses.py  an agent's own words in requests that it is not for
    features.py     a text as words and pieces of words, and as an encoder's vector; how alike two texts are
    space.py        the general prompts, and features fitted on them alone: what every part stands on
    part.py         one agent's classifier, fitted on its own prompts; lift.py what its Report shows a gain for
    fitted.py       parts side by side: probabilities, reasons
    fitting.py      parts -> shared figures and threshold, on prompts that no part was fitted on; curves.py risk and calibration
    store.py        parts on disk and back

`agents/router.py` keeps one of these current while agents come and go.
"""
