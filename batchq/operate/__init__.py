"""What people do with a running queue: bulk actions, doctor, invariants, monitor."""
