"""Data that crevnet writes: synthetic cities, Moving MNIST, and repacked files."""
