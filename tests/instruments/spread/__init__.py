"""Tries spread: one long list of items, worked in parts by several workers, beside kills, retries and a cancel."""
