#!/bin/sh
# Make the cluster at the first start, bring Embedline to the package's version at each, then be the server.
# POSTGRES_PASSWORD_FILE names a file with the superuser's password; POSTGRES_DB names the database (embedline).
set -eu
bin="/usr/lib/postgresql/$PG/bin"
database="${POSTGRES_DB:-embedline}"

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    if [ ! -r "${POSTGRES_PASSWORD_FILE:-}" ]; then
        echo "POSTGRES_PASSWORD_FILE must name a file with the superuser's password" >&2
        exit 1
    fi
    "$bin/initdb" --encoding UTF8 --locale C.UTF-8 --auth-local peer --auth-host scram-sha-256 \
        --pwfile "$POSTGRES_PASSWORD_FILE" >/dev/null
    # pg_cron connects through the Unix socket, where peer authentication lets it in.
    cat >>"$PGDATA/postgresql.conf" <<CONF
listen_addresses = '*'
shared_preload_libraries = 'pg_cron'
cron.database_name = '$database'
cron.host = '/var/run/postgresql'
CONF
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
fi

# No client connects from outside before the schema is there.
"$bin/pg_ctl" --silent --wait --options "-c listen_addresses=''" start >&2
if [ "$(psql -X -At -d postgres -v name="$database" -f - <<'SQL'
SELECT count(*) FROM pg_database WHERE datname = :'name';
SQL
)" = 0 ]; then
    createdb "$database"
fi
/opt/embedline/bin/embedline upgrade --dsn "postgresql:///$database" >&2
psql -X -q -v ON_ERROR_STOP=1 "$database" <<'SQL' >/dev/null
CREATE EXTENSION IF NOT EXISTS pg_cron;
SELECT embedline.schedule_workers(1)
WHERE NOT EXISTS (SELECT FROM cron.job WHERE jobname LIKE 'embedline worker %');
SQL
"$bin/pg_ctl" --silent --wait --mode fast stop >&2
exec "$bin/postgres"
