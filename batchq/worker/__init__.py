"""One worker process: claims batches, runs their handlers, writes how they end, keeps their leases."""
