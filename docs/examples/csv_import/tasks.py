"""The handler: one line of the file becomes one contact. Run: batchq workers 2 tasks:app"""

import psycopg
from pydantic import BaseModel, Field

import batchq

app = batchq.App()


class Contact(BaseModel):
    """A line of the file. One that does not fit fails without a retry."""

    line: int
    email: str = Field(pattern="^[^@ ]+@[^@ ]+$")
    name: str


@app.item_handler("import_contact", item=Contact, transactional=True, spread=4)  # four parts, for all workers
def import_contact(item: Contact, conn: psycopg.Connection) -> None:
    """Insert a contact; the row commits with the checkpoint. An error fails only this line."""
    conn.execute("INSERT INTO contacts (email, name) VALUES (%s, %s)", [item.email, item.name])
