"""The error of the command line and of configuration files, apart from the parser, which needs jsonargparse."""


class SettingsError(Exception):
    """An error on the command line or in a configuration file. The message is one line with the remedy."""
