"""What the clients of a round learnt, as one adapter: the mean of their products B A, not the product of mean factors.

    tensors.py     an adapter's tensors by PEFT's names, checked; a client's Update; the weighted mean
    modes.py       freeze_a, alternate, residual, factors: what is trained, sent and made of it
    ranks.py       a client with less memory trains the first r ranks of the shared adapter
    exactness.py   how far the adapter that was made is from the mean of the products, on a canary

Arrays are numpy's: who only sums needs no torch.
"""
