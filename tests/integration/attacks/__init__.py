"""Attacks, one file a door: each test is an attack, says who attacks, and asserts what stops it."""
