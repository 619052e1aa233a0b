"""The measurement of each block's memory, from which `revflow/budget.py` chooses the blocks to store."""
