"""The installation and the removal, by the words of docs/how-to/install.md and remove.md, on a cluster of pg_createcluster.

The first says how to read it: the `sh` blocks as root, one after the other in one shell, and the `sql` blocks in between with
psql; of the lines marked “adapt” the one that names PostgreSQL's major version is adapted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

INSTALL, REMOVE = Path("docs/how-to/install.md"), Path("docs/how-to/remove.md")
_BLOCK = re.compile(r"^( *)```(sh|sql)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_MAJOR = re.compile(r"^export PG=\d+", re.MULTILINE)
# Debian 12 has no package of pgvector, says the page: there the set-up of the checkout has built it from source.
_PGVECTOR_PACKAGE = re.compile(r"^.*apt-get install.*-pgvector.*\n", re.MULTILINE)
# A cluster as an administrator finds it: no locale is set, as in a shell of cron or of a container. What a failed run left
# in the folder goes first.
_CLUSTER = """
major=$(apt-cache depends postgresql | sed -n 's/.*Depends: postgresql-\\([0-9]*\\)$/\\1/p')
apt-get install --yes "postgresql-$major"
if pg_lsclusters -h | grep -q "^$major *main "; then pg_dropcluster --stop "$major" main; fi
rm -rf /opt/embedline /srv/models
pg_createcluster "$major" main
"""
# What the page promises: a row that is committed is found, without any call of ours. The models are the checkout's.
_USE = r"""
mkdir -p /srv/models
cp -r .models/. /srv/models
run_sql() { runuser -u postgres -- psql -X -q -At -v ON_ERROR_STOP=1 "$DB"; }
run_sql <<'SQL'
CREATE TABLE platform_page (id integer PRIMARY KEY, body text NOT NULL);
SELECT embedline.create_model('platform', 'sentence-transformers', '/srv/models/static-256');
SELECT embedline.create_pipeline('platform_page', 'platform_page', 'body', 'platform');
INSERT INTO platform_page VALUES (1, 'Two transactions wait for each other.'), (2, 'Knead the dough and bake it.');
SQL
for second in $(seq 180); do
    found=$(run_sql <<<"SELECT key FROM embedline.search('platform_page', 'how bread is made', 1)")
    [ "$found" != 2 ] || break
    sleep 1
done
if [ "$found" != 2 ]; then
    echo "the scheduled worker has embedded nothing after $second s"
    run_sql <<<"SELECT status, return_message FROM cron.job_run_details ORDER BY runid DESC LIMIT 5"
    exit 1
fi
echo "found $second s after its commit"
"""
_REMOVED = r"""
left=$(runuser -u postgres -- psql -X -At "$DB" -c "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'embedline%'")
rows=$(runuser -u postgres -- psql -X -At "$DB" -c "SELECT count(*) FROM platform_page")
if [ -n "$left" ] || [ "$rows" != 2 ]; then echo "left: $left; rows of the user's table: $rows"; exit 1; fi
pg_dropcluster "$PG" "$CLUSTER" --stop
rm -rf /srv/models
"""


def script(install: str, remove: str, *, pgvector_package: bool) -> str:
    """Return the shell script that installs by one page, uses what is installed, and removes it by the other."""
    parts = [_CLUSTER, *_commands(install, INSTALL), _USE, *_commands(remove, REMOVE), _REMOVED]
    text = _MAJOR.sub("export PG=$major", "\n".join(parts))
    return "set -euo pipefail\n" + (text if pgvector_package else _PGVECTOR_PACKAGE.sub("", text))


def _commands(page: str, name: Path) -> Iterator[str]:
    """Return the commands of a page's blocks; each prints its block before."""
    blocks = _BLOCK.findall(page)
    if not blocks:
        raise SystemExit(f"{name} has no sh or sql block")
    for indent, language, text in blocks:
        lines = "\n".join(line.removeprefix(indent) for line in text.splitlines())
        shown = f"cat <<'BLOCK'\n\n» {language}\n{lines}\nBLOCK\n"
        if language == "sql":
            lines = f"runuser -u postgres -- psql -X -v ON_ERROR_STOP=1 \"$DB\" <<'SQL'\n{lines}\nSQL"
        yield shown + lines + "\n"
