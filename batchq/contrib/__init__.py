"""Integrations with frameworks; each needs an extra, and nothing of batchq imports them."""
