"""Bounds of sampling values, wherever they come from."""

MAX_TEMPERATURE = 100.0
INT64 = 2**63  # the first whole number that is too large
