"""The engine of `ReversibleRecurrence`: pass through time steps, and recompute them in the backward pass.

The room guarantees that a step stores no more than its `states` require. It must not know a concrete cell.
"""
