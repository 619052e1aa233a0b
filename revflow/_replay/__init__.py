"""Two identical evaluations of a module: one in the forward pass, one in the backward pass.

The room guarantees that the second evaluation finds the state of the first: random states, autocast, modes, buffers and
attributes. Afterwards each of them is as it was before. The room must not depend on what the evaluations are for: it contains
neither blocks nor recurrences.
"""
