# serve.sh PORT FOLDER: become a PostgreSQL that keeps what it stores there. It refuses to be root.
programs=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
database="$2/db$1"
mkdir "$database"
as_user=
if [ "$(id -u)" = 0 ]; then
    chmod 711 "$2"
    chown postgres "$database"
    as_user="setpriv --reuid postgres --regid postgres --clear-groups --"
fi
cd "$database" || exit 1
$as_user "$programs/initdb" -D "$database" -U postgres -A trust --no-sync
exec $as_user "$programs/postgres" -D "$database" -h 127.0.0.1 -p "$1" \
    -c unix_socket_directories= -c fsync=off
