#!/usr/bin/env bash
# graphile-worker: a job that is finished after SIGTERM is logged as a success, and done again.
#
# The worker lets it end, logs "Completed task ... with success" and "Global graceful shutdown
# complete", and ends by SIGTERM. In the table the job is still there, and locked: hours later, once
# its lock has run out, it is done a second time. So a deploy repeats what it has interrupted.
#
# Versions: graphile-worker 0.18.0, Node 20.20, PostgreSQL 15.18 (Debian 12). Seen on 2026-11-28:
#     the job is done
#     ... INFO: Completed task 1 (work, 3017.68ms) with success
#     in the table: 1 job, locked
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
trap '[ ! -e "$folder/db/postmaster.pid" ] || kill -QUIT "$(head -n 1 "$folder/db/postmaster.pid")"
      sleep 0.5; rm -rf "$folder"' EXIT
mkdir -p "$folder/node/tasks"
npm install --prefix "$folder/node" --no-audit --no-fund --loglevel=silent graphile-worker@0.18.0 \
    >/dev/null || exit 2
cat >"$folder/node/tasks/work.js" <<'NODE'
module.exports = async () => {
  console.log("the job begins");
  await new Promise((resolve) => setTimeout(resolve, 3000));
  console.log("the job is done");
};
NODE

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

cd "$folder/node"
node node_modules/.bin/graphile-worker -c "$url" --schema-only >/dev/null 2>&1
"$programs/psql" -qAt "$url" -c "SELECT FROM graphile_worker.add_job('work')"
node node_modules/.bin/graphile-worker -c "$url" >log 2>&1 &
worker=$!
for _ in $(seq 300); do
    grep -q 'the job begins' log && break
    sleep 0.1
done
kill -TERM "$worker"
wait "$worker" || true

grep -e 'the job is done' -e 'Completed task' log || true
left=$("$programs/psql" -qAt "$url" -c \
    "SELECT count(*) || ' job, ' || CASE WHEN bool_and(locked_at IS NOT NULL) THEN 'locked' ELSE 'free' END
     FROM graphile_worker.jobs")
echo "in the table: $left"
grep -q 'Completed task 1 .* with success' log && [ "$left" = "1 job, locked" ]
