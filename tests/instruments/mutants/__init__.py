"""Mutants: batchq with one condition taken out each time. A test must fail for each."""
