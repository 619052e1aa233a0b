"""Training: the loop, checkpoints, and explanations of failures. The modules for settings and folders do not import Lightning."""
