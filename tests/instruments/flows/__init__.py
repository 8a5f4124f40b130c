"""Flows with real worker processes, kills and many rounds: what began, how often and when, by a ledger in SQL."""
