"""Look at each block of a network by itself, for `revflow.verify`."""
