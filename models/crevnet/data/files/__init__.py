"""Files of frames: layouts, reading, writing, and the checks before any value is read."""
