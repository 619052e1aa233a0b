"""Evaluate a module twice, alike.

The room guarantees that the second evaluation finds what the first one found: random states, autocast, modes, buffers,
attributes. It must not know what the two evaluations are for: neither blocks nor recurrences."""
