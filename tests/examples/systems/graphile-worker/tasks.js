const { makeWorkerUtils } = require("graphile-worker");

const COUNT = `
  SELECT count(*) FILTER (WHERE locked_at IS NULL AND run_at <= now() AND attempts < max_attempts),
    count(*) FILTER (WHERE locked_at IS NOT NULL),
    count(*) FILTER (WHERE attempts >= max_attempts)
  FROM graphile_worker.jobs`;

async function main([order, id, what]) {
  const connectionString = `postgresql://postgres@127.0.0.1:${process.env.PORT}/postgres`;
  const utils = await makeWorkerUtils({ connectionString });
  await utils.migrate();
  if (order === "put") await utils.addJob("work", { id, what }, { maxAttempts: 3 });
  else {
    const rows = await utils.withPgClient((client) => client.query({ text: COUNT, rowMode: "array" }));
    console.log(rows.rows[0].join(" "));
  }
  await utils.release();
}

main(process.argv.slice(2));
