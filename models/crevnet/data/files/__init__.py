"""Files of frames: their layouts, how they are read and written, and the checks before any value is read."""
