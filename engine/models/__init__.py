"""Architectures, a file each, and their registry."""
