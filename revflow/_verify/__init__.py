"""Check a whole network: each block by itself, then a training step with the engine and one under standard autograd."""
