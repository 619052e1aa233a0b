"""The engine of `ReversibleSequence`: runs a sequence of blocks, and inverts it in the backward pass.

The room guarantees the six rules at the top of `functions.py`. It must not depend on a concrete coupling: it uses couplings
through `Stepwise`, and all other blocks through `forward` and `inverse`.
"""
