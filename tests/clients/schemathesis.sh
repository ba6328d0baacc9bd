#!/bin/sh
# Asks a server over a tiny checkpoint what its OpenAPI document allows and what it does not; fails if an answer is not as
# documented.
#
#   python3 -m venv .venv && .venv/bin/pip install -r tests/clients/requirements-schemathesis.txt
#   PATH=.venv/bin:$PATH tests/clients/schemathesis.sh path/to/flotilla-worker [arguments of schemathesis run]
set -eu
worker=$(realpath "${1:?usage: schemathesis.sh path/to/flotilla-worker}")
shift
here=$(cd "$(dirname "$0")" && pwd)
state=$(mktemp -d)
server=
trap 'test -z "$server" || kill "$server" 2>/dev/null || true; rm -rf "$state"' EXIT
echo secret > "$state/token"
echo an-api-key-of-this-test | "$worker" hash-key --name schemathesis > "$state/keys"
"$worker" serve --model "$here/../parity/fixtures/tiny-qwen2.5-vl" --served-model-name tiny --listen 127.0.0.1:0 \
    --max-model-len 512 --token-file "$state/token" --api-key-file "$state/keys" > "$state/out" 2> "$state/log" &
server=$!
for _ in $(seq 200); do
    url=$(sed -n 's/^listening on //p' "$state/out")
    if test -n "$url" && python3 -c "import urllib.request as r; r.urlopen('$url/readyz')" 2>/dev/null; then break; fi
    kill -0 "$server" || { cat "$state/log"; exit 1; }
    sleep 0.1
done
# /drain would end the test. Data that are valid by their schema may still be refused: a picture that is none, say.
cd "$state"
schemathesis run "$url/openapi.json" --exclude-path /drain --exclude-path /progress \
    --header 'Authorization: Bearer an-api-key-of-this-test' \
    --checks all --exclude-checks positive_data_acceptance \
    --max-examples "${EXAMPLES:-40}" --request-timeout 120 --workers 1 --suppress-health-check too_slow "$@"
schemathesis run "$url/openapi.json" --include-path /progress --header 'Authorization: Bearer secret' --checks all
kill -0 "$server" || { cat "$state/log"; exit 1; }
