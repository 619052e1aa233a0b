"""The engine of `ReversibleSequence`: pass through a chain of blocks, and undo it in the backward pass.

The room guarantees the six rules at the head of `functions.py`. It must not know a concrete coupling."""
