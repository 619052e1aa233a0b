"""The count of a step's bytes, and runs of steps on tensors without data.

The room guarantees that a run without data leaves the tensors, networks and optimizers that existed before it unchanged.
"""
