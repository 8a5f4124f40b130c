"""What is enqueued: for each kind its style, its share, its payloads or items, and how it must end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.instruments.chaos import flows
from tests.instruments.chaos.spans import QUEUE

LATE_ITEM, BAD_ITEM = 100, 200  # added to an item: fails in the first attempt; is refused for good
ITEMS = 10
KEYS = 11
LETTERS = "zażółć 批处理 🙂"  # more than LATIN1 has
PATIENT = 30_000  # attempts: whoever stands beside a worker that dies loses one each time


@dataclass(frozen=True)
class Order:
    """A kind of batch. *share*: how many of it in each lot. It must end as *ends_as*. *has_keys*: some come first."""

    kind: str
    style: str
    share: int
    has_items: bool = False
    has_keys: bool = False
    max_attempts: int = PATIENT
    ends_as: str = "completed"

    @property
    def queue(self) -> str:
        """The queue of its style."""
        return QUEUES.get(self.style, "default")


QUEUES = {"limits": QUEUE, "flows": flows.QUEUE}
ORDERS = {
    order.kind: order
    for order in (
        Order("tx", "sync", 8),
        Order("plain", "sync", 8),
        Order("failing", "sync", 1, max_attempts=2, ends_as="failed"),
        Order("hungry", "sync", 0, max_attempts=2, ends_as="failed"),
        Order("tx_async", "async", 8),
        Order("plain_async", "async", 8),
        Order("steps", "chunks", 4),
        Order("chunks", "chunks", 2, has_items=True),
        Order("chunks_async", "chunks", 2, has_items=True),
        Order("items", "items", 3, has_items=True),
        Order("items_async", "items", 3, has_items=True),
        Order("items_tx", "items", 2, has_items=True),
        Order("items_tx_async", "items", 2, has_items=True),
        Order("limited", "limits", 4),
        Order("keyed", "limits", 4, has_keys=True),
        Order("needed", "flows", 0),  # by fan_in
        Order("fan_in", "flows", 1),
        Order("spread", "flows", 1, has_items=True),
        Order("tick", "flows", 0),  # by the schedule
    )
}
FAIL_AT_FIRST = ("tx", "keyed")
STYLES = ("sync", "async", "items", "chunks", "limits", "flows")


def payload(order: Order, seq: int) -> dict[str, Any]:
    """Return the payload of the batch number *seq*."""
    return {"seq": seq, "fails_at_first": order.kind in FAIL_AT_FIRST and seq % 10 == 0, "is_slow": seq % 4 == 0}


def key(payload: dict[str, Any]) -> str:
    """Return the key of the batch with a payload."""
    return f"key {payload['seq'] % KEYS}"


def items(seq: int) -> Iterator[int]:
    """Yield the items of the batch number *seq*: in each tenth one fails at first, in each tenth one is bad."""
    for index in range(ITEMS):
        late = LATE_ITEM if seq % 10 == 3 and index in (2, 7) else 0
        bad = BAD_ITEM if seq % 10 == 6 and index == 5 else 0
        yield index + late + bad
