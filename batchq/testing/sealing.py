"""Keys for sealed batches in a test."""

from collections.abc import Iterator
from contextlib import contextmanager

from batchq.common import sealed


@contextmanager
def encryption_keys(keys: str | None = "") -> Iterator[str | None]:
    """Let this program seal and open batches with *keys* while the block runs; yield them.

    *keys*: as in BATCHQ_ENCRYPTION_KEYS (default: a new random one); None: without keys. Raises ConfigError.
    """
    text = sealed.new_key("test") if keys == "" else keys
    before = sealed.current()
    sealed.use_keys(text)
    try:
        yield text
    finally:
        sealed.put_keys(before)
