const { appendFileSync } = require("node:fs");
const { setTimeout: sleep } = require("node:timers/promises");
const Bull = require("bull");

const queue = new Bull("jobs", process.env.REDIS_URL);
const note = (line) => appendFileSync(process.env.LOG, `${line}\n`);

async function work({ data: { id, what } }) {
  note(`begin ${id}`);
  if (what === "kill") process.kill(process.pid, "SIGKILL");
  await sleep(what * 1000);
  note(`end ${id}`);
}

async function main([order, id, what]) {
  if (order === "consume") {
    if (process.env.CLOSE) process.on("SIGTERM", () => queue.close());
    return queue.process(1, work);
  }
  if (order === "put") await queue.add({ id, what }, { attempts: 3 });
  else {
    const counts = await queue.getJobCounts();
    console.log(counts.waiting, counts.active, counts.failed);
  }
  await queue.close();
}

main(process.argv.slice(2));
