"""The stages of bench/gpu.py: a file per stage, and what they have in common in stage.py, process.py and pages.py."""
