"""``batchq NAME`` is the module NAME; ``batchq workers`` is in `worker`, and the actions on batches in `cli.verbs`.

Each module has `add_parser`, which declares the arguments, and the function that it runs, which returns the exit code.
"""
