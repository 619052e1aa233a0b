"""`python -m crevnet.cli`, which torchrun can start."""

from crevnet.cli import main

if __name__ == "__main__":
    main()
