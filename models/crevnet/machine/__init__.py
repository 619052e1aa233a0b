"""Shared by all other packages: files, folders, processes, parsers, and the errors of commands."""
