// Handlers, and how the worker starts and stops. These are the kinds that the conformance suite asks for.
import { setTimeout as sleep } from "node:timers/promises";
import pg from "pg";
import { Batch, FailedItem, FinalError, Handler, Worker } from "./worker.js";

const ROW = "INSERT INTO conformance (batch_id, item, attempt) VALUES ($1, $2, $3)";

const handlers: Record<string, Handler> = {
  async echo(batch) {
    return batch.payload;
  },

  async fails(batch) {
    if (batch.attempt <= batch.payload.times) throw new Error(batch.payload.error);
  },

  async refuses(batch) {
    throw new FinalError(batch.payload.error);
  },

  async items(batch: Batch) {
    for await (const chunk of batch.chunks(2)) {
      const failed: FailedItem[] = [];
      const good: number[] = [];
      chunk.items.forEach((item, number) => {
        const index = chunk.indexes[number]!;
        if (item.fails === "final") failed.push({ index, error: "for good", retryable: false });
        else if (item.fails === "always" || (item.fails === "once" && batch.attempt === 1)) failed.push({ index, error: "bad" });
        else good.push(index);
      });
      const progress = chunk.isRetry ? { recovered: good } : { done: good.length };
      await batch.checkpoint({ ...progress, failed, cursor: chunk.first }, async (client) => {
        for (const index of good) await client.query(ROW, [batch.id, index, batch.attempt]);
      });
      await sleep((batch.payload.pause_seconds ?? 0) * 1000);
    }
  },

  async slow(batch) {
    const until = Date.now() + batch.payload.seconds * 1000;
    while (Date.now() < until) {
      batch.signal.throwIfAborted();
      await sleep(50);
    }
    await batch.complete(async (client) => {
      await client.query(ROW, [batch.id, 0, batch.attempt]);
    }, { slow: true });
  },
};

const pool = new pg.Pool(); // PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE
const worker = new Worker(pool, handlers, { leaseSeconds: Number(process.env.BATCHQ_LEASE_SECONDS ?? 60) });
for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => worker.stop());
console.error(`worker started: ${worker.id}`);
await worker.run();
await pool.end();
