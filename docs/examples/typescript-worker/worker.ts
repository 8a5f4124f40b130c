// A worker of batchq in TypeScript, on the functions of the protocol (docs/protocol.md). It needs only `pg`.
import { randomUUID } from "node:crypto";
import { hostname } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import type { Pool, PoolClient } from "pg";

/** The claim is lost: the batch was cancelled, rescued or finished. Nothing that was written for it has committed. */
export class LeaseLost extends Error {}
/** The worker stops: the batch is released, and its attempt is not counted. */
export class Stopping extends Error {}
/** The attempt has run for longer than the batch allows. */
export class TimedOut extends Error {}
/** The batch fails, whatever attempts are left. */
export class FinalError extends Error {}

export interface FailedItem { index: number; error: string; retryable?: boolean }
export interface Progress { done?: number; failed?: FailedItem[]; recovered?: number[]; cursor?: unknown }
export interface Chunk { first: number; indexes: number[]; items: any[]; isRetry: boolean }
export type Handler = (batch: Batch) => Promise<unknown>;
export interface Options { queue?: string; concurrency?: number; leaseSeconds?: number; pollSeconds?: number }

/** A row that batchq.claim returns. */
interface Row {
  id: string; kind: string; payload: any; items_total: number | null; items_done: number; items_failed: number;
  attempt: number; max_attempts: number; timeout_seconds: number | null; cursor: any; claim_token: string;
}

/** One claimed batch, as its handler sees it. */
export class Batch {
  readonly interrupt = new AbortController();
  completed = false;
  itemsRun: number;

  constructor(private readonly pool: Pool, readonly row: Row, private readonly leaseSeconds: number) {
    this.itemsRun = row.items_done + row.items_failed;
  }

  get id(): string { return this.row.id; }
  get payload(): any { return this.row.payload; }
  get attempt(): number { return this.row.attempt; }
  /** Aborted, with the reason, when the handler should end: LeaseLost, Stopping or TimedOut. */
  get signal(): AbortSignal { return this.interrupt.signal; }

  /** Call a function of the protocol whose first arguments are the id and the token. */
  async call<T = boolean>(on: Pool | PoolClient, name: string, ...more: unknown[]): Promise<T> {
    const places = more.map((_, number) => `, $${number + 3}`).join("");
    const found = await on.query(`SELECT batchq.${name}($1, $2${places}) AS answer`, [this.id, this.row.claim_token, ...more]);
    return found.rows[0].answer;
  }

  /** Write rows of your own and complete the batch: both commit, or neither. */
  async complete(write: (client: PoolClient) => Promise<void>, result: unknown = null): Promise<void> {
    await this.transaction(write, (client) => this.call(client, "complete", json(result)));
    this.completed = true;
  }

  /** Write rows of your own and save progress: both commit, or neither. */
  async checkpoint(progress: Progress, write: (client: PoolClient) => Promise<void> = async () => {}): Promise<void> {
    const { done = 0, failed = [], recovered = [], cursor } = progress;
    const failures = JSON.stringify(failed.map(({ error, ...rest }) => ({ ...rest, error: text(error) })));
    await this.transaction(write, (client) =>
      this.call(client, "checkpoint", done, failures, json(cursor), this.leaseSeconds, recovered));
    this.itemsRun += done + failed.filter(({ index }) => index >= this.itemsRun).length;
    this.signal.throwIfAborted();
  }

  /** The items that are left: first those after the last checkpoint, then those that failed in earlier attempts. */
  async *chunks(size: number): AsyncGenerator<Chunk> {
    while (this.itemsRun < (this.row.items_total ?? 0)) {
      this.signal.throwIfAborted();
      const first = this.itemsRun;
      const items = await this.call<any[] | null>(this.pool, "items", first, size);
      if (items === null) throw this.lose();
      yield { first, indexes: items.map((_, number) => first + number), items, isRetry: false };
      if (this.itemsRun === first) throw new Error("write a checkpoint for each chunk");
    }
    for (let last = -1; ; ) {
      this.signal.throwIfAborted();
      const { rows } = await this.pool.query("SELECT * FROM batchq.items_to_retry($1, $2, $3)",
        [this.id, this.row.claim_token, size]);
      if (rows.length === 0) return;
      if (rows[0].item_index <= last) throw new Error("write a checkpoint for each chunk");
      last = rows[0].item_index;
      yield { first: last, indexes: rows.map((row) => row.item_index), items: rows.map((row) => row.item), isRetry: true };
    }
  }

  lose(): LeaseLost {
    const error = new LeaseLost(`batch ${this.id} is no longer claimed by this worker`);
    this.interrupt.abort(error);
    return error;
  }

  private async transaction(write: (client: PoolClient) => Promise<void>, end: (client: PoolClient) => Promise<boolean>) {
    const client = await this.pool.connect();
    try {
      await client.query("BEGIN");
      await write(client);
      if (!(await end(client))) throw this.lose();
      await client.query("COMMIT");
      client.release();
    } catch (error) {
      client.release(true); // closes the connection, which rolls back
      throw error;
    }
  }
}

