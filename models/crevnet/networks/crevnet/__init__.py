"""CrevNet, from its convolutions to the whole network."""
