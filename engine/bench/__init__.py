"""Measures what the service lives on, and predicts it."""
