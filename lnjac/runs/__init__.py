"""The record: tables, run folders, reading and merging. For any rows; no torch."""
