#!/bin/bash
# Measure Embedline on a machine with a GPU: `INPUTS=folder OUT=folder bash run.sh`. README.md names the inputs and settings.
set -u
umask 022
# Names that a machine may use for something else.
[ "${1:-}" = --do ] || unset T0 DATA RESULTS HERE SOURCE LIBS
export INPUTS=${INPUTS:?} OUT=${OUT:?}
export HERE=${HERE:-$(cd "$(dirname "$0")" && pwd)}
export SOURCE=${SOURCE:-$(cd "$HERE/../../.." && pwd)}
export ROOT=${ROOT:-/opt/embedline-gpu} PG=${PG:-/opt/embedline-gpu/pg} PORT=${PORT:-54329} PGUSER_OS=${PGUSER_OS:-postgres}
export PYTHON=${PYTHON:-/usr/bin/python3} TORCH_PYTHON=${TORCH_PYTHON:-python3}
export DEVICE=${DEVICE:-cuda} N=${N:-200000} NLONG=${NLONG:-12000} BUILD=${BUILD:-auto} JOBS=${JOBS:-$(nproc)}
export WORKER_COUNTS=${WORKER_COUNTS:-1 2 4 8} LONG_WORKERS=${LONG_WORKERS:-4 8} BUDGET=${BUDGET:-450} DRAIN_LIMIT=${DRAIN_LIMIT:-45}
export BARE_SECONDS=${BARE_SECONDS:-40} HOST_SECONDS=${HOST_SECONDS:-6} ITEMS=${ITEMS:-1024} SHARED_BUFFERS=${SHARED_BUFFERS:-8GB}
export T0=${T0:-$(date +%s)}
TORCH_SITE=${TORCH_SITE:-$("$TORCH_PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')}
export TORCH_SITE SERVER_PATH=${SERVER_PATH:-$ROOT/site:$ROOT/src/python_udfs:$TORCH_SITE}
export MODEL_DIR=${MODEL_DIR:-$ROOT/model} SHORT=${SHORT:-$ROOT/short.txt} LONG=${LONG:-$ROOT/long.txt}
export RESULTS=$ROOT/results.txt DATA=$ROOT/data SOCKETS=$ROOT/sock
export EMBEDLINE_DSN="postgresql://postgres@/embedline?host=$SOCKETS&port=$PORT"
LIB_PATH=${LIB_PATH:-${LD_LIBRARY_PATH:-}}
for folder in /usr/local/nvidia/lib64 /usr/local/nvidia/lib "$PG/lib"; do
    [ -d "$folder" ] && [[ :$LIB_PATH: != *:$folder:* ]] && LIB_PATH=${LIB_PATH:+$LIB_PATH:}$folder
done
export LIB_PATH
unset PYTHONDONTWRITEBYTECODE PYTHONPATH TOKENIZERS_PARALLELISM OMP_NUM_THREADS OMP_WAIT_POLICY

left() { echo $((BUDGET - $(date +%s) + T0)); }
note() { printf 'RESULT %s\n' "$*" | tee -a "$RESULTS"; }
given() { [ -f "$INPUTS/$1" ]; }

# As the server's user, with the environment of a server and nothing else.
as_server() {
    local kept=() name
    for name in $(compgen -e | grep -E '^(NVIDIA|CUDA)_' || true); do kept+=("$name=${!name}"); done
    setpriv --reuid="$PGUSER_OS" --regid="$(id -g "$PGUSER_OS")" --init-groups -- env -i "${kept[@]}" \
        PATH="$PG/bin:/usr/local/nvidia/bin:/usr/local/bin:/usr/bin:/bin" HOME="$ROOT/home" LANG=C.UTF-8 LD_LIBRARY_PATH="$LIB_PATH" \
        PYTHONPATH="$SERVER_PATH" TMPDIR="$ROOT/tmp" HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 "$@"
}
# A step of steps.py as root, which may read every process, or as the server's user, whom alone the model host serves.
bench() {
    LD_LIBRARY_PATH=$LIB_PATH PYTHONPATH=$SERVER_PATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 exec "$PYTHON" "$ROOT/src/tests/bench/gpu/steps.py" "$@"
}
bench_as_server() {
    local pairs=() name
    for name in RESULTS MODEL_DIR SHORT LONG DEVICE N NLONG EMBEDLINE_DSN; do pairs+=("$name=${!name}"); done
    as_server "${pairs[@]}" PYTHONUNBUFFERED=1 "$PYTHON" "$ROOT/src/tests/bench/gpu/steps.py" "$@"
}
limit() {
    PYTHONPATH=$SERVER_PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true exec "$PYTHON" "$ROOT/src/tests/bench/gpu/limit.py" \
        "$MODEL_DIR" "$SHORT" "$LONG" "$DEVICE" "$((N / 2))"
}

do_unpack() {
    mkdir -p "$ROOT"/{site,src,model,home,sock,tmp}
    (cd "$SOURCE" && cp -r python_udfs sql alembic alembic.ini tests "$ROOT/src/")
    if given model.hi.xz; then
        xz -dc "$INPUTS/model.hi.xz" >"$ROOT/model.hi" && xz -dc "$INPUTS/model.lo.xz" >"$ROOT/model.lo" &&
            tar xJf "$INPUTS/model-files.tar.xz" -C "$ROOT/model" && "$PYTHON" - <<'P' || return 1
import os

root = os.environ["ROOT"]
high, low = open(f"{root}/model.hi", "rb").read(), open(f"{root}/model.lo", "rb").read()
whole = bytearray(len(high) + len(low))
whole[0::2], whole[1::2] = low, high
open(f"{root}/model/model.safetensors", "wb").write(whole)
P
        rm -f "$ROOT"/model.hi "$ROOT"/model.lo
    fi
    if given short.txt.xz; then xz -dc "$INPUTS/short.txt.xz" >"$SHORT"; fi
    if given long.txt.xz; then xz -dc "$INPUTS/long.txt.xz" >"$LONG"; fi
    if given site.tar.xz; then tar xJf "$INPUTS/site.tar.xz" -C "$ROOT/site"; fi
    "$PYTHON" -m compileall -q -j 0 "$ROOT/site" "$ROOT/src/python_udfs" >/dev/null 2>&1
    id "$PGUSER_OS" >/dev/null 2>&1 || useradd --system --home-dir "$ROOT/home" --shell /bin/bash "$PGUSER_OS" || return 1
    chmod -R a+rX "$ROOT"/{site,src,model}
    touch "$RESULTS"
    chmod 666 "$RESULTS"
    rm -rf "$DATA" "$SOCKETS" "$ROOT/tmp"
    mkdir -p "$DATA" "$SOCKETS" "$ROOT/home" "$ROOT/tmp"
    chown -R "$PGUSER_OS" "$DATA" "$SOCKETS" "$ROOT/home" "$ROOT/tmp"
    chmod 700 "$DATA" "$ROOT/tmp"
    chmod 755 "$ROOT" "$SOCKETS"
}
# PostgreSQL and pgvector as they were compiled elsewhere; PL/Python is compiled for the Python that is here.
do_prebuilt() {
    local include library name
    mkdir -p "$PG" && tar xJf "$INPUTS/pg.tar.xz" -C "$PG" --strip-components=1 && "$PG/bin/postgres" --version || return 1
    tar xJf "$INPUTS/plpython.tar.xz" -C "$ROOT" || return 1
    include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    library=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
    name=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("INSTSONAME"))')
    cd "$ROOT/plpython" && printf '%s\0' ./*.c | xargs -0 -P "$JOBS" -I{} gcc -O2 -fPIC -fwrapv -fno-strict-aliasing -w \
        -I. -I"$include" -I"$("$PG/bin/pg_config" --includedir-server)" -c {} &&
        gcc -shared -o "$("$PG/bin/pg_config" --pkglibdir)/plpython3.so" ./*.o -L"$library" -l:"$name" -Wl,-rpath,"$library" || return 1
    ! ldd "$PG/bin/postgres" "$("$PG/bin/pg_config" --pkglibdir)"/{plpython3,vector}.so | grep "not found"
}
do_source() {
    rm -rf "$PG" "$ROOT/build"
    mkdir -p "$ROOT/build" "$PG"
    tar xJf "$INPUTS/pgsrc.tar.xz" -C "$ROOT/build" && bash "$HERE/build_pg.sh" "$ROOT/build/postgresql" "$PG" "$PYTHON" "$JOBS" &&
        make -s -j"$JOBS" -C "$ROOT/build/pgvector" OPTFLAGS= PG_CONFIG="$PG/bin/pg_config" install >"$ROOT/build/pgvector.out" 2>&1
}
do_cluster() {
    local memory=posix folder
    [ "$(df -k --output=avail /dev/shm 2>/dev/null | tail -1)" -gt 2500000 ] 2>/dev/null || memory=mmap
    if ! as_server test -r "$TORCH_SITE/torch/__init__.py"; then
        echo "the server's user cannot read $TORCH_SITE: opening it"
        folder=$TORCH_SITE
        while [ "$folder" != / ]; do chmod a+rx "$folder" && folder=$(dirname "$folder"); done
        chmod -R a+rX "$TORCH_SITE"
    fi
    as_server "$PG/bin/initdb" -D "$DATA" -U postgres --encoding UTF8 --locale C.UTF-8 --auth trust >/dev/null || return 1
    cat >>"$DATA/postgresql.conf" <<C
listen_addresses = ''
port = $PORT
unix_socket_directories = '$SOCKETS'
shared_buffers = $SHARED_BUFFERS
max_wal_size = 16GB
max_connections = 60
dynamic_shared_memory_type = $memory
timezone = UTC
log_line_prefix = '%m [%p] '
C
    as_server "$PG/bin/pg_ctl" start -w -t 60 -s -D "$DATA" -l "$DATA/server.log" </dev/null || { tail -20 "$DATA/server.log"; return 1; }
    as_server "$PG/bin/psql" -h "$SOCKETS" -p "$PORT" -U postgres -d postgres -qc 'CREATE DATABASE embedline' -c 'SELECT version()'
}
do_upgrade() {
    cd "$ROOT/src" && LD_LIBRARY_PATH=$LIB_PATH PYTHONPATH=$SERVER_PATH "$PYTHON" -m alembic -c alembic.ini upgrade head
}
do_machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader || true
    lscpu | grep -E 'Model name|^CPU\(s\)' | cut -c1-200
    free -g | head -2
    df -h /dev/shm "$ROOT" | cat
    "$PYTHON" --version
    "$TORCH_PYTHON" - <<'P'
import importlib.metadata as metadata

for name in "torch transformers sentence-transformers tokenizers numpy safetensors psycopg nvidia-ml-py".split():
    try:
        print(name, metadata.version(name), end="; ")
    except metadata.PackageNotFoundError:
        print(name, "missing", end="; ")
print()
P
}
if [ "${1:-}" = --do ]; then
    shift
    "$@"
    exit $?
fi

mkdir -p "$ROOT" "$OUT"
: >"$RESULTS"
chmod 666 "$RESULTS"
exec 3>&1 >>"$OUT/log.txt" 2>&1

# step NAME LEAST LIMIT COMMAND...: nothing that it does stops the others. It is left out if fewer than LEAST seconds are left.
step() {
    local name=$1 least=$2 limit=$3 rest began status lines
    shift 3
    rest=$(left)
    if [ "$rest" -lt "$least" ]; then note "step_$name skipped - $rest s left" >&3; return 1; fi
    [ "$limit" -le "$rest" ] || limit=$rest
    echo "=== $name (at $(($(date +%s) - T0)) s, limit $limit s)"
    lines=$(wc -l <"$RESULTS")
    began=$(date +%s%N)
    timeout -k 5 "$limit" bash "$HERE/run.sh" --do "$@" </dev/null 3>&-
    status=$?
    note "step_$name $((($(date +%s%N) - began) / 1000000)) ms status $status"
    cp "$RESULTS" "$OUT/results.txt"
    tail -n +$((lines + 1)) "$RESULTS" >&3
    return $status
}
cleanup() {
    [ -f "$DATA/server.log" ] && { echo "=== server.log"; grep -vE 'checkpoint (starting|complete)' "$DATA/server.log" | tail -60; }
    echo "=== logs of hosts"
    tail -n 15 "$ROOT"/tmp/embedline-*/*/*.log 2>/dev/null
    [ -f "$DATA/postmaster.pid" ] && as_server timeout 20 "$PG/bin/pg_ctl" stop -m immediate -w -t 15 -s -D "$DATA"
    [ -n "${BARE:-}" ] && kill "$BARE" 2>/dev/null
    note "total_s $(($(date +%s) - T0)) s"
    cp "$RESULTS" "$OUT/results.txt"
    tail -1 "$RESULTS" >&3
}
trap cleanup EXIT

step machine 5 20 do_machine
step unpack 5 60 do_unpack || exit 1
rm -f "$ROOT/go"
env HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 "$TORCH_PYTHON" "$HERE/bare.py" "$MODEL_DIR" "$SHORT" "$LONG" "$DEVICE" "$RESULTS" "$ROOT/go" \
    "$BARE_SECONDS" </dev/null >"$OUT/bare.txt" 2>&1 3>&- &
BARE=$!
built=1
if [ "$BUILD" = none ]; then built=0; fi
if [ $built != 0 ] && [ "$BUILD" != source ]; then step prebuilt 5 60 do_prebuilt; built=$?; fi
if [ $built != 0 ]; then step source 60 240 do_source; built=$?; fi
if [ $built = 0 ]; then
    step cluster 5 60 do_cluster && step upgrade 5 90 do_upgrade && step load 5 60 bench load
fi
# The bare process measures alone.
touch "$ROOT/go"
lines=$(wc -l <"$RESULTS")
waited=$(date +%s)
while kill -0 "$BARE" 2>/dev/null && [ $(($(date +%s) - waited)) -lt $((BARE_SECONDS + 45)) ]; do sleep 0.2; done
kill "$BARE" 2>/dev/null
note "step_bare $(($(date +%s) - waited)) s"
tail -n +$((lines + 1)) "$RESULTS" >&3
[ $built = 0 ] || exit 1
POSTMASTER=$(head -1 "$DATA/postmaster.pid")

step models 10 120 bench models || true
for workers in $WORKER_COUNTS; do
    step drain_$workers 15 90 bench drain tag=w$workers workers=$workers limit=$DRAIN_LIMIT
done
for workers in $LONG_WORKERS; do
    step long_$workers 15 90 bench drain tag=long_w$workers workers=$workers source=pages limit=$DRAIN_LIMIT
done
step hostonly 10 60 bench_as_server hostonly tag=auto items=$ITEMS postmaster=$POSTMASTER seconds=$HOST_SECONDS
step null 10 60 bench null tag=host items=$ITEMS seconds=$HOST_SECONDS
step drain_f32 15 90 bench drain tag=f32_w4 precision=float32 workers=4 limit=$DRAIN_LIMIT
# The next host is one that a worker starts.
step kill_host 5 15 bench kill_host
step drain_worker_host 15 90 bench drain tag=host_of_worker_w4 workers=4 limit=$DRAIN_LIMIT
step limit 25 90 limit
step summary 0 20 bench summary
exit 0
