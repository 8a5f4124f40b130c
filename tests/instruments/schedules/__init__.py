"""Schedules with real processes and kills, as their batches tell it."""
