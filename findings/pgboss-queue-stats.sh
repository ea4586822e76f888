#!/usr/bin/env bash
# pg-boss: getQueueStats() doesn't count. It answers from a cache of up to an hour, and with
# `force: true` from what was counted in the last minute.
#
# Three jobs are put in, and it says three. Two more are put in, then all are taken out, and it goes
# on saying three, forced or not. Who scales by it starts too little, and pays for what is done.
#
# Versions: pg-boss 12.38.0, Node 20.20 (it asks for 22.12; it runs), PostgreSQL 15.18 (Debian 12).
# Seen on 2026-11-28:
#     3 jobs in the table: getQueueStats() says 3, with force 3
#     5 jobs in the table: getQueueStats() says 3, with force 3
#     0 jobs in the table: getQueueStats() says 3, with force 3
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
trap '[ ! -e "$folder/db/postmaster.pid" ] || kill -QUIT "$(head -n 1 "$folder/db/postmaster.pid")"
      sleep 0.5; rm -rf "$folder"' EXIT
mkdir "$folder/node"
npm install --prefix "$folder/node" --no-audit --no-fund --loglevel=silent pg-boss@12.38.0 >/dev/null ||
    exit 2

# A PostgreSQL of our own, which refuses to run as root.
programs=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1)
[ -n "$programs" ] || { echo "Debian's package postgresql is not installed"; exit 2; }
as_user=()
[ "$(id -u)" != 0 ] || { chown postgres "$folder" && as_user=(runuser -u postgres --); }
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=postgresql://postgres@127.0.0.1:$port/postgres
(
    cd "$folder"
    "${as_user[@]}" "$programs/initdb" -D "$folder/db" -U postgres -A trust --no-sync >/dev/null
    "${as_user[@]}" "$programs/pg_ctl" -D "$folder/db" -l "$folder/db.log" -w -o \
        "-h 127.0.0.1 -p $port -c unix_socket_directories= -c fsync=off" start >/dev/null
)

cat >"$folder/node/stats.mjs" <<'NODE'
import { PgBoss } from "pg-boss";

const boss = new PgBoss(process.argv[2]);
boss.on("error", console.error);
await boss.start();
await boss.createQueue("jobs");

const seen = [];
const putIn = (count) => boss.insert("jobs", Array(count).fill({ data: {} }));
for (const change of [() => putIn(3), () => putIn(2), () => boss.deleteQueuedJobs("jobs")]) {
  await change();
  const { rows } = await boss.getDb().executeSql("SELECT count(*)::int AS n FROM pgboss.job");
  const [cached] = await boss.getQueueStats("jobs");
  const [forced] = await boss.getQueueStats("jobs", { force: true });
  const numbers = [rows[0].n, cached.queuedCount, forced.queuedCount];
  console.log("%d jobs in the table: getQueueStats() says %d, with force %d", ...numbers);
  seen.push(...numbers);
}
await boss.stop({ graceful: false });
process.exit(seen.join(" ") === "3 3 3 5 3 3 0 3 3" ? 0 : 1);
NODE
node "$folder/node/stats.mjs" "$url"
