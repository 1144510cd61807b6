"""The HTTP service: text in, text out. Never imports torch."""
