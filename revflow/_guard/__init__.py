"""Compare what the backward pass recomputes with what the forward pass saw, and refuse what would give wrong gradients.

The room guarantees an error or a warning. It must not change a value that it looks at."""
