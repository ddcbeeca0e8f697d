"""Measurements on a run beyond the rows of its norms."""
