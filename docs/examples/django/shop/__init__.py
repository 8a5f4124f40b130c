"""A shop: each order gets a receipt, by a task that batchq runs."""
