"""What a round may tell of a client or a row: accounted before it is told, and attacked afterwards.

    accountant.py    a budget (epsilon, delta), what was spent of it, and the refusal of what would exceed it
    noise.py         discrete Gaussian noise, drawn from the system's randomness
    clients.py       client-level: each clips, rounds and adds its share of the noise, inside a secure sum
    worth.py         how much is left of a mean under that noise, as a sentence
    examples.py      example-level: DP-SGD in the client, through opacus. Needs torch
    attacks/         membership, canaries, inversion, a lower bound of epsilon; the report that fails a release

Needs `pip install 'sartor[federated]'` for accounts and DP-SGD.
"""
