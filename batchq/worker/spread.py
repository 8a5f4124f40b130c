"""Spread: a batch with a long list of items becomes several, its parts, which all workers work at the same time."""

from batchq.app import Handler, ItemHandler
from batchq.batch.claimed import ClaimedBatch
from batchq.common.log import get_logger
from batchq.errors import InvalidInput
from batchq.postgres.statements import parts

_log = get_logger()


class PartFailed(InvalidInput):
    """A part has ended before all its items were worked, and had no attempts left."""


def parts_wanted(claimed: ClaimedBatch, handler: ItemHandler) -> int:
    """Return in how many parts to work the items: what the batch says, else the handler. A part is not spread again."""
    if claimed.row.part_of is not None or claimed.all_items_worked:
        return 1
    return claimed.row.spread or handler.spread


def refuse_spread(most: int, handler: Handler) -> None:
    """Raise InvalidInput for a batch with more than one part whose handler works the whole list itself."""
    if most > 1:
        raise InvalidInput(
            f"spread is for item handlers, and {handler.kind!r} has a handler for whole batches; leave spread out"
        )


def spread(claimed: ClaimedBatch, most: int) -> bool:
    """Make parts of a claimed batch, in one transaction; return whether it was, else it is to be worked as it is.

    Afterwards the batch waits for its parts, or is ready again if none of their items is left; this worker has nothing
    more to do with it. Raises LeaseLost, and PartFailed if it was spread before, and a part has failed.
    """
    connections = claimed.claim.runtime.connections
    try:
        with connections.transaction(claimed.raise_if_interrupted) as conn:
            made = parts.spread_batch(conn, claimed.queue, claimed.id, claimed.claim.token, most)
            if made is None:
                raise claimed.lose()
            if made.error is not None:
                raise PartFailed(made.error)
            if made.is_left:
                claimed.leave_to_parts()
    except BaseException:
        claimed.take_back_from_parts()
        raise
    if made.is_left and made.parts:
        _log.info("batch spread", parts=made.parts)
    return bool(made.is_left)
