"""Files, folders, processes and the errors of a command: what every room uses."""
