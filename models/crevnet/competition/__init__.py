"""The options and the commands of the competition."""
