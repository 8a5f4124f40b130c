"""Mistakes that type checkers must report, each on its line with the mark E. Read by tests/component/test_types.py."""

from pydantic import BaseModel

import batchq


class Mail(BaseModel):
    to: str


class Urgent(Mail):
    by: int


class Address(BaseModel):
    street: str


app = batchq.App()


@app.handler("number")  # E
def number(batch: int) -> None: ...


@app.handler("number_async")  # E
async def number_async(batch: int) -> None: ...


@app.handler("nothing")  # E
def nothing() -> None: ...


@app.handler("two")  # E
def two(batch: batchq.Batch, other: int) -> None: ...


@app.handler("model", payload=Mail)  # E
def model(batch: Mail) -> None: ...


@app.handler("other_model", payload=Mail)  # E
def other_model(batch: batchq.Batch[Address]) -> None: ...


@app.handler("other_model_async", payload=Mail)  # E
async def other_model_async(batch: batchq.Batch[Address]) -> None: ...


@app.handler("too_special", payload=Mail)  # E
def too_special(batch: batchq.Batch[Urgent]) -> None: ...


@app.handler("no_model", payload=dict)  # E
def no_model(batch: batchq.Batch) -> None: ...


@app.handler  # E
def no_kind(batch: batchq.Batch) -> None: ...


@app.handler("attribute", payload=Mail)
def attribute(batch: batchq.Batch[Mail]) -> str:
    return batch.payload.subject  # E


@app.item_handler("no_item", item=Mail)  # E
def no_item() -> None: ...


@app.item_handler("other_item", item=Mail)  # E
def other_item(item: Address, batch: batchq.Batch) -> None: ...


@app.item_handler("special_item", item=Mail)  # E
async def special_item(item: Urgent) -> None: ...


def in_tests(batch: batchq.Batch[Address]) -> None:
    attribute(batch)  # E
    attribute(1)  # E
    sum(batch.chunks())  # E
    with batch.transaction() as conn:
        conn.no_such_method()  # E
    for chunk in batch.chunks():
        chunk.fail("0", "why")  # E
    print(batch.needed[0].error)  # E
