"""The engine of `ReversibleRecurrence`: runs time steps, and recomputes them in the backward pass.

The room guarantees that a time step stores no more than its `states` option requires. It must not depend on a concrete cell.
"""
