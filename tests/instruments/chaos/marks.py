"""What handlers do outside every transaction: a record of 30 bytes a call, in files that no fault touches."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

DIRECTORY = "BATCHQ_CHAOS_DIRECTORY"
RECORD = struct.Struct("<qih16s")
WHOLE_BATCH = -1


class Mark(NamedTuple):
    """One call of a handler: for an item, or for the whole batch (item -1), in the attempt and the claim *token*."""

    batch_id: int
    item: int
    attempt: int
    token: UUID


class MarksFile:
    """This process's file of marks. One write a mark: a process that is killed leaves whole records."""

    def __init__(self, directory: Path) -> None:
        self.descriptor = os.open(directory / f"marks-{os.getpid()}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)

    def add(self, mark: Mark) -> None:
        """Write one mark."""
        os.write(self.descriptor, RECORD.pack(mark.batch_id, mark.item, mark.attempt, mark.token.bytes))


def read_marks(directory: Path) -> Iterator[Mark]:
    """Yield every mark that the processes of a run have left."""
    for path in sorted(directory.glob("marks-*")):
        for batch_id, item, attempt, token in RECORD.iter_unpack(path.read_bytes()):
            yield Mark(batch_id, item, attempt, UUID(bytes=token))
