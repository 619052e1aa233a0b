"""Comparison of recomputed values with those of the forward pass, and errors for evaluations with wrong or missing gradients.

The room guarantees an error or a warning for each fault that it finds. It must not change a value that it compares, and must not
depend on how blocks are inverted.
"""
