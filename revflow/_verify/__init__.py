"""The check of a whole network: each block separately, then a training step with the engine and one under standard autograd."""
