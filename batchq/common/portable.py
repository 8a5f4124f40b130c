"""What Windows does not have, where programs that enqueue need it not."""

import os
from collections.abc import Callable


def after_fork_in_child(action: Callable[[], object]) -> None:
    """Call *action* in each forked child from now on. Windows has no fork, so nothing is registered there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=action)
