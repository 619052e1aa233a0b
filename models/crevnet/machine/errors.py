"""The error of the command line and of configuration files, apart from the parser, which needs jsonargparse."""


class SettingsError(Exception):
    """Something on the command line or in a configuration file is wrong: one line that says what to do."""
