"""`batchq_worker` and `batchq_migrate`."""
