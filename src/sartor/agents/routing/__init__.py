"""How `auto` tells whom a prompt is for: prompts of each Release, a linear classifier over them, and a threshold. No torch.

    exemplars.py   what a Release says of itself (`router/exemplars.jsonl`), and general prompts that are nobody's
    features.py    a text as words and pieces of words, and as an encoder's vector; how alike two texts are
    fitted.py      the classifier and its threshold as plain arrays: scores, reasons, on disk and back
    fitting.py     exemplars -> classifier, and its threshold on prompts and kinds of prompts that it never saw

`agents/router.py` keeps one of these current while agents come and go.
"""
