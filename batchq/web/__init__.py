"""The web UI: ``batchq web`` shows queues, workers and batches in a browser, and offers actions on them.

`WebApp` mounts it into an application. It needs the extra "web".
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchq.web.mounted import WebApp

__all__ = ["WebApp"]


def __getattr__(name: str) -> Any:
    """Import `WebApp` where it is used: the settings of the web UI need no extra."""
    if name != "WebApp":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from batchq.web.mounted import WebApp

    return WebApp