/** Claims batches, runs their handlers, renews leases, and rescues what dead workers have left. */
export class Worker {
  readonly id = `${hostname()}-${process.pid}-${randomUUID().slice(0, 8)}`;
  private readonly running = new Map<Batch, Promise<void>>();
  private readonly stopped = new AbortController();
  private readonly queue: string;
  private readonly concurrency: number;
  private readonly leaseSeconds: number;
  private readonly pollSeconds: number;

  constructor(private readonly pool: Pool, private readonly handlers: Record<string, Handler>, options: Options = {}) {
    this.queue = options.queue ?? "default";
    this.concurrency = options.concurrency ?? 4;
    this.leaseSeconds = options.leaseSeconds ?? 60;
    this.pollSeconds = options.pollSeconds ?? 0.1;
    pool.on("error", (error) => console.error("connection lost:", error.message));
  }

  /** Run until `stop` is called, and until what runs has ended. */
  async run(): Promise<void> {
    const leases = setInterval(() => this.renew(), (this.leaseSeconds * 1000) / 3);
    const rescues = setInterval(() => this.rescue(), (this.leaseSeconds * 1000) / 2);
    while (!this.stopped.signal.aborted) {
      let claimed = 0;
      try {
        claimed = await this.claim();
      } catch (error) {
        console.error("claim failed:", text(error)); // the database is away: try again
      }
      if (claimed === 0) await sleep(this.pollSeconds * 1000, null, { signal: this.stopped.signal }).catch(() => {});
    }
    clearInterval(rescues);
    await Promise.allSettled(this.running.values());
    clearInterval(leases);
  }

  /** Claim nothing more, and tell the handlers. */
  stop(): void {
    this.stopped.abort();
    for (const batch of this.running.keys()) batch.interrupt.abort(new Stopping("the worker stops"));
  }

  private async claim(): Promise<number> {
    const free = this.concurrency - this.running.size;
    if (free === 0) return 0;
    const { rows } = await this.pool.query<Row>("SELECT * FROM batchq.claim($1, $2, $3, $4, $5)",
      [this.queue, Object.keys(this.handlers), this.id, free, this.leaseSeconds]);
    for (const row of rows) {
      const batch = new Batch(this.pool, row, this.leaseSeconds);
      if (this.stopped.signal.aborted) batch.interrupt.abort(new Stopping("the worker stops"));
      this.running.set(batch, this.work(batch).finally(() => this.running.delete(batch)));
    }
    return rows.length;
  }

  private async work(batch: Batch): Promise<void> {
    const seconds = batch.row.timeout_seconds;
    const timeout = seconds === null ? undefined : setTimeout(() =>
      batch.interrupt.abort(new TimedOut(`batch ${batch.id} ran for more than ${seconds} s`)), seconds * 1000);
    let end: () => Promise<boolean>;
    try {
      batch.signal.throwIfAborted();
      const result = (await this.handlers[batch.row.kind]!(batch)) ?? null;
      end = () => batch.call(this.pool, "complete", json(result));
    } catch (error) {
      end = this.outcome(batch, error);
    } finally {
      clearTimeout(timeout);
    }
    if (batch.completed) return;
    for (let tries = 0; ; tries++) {
      try {
        // Written twice it does no harm: the second time, the claim is not held any more.
        if (!(await end())) console.error(`batch ${batch.id}: the claim is lost, nothing was written`);
        return;
      } catch (error) {
        console.error(`batch ${batch.id}: the outcome was not written:`, text(error));
        if (tries === 5) return; // its lease expires, and another attempt follows
        await sleep(200 * 2 ** tries);
      }
    }
  }

  private outcome(batch: Batch, error: unknown): () => Promise<boolean> {
    const cause = batch.signal.aborted ? batch.signal.reason : error;
    if (cause instanceof Stopping) return () => batch.call(this.pool, "release");
    return () => batch.call(this.pool, "fail", text(cause), null, cause instanceof FinalError);
  }

  private async renew(): Promise<void> {
    for (const batch of this.running.keys()) {
      try {
        if (!(await batch.call(this.pool, "extend", this.leaseSeconds))) batch.lose();
      } catch (error) {
        console.error("leases were not renewed:", text(error));
      }
    }
  }

  private async rescue(): Promise<void> {
    await this.pool.query("SELECT batchq.rescue($1)", [this.queue]).catch((error) => console.error("rescue failed:", text(error)));
  }
}

/** A value as JSON text, for a parameter of type jsonb; null for none. */
function json(value: unknown): string | null {
  return value === undefined || value === null ? null : JSON.stringify(value);
}

/** An error as Postgres stores it: JSON has no NUL, and text no half of a pair. */
function text(error: unknown): string {
  const message = String(error instanceof Error ? error.message : error).slice(0, 2000).replaceAll("\0", "\ufffd");
  return Buffer.from(message).toString();
}
