"""Kills worker processes at random points of transactions of an ORM that complete batches."""
