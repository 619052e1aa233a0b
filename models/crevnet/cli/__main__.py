"""`python -m crevnet.cli`, which torchrun can start."""

from crevnet.cli import main

main()
