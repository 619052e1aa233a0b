"""Parts that every room uses: types of streams, a coupling's interface, errors, warnings, memory sizes, private names of torch.

The room guarantees that each of these is defined once. It must not depend on how a block is evaluated or inverted.
"""
