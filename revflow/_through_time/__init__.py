"""The engine of `ReversibleRecurrence`: pass through time steps, and undo them in the backward pass.

The room guarantees that a step keeps no more than its `states` say. It must not know a concrete cell."""
