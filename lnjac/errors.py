"""Errors whose text a user reads."""


class ConfigError(ValueError):
    """A problem a user can mend: its text is what they read, one line for each problem, each with its remedy."""
