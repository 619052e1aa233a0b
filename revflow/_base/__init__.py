"""What every room uses: types of streams, the interface of a coupling, errors, amounts of memory, private names of torch.

The room must not depend on how a block is evaluated or inverted.
"""
