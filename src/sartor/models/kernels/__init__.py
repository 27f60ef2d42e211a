"""What the fast path computes besides matrix products: one set of operations, several makers.

    eager    torch's own operations: any device, any dtype; what the others are checked against
    native   one small C++ file, compiled once on this machine (`native.py`): CPUs
    cuda     flash-attention, Liger and torch.compile, where they can be imported (`cuda.py`): NVIDIA GPUs

All have the methods of `eager.Eager`. `forward.py` calls them and knows no other.
"""
