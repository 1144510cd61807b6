"""Launches the ranks, checks that they agree, and ends them. Never imports torch."""
