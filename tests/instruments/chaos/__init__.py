"""bin/chaos: workers under load, one fault after another by a seeded schedule, and a ledger that must come out even."""
