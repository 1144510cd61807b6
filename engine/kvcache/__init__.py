"""Bookkeeping of KV blocks, in integers only. Never imports torch."""
