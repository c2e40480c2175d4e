"""The steps of ops/container/Containerfile, run in a folder of the release that it begins from."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

FILE = Path("ops/container/Containerfile")
_INSTRUCTION = re.compile(r"^([A-Z]+) +(.*)$", re.DOTALL)
# What a user of the container does: connect with the password, and find a row that was committed. The model is the checkout's.
_USE = r"""
umask 077
echo "a secret of this test" >/srv/password
chown postgres: /srv/password
mkdir -p /srv/models && cp -r .models/. /srv/models && chmod -R a+rX /srv/models
export PGPORT
runuser -u postgres -- env POSTGRES_PASSWORD_FILE=/srv/password {command} >/srv/container.log 2>&1 &
server=$!
trap 'kill -INT $(head -1 "$PGDATA/postmaster.pid") 2>/dev/null; wait $server || true' EXIT
export PGPASSWORD="a secret of this test"
run_sql() {{ psql -X -q -At -v ON_ERROR_STOP=1 "host=127.0.0.1 port=$PGPORT user=postgres dbname=embedline"; }}
for second in $(seq 120); do run_sql <<<"SELECT 1" >/dev/null 2>&1 && break; sleep 1; done
run_sql <<'SQL' || {{ cat /srv/container.log; exit 1; }}
CREATE TABLE page (id integer PRIMARY KEY, body text NOT NULL);
SELECT embedline.create_model('small', 'sentence-transformers', '/srv/models/static-256');
SELECT embedline.create_pipeline('page', 'page', 'body', 'small');
INSERT INTO page VALUES (1, 'Two transactions wait for each other.'), (2, 'Knead the dough and bake it.');
SQL
for second in $(seq 180); do
    found=$(run_sql <<<"SELECT key FROM embedline.search('page', 'how bread is made', 1)")
    [ "$found" != 2 ] || break
    sleep 1
done
if [ "$found" != 2 ]; then echo "nothing is embedded after $second s"; cat /srv/container.log; exit 1; fi
echo "found $second s after its commit"
"""


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield the instructions of a Containerfile: the word, and the rest with its continued lines."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if found := _INSTRUCTION.match(line.strip()):
            yield found[1], found[2]


def release(text: str) -> str:
    """Return the release of Debian that the file begins from, such as trixie."""
    image = next(rest for word, rest in instructions(text) if word == "FROM")
    return re.sub(r"^.*debian:|-slim$", "", image)


def script(text: str) -> str:
    """Return the shell script that does what a build and a start of the container do, as root, in a checkout."""
    parts, command = ["set -euo pipefail", "export DEBIAN_FRONTEND=noninteractive"], ""
    for word, rest in instructions(text):
        if word == "ENV":
            name, _, value = rest.partition("=")
            parts.append(f"export {name}={shlex.quote(value)}")
        elif word == "RUN":
            parts.append(f"echo '» '{shlex.quote(rest[:100])}\n{rest}")
        elif word == "COPY":
            source, target = rest.split()
            # As a build has it: what git knows, and nothing that was made here.
            parts.append(f"mkdir -p {target} && git -c safe.directory='*' archive HEAD {source} | tar -x -C {target}")
        elif word == "CMD":
            command = shlex.join(json.loads(rest))
    return "\n".join([*parts, _USE.format(command=command)])
