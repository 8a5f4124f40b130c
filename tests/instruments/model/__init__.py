"""A model of the life of batches: a few lines of Python that say what the rows must be after each step."""
