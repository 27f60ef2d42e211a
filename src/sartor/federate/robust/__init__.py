"""What stands for the mean where some of the clients lie: declared instead of a secure sum, which hides what these must see.

    rules.py       mean, norm_bound, median, trimmed, krum, multi_krum, screened: updates -> one, and who was left out, why
    distances.py   norms, cosines and distances between updates, tensor by tensor

A rule takes what clients send under a linear mode (`aggregate.modes`) and gives what stands for its mean. All but `mean` weigh
clients alike: how many examples a client has is its own word.
"""
