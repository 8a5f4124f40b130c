"""The handler of the shop. Run: batchq worker tasks:app"""

import batchq

app = batchq.App()


@app.handler("confirm_order")
def confirm_order(batch: batchq.Batch) -> None:
    """Confirm the order, in the transaction that also completes the batch."""
    with batch.transaction() as conn:
        conn.execute("UPDATE orders SET is_confirmed = true WHERE id = %s", [batch.payload["order_id"]])
