const { appendFileSync } = require("node:fs");
const { setTimeout: sleep } = require("node:timers/promises");

const note = (line) => appendFileSync(process.env.LOG, `${line}\n`);

module.exports = async ({ id, what }) => {
  note(`begin ${id}`);
  if (what === "kill") process.kill(process.pid, "SIGKILL");
  await sleep(what * 1000);
  note(`end ${id}`);
};
