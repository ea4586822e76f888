#!/usr/bin/env bash
# vastai, the command of Vast.ai, ends with status 0 when the server has refused.
#
# Most of its commands print "Failed with error 400: ..." and then exit with 0, so `set -e`, `&&`
# and a crontab take a refusal for success. `update template` is different: it exits with 1. A
# usage error exits with 2, as one expects.
#
# Versions: vastai 1.9.1, Python 3.11. Seen on 2026-11-28:
#     status 0  update endpoint 1 --min_load 100  Failed with error 400: refused for this trial
#     status 0  destroy instance 1 -y             Failed with error 400: refused for this trial
#     status 1  update template abc --name x      refused for this trial
#     status 2  update endpoint                   (usage)
#
# Exit status: 0 as described, 1 it has changed, 2 it couldn't be installed.
set -euo pipefail

folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$folder"' EXIT
{ python3 -m venv "$folder/venv" && "$folder/venv/bin/pip" install -q --no-compile vastai==1.9.1; } || exit 2

# A server that refuses everything, in the form of Vast's own refusals.
cat >"$folder/server.py" <<'PYTHON'
import http.server
import json


class Refuse(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"success": False, "msg": "refused for this trial"}).encode()
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
print(server.server_address[1], flush=True)
server.serve_forever()
PYTHON
"$folder/venv/bin/python" "$folder/server.py" >"$folder/port" &
server=$!
for _ in $(seq 100); do
    [ -s "$folder/port" ] && break
    sleep 0.1
done
url=http://127.0.0.1:$(cat "$folder/port")

as_described=0
expect() { # STATUS COMMAND...
    local expected=$1 status=0
    shift
    # No proxy and no other address: whatever isn't on loopback finds nobody.
    env -i PATH="$PATH" HOME="$folder" VAST_API_KEY=key-of-no-account VASTAI_NO_UPDATE_CHECK=1 \
        https_proxy=http://127.0.0.1:9 http_proxy=http://127.0.0.1:9 no_proxy=127.0.0.1 \
        "$folder/venv/bin/vastai" "$@" --url "$url" >"$folder/said" 2>&1 </dev/null || status=$?
    printf 'status %d  %-34s %s\n' "$status" "$*" "$(tail -n 1 "$folder/said")"
    [ "$status" = "$expected" ] || as_described=1
}

expect 0 update endpoint 1 --min_load 100
expect 0 destroy instance 1 -y
expect 1 update template abc --name x
expect 2 update endpoint
exit "$as_described"
