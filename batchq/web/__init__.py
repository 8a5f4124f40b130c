"""The page: ``batchq web`` shows queues, workers and batches in a browser, and takes verbs from there."""
