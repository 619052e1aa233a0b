"""Measure what a block would take if its activations were stored. `revflow/budget.py` decides by that."""
