"""Errors whose text a user reads."""


class ConfigError(ValueError):
    """Raised for problems that a user can mend. The text has one line for each problem, with its remedy."""
