"""What people do with a running queue: verbs, bulk, doctor, invariants, monitor."""
