"""The web UI: ``batchq web`` shows queues, workers and batches in a browser, and offers actions on them."""
