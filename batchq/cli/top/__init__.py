"""The full screen of ``batchq top``. Only ``app`` and what it imports need the extra "top"."""
