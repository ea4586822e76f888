const { appendFileSync } = require("node:fs");
const { setTimeout: sleep } = require("node:timers/promises");
const Queue = require("bee-queue");

const queue = new Queue("jobs", { redis: process.env.REDIS_URL, stallInterval: 5000 });
const note = (line) => appendFileSync(process.env.LOG, `${line}\n`);

async function work({ data: { id, what } }) {
  note(`begin ${id}`);
  if (what === "kill") process.kill(process.pid, "SIGKILL");
  await sleep(what * 1000);
  note(`end ${id}`);
}

async function main([order, id, what]) {
  if (order === "consume") {
    if (process.env.STALLED) queue.checkStalledJobs(5000);
    if (process.env.CLOSE) process.on("SIGTERM", () => queue.close(30_000));
    return queue.process(1, work);
  }
  if (order === "put") await queue.createJob({ id, what }).retries(2).save();
  else {
    const health = await queue.checkHealth();
    console.log(health.waiting, health.active, health.failed);
  }
  await queue.close();
}

main(process.argv.slice(2));
