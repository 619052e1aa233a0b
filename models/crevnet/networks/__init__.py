"""The networks: CrevNet, the models that it is compared with, and their shared interface."""
