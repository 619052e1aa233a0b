"""A sequence inside of a compiled graph: PyTorch captures both of its passes."""
