#!/usr/bin/env bash
# What `cargo build --features cuda` needs, in one folder; prints the folder. Usage: toolchain.sh FOLDER
#
#   FOLDER/bin/nvcc   NVIDIA's compiler, without the kernels that the worker has no use for
#   FOLDER/include    its headers
#   FOLDER/lib        archives that stand in for NVIDIA's libraries (stand_ins.py)
#
# The compiler is the nvcc 13 of this machine ($NVCC, $CUDA_HOME/bin/nvcc or that of the PATH), else it comes from PyPI.
# Neither a GPU nor a driver nor root is needed.
set -euo pipefail
folder=${1:?folder for the tool chain}
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."

fail() {
  printf 'make build-cuda: %s\n' "$@" >&2
  exit 1
}

[ "$(uname -sm)" = 'Linux x86_64' ] ||
  fail "the stand-ins for NVIDIA's libraries are written for Linux on x86-64, this is $(uname -sm)." \
    "Build in a container of that platform: docker build --platform linux/amd64 -f docker/worker-cuda.Dockerfile ."
for program in cargo gcc g++ ar python3; do
  command -v "$program" >/dev/null || fail "$program is missing. It needs cargo, gcc, g++, ar (binutils) and python3 on the PATH; on Debian and Ubuntu: apt-get install g++ binutils python3 python3-pip"
done

# nvcc of this machine, if it is one that fits: CUDA 13, as the bindings.
release() { "$1" --version 2>/dev/null | sed -n 's/^Cuda compilation tools, release \([0-9]*\.[0-9]*\).*/\1/p'; }
nvcc=
for candidate in "${NVCC:-}" "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
  [ -n "$candidate" ] && [ -x "$candidate" ] || continue
  case $(release "$candidate") in
  13.*) nvcc=$(readlink -f "$candidate") && break ;;
  *) echo "$candidate is of release $(release "$candidate"); CUDA 13 is needed" >&2 ;;
  esac
done

metadata=$(cargo metadata --locked --format-version 1 --filter-platform x86_64-unknown-linux-gnu --features flotilla-worker/cuda) ||
  fail "cargo cannot read the workspace or fetch its crates (above)."
crate() {
  python3 -c 'import json, pathlib, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == sys.argv[1]:
        print(pathlib.Path(package["manifest_path"]).parent)' "$1" <<<"$metadata"
}
cudarc=$(crate cudarc)
kernels=$(crate candle-kernels)
[ -d "$cudarc" ] && [ -d "$kernels" ] || fail "the sources of the crates cudarc and candle-kernels are not there: run 'cargo fetch --locked'."

key=$(cat "$here"/{toolchain.sh,stand_ins.py,build.txt} <(echo "$nvcc" "$cudarc" "$kernels") | sha256sum | cut -d' ' -f1)
if [ "$(cat "$folder/COMPLETE" 2>/dev/null)" = "$key" ]; then
  echo "$folder"
  exit
fi
rm -f "$folder/COMPLETE"
mkdir -p "$folder/bin"

if [ -z "$nvcc" ]; then
  echo "no nvcc 13 on this machine: 104 MB from PyPI into $folder" >&2
  python3 -m pip --version >/dev/null 2>&1 ||
    fail "python3 has no pip. On Debian and Ubuntu: apt-get install python3-pip. Or install CUDA 13 and set CUDA_HOME."
  # --upgrade: a second call replaces what a broken off one left.
  python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps --no-compile --only-binary=:all: --require-hashes --upgrade \
    --target "$folder/packages" -r "$here/build.txt" >&2 ||
    fail "pip could not install scripts/cuda/build.txt (above). A mirror is set with PIP_INDEX_URL, a proxy with HTTPS_PROXY."
  nvcc=$(cd "$folder/packages" && pwd)/nvidia/cu13/bin/nvcc
fi
ln -sfn "$(dirname "$(dirname "$nvcc")")/include" "$folder/include"

# Most of candle's CUDA code is for quantised matrices of GGUF files, which the worker does not read: leaving it out saves about 12
# minutes of a processor and 25 MB. Its sources become objects and a module without content; stand_ins.py has the launchers.
cat >"$folder/bin/nvcc" <<WRAPPER
#!/usr/bin/env bash
# Written by scripts/cuda/toolchain.sh.
set -euo pipefail
after() { # the argument that follows \$1
  local flag=\$1 previous=
  shift
  for argument; do
    [ "\$previous" = "\$flag" ] && echo "\$argument" && return
    previous=\$argument
  done
}
case \${*: -1} in
*/moe/moe_*.cu | */mmvq_gguf.cu | */mmq_gguf/*.cu)
  exec gcc -x c -c /dev/null -o "\$(after -o "\$@")"
  ;;
*/quantized.cu)
  printf '.version 7.0\n.target sm_80\n.address_size 64\n' >"\$(after --output-directory "\$@")/quantized.ptx"
  exit
  ;;
esac
exec "$nvcc" "\$@"
WRAPPER
chmod +x "$folder/bin/nvcc"

python3 "$here/stand_ins.py" --cudarc "$cudarc" --candle-kernels "$kernels" --out "$folder/lib" >&2
ln -sfn lib "$folder/lib64"
echo "$key" >"$folder/COMPLETE"
echo "$folder"
