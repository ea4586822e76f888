// What the executables have in common: the connection, and the queues.
import { basename } from "node:path";
import { PgBoss } from "pg-boss";

export const connectionString = process.env.DATABASE_URL ?? "postgresql://127.0.0.1:5432/postgres";

// Seconds without a heartbeat after which a worker is taken for dead. pg-boss takes 10 at least.
export const HEARTBEAT = Number(process.env.HEARTBEAT ?? 30);

// Three tries in all; without `expireInSeconds` a job ends after 15 minutes.
export const queueOptions = { retryLimit: 2, heartbeatSeconds: HEARTBEAT, expireInSeconds: 86_399 };

export async function connect() {
  // Nothing runs in the background. `backlog` does what a supervisor would, each second at most.
  const boss = new PgBoss({
    connectionString,
    max: 2,
    supervise: false,
    schedule: false,
    monitorIntervalSeconds: 1,
  });
  boss.on("error", fail);
  await boss.start();
  return boss;
}

export function fail(error) {
  console.error(`${basename(process.argv[1])}: ${error.message || error.code}`);
  process.exit(1);
}
