"""Limits under load and faults: what the handlers themselves saw, by the database's clock."""
