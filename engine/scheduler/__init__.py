"""Requests, and the decision what each step computes. Never imports torch."""
