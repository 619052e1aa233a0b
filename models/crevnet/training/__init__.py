"""Training: the loop, checkpoints, and the explanation of failures. The modules for settings and folders need no Lightning."""
