"""Evaluation: forecasts, their scores, and the figures of a run."""
