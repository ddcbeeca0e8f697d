"""The commands `lnjac` and `lnjac-run`."""
