"""Data that CrevNet's commands write: synthetic cities, Moving MNIST, and repacked files."""
