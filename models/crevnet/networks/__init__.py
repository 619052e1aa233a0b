"""The networks: CrevNet, the models that it is compared with, and the interface that they share."""
