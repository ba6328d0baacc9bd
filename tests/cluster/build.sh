#!/usr/bin/env bash
# Builds the real control plane from the modules in go.mod: etcd, kube-apiserver, kube-controller-manager, kube-scheduler,
# kubectl and helm. Once per set of versions; prints the folder of the programs. Needs Go and its module proxy, nothing else.
set -euo pipefail
cd "$(dirname "$0")"

kubernetes=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
helm=$(go list -m -f '{{.Version}}' helm.sh/helm/v4)
key=$(cat go.mod go.sum build.sh etcd/main.go <(go env GOVERSION GOOS GOARCH) | sha256sum | cut -c1-12)
cache=${FLOTILLA_CACHE:-$HOME/.cache/flotilla}/control-plane
bin=$cache/$kubernetes-$key
if [ -f "$bin/COMPLETE" ]; then
  echo "$bin"
  exit
fi

echo "building Kubernetes $kubernetes and helm $helm from source into $bin: about 15 minutes on 2 cores, once" >&2
mkdir -p "$cache"
# One build at a time: a second caller waits and finds the programs.
exec 9>"$cache/lock"
flock 9
if [ -f "$bin/COMPLETE" ]; then
  echo "$bin"
  exit
fi
new=$(mktemp -d "$cache/new.XXXXXX")
trap 'rm -rf "$new"' EXIT

IFS=. read -r major minor _ <<<"${kubernetes#v}"
flags="-s -w -buildid="
for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
  flags+=" -X $package.gitVersion=$kubernetes -X $package.gitMajor=$major -X $package.gitMinor=$minor"
done
flags+=" -X helm.sh/helm/v4/internal/version.version=$helm"
export CGO_ENABLED=0 GOFLAGS=-mod=readonly
go build -p "${FLOTILLA_GO_JOBS:-$(nproc)}" -trimpath -ldflags "$flags" -o "$new/" \
  ./etcd \
  k8s.io/kubernetes/cmd/kube-apiserver \
  k8s.io/kubernetes/cmd/kube-controller-manager \
  k8s.io/kubernetes/cmd/kube-scheduler \
  k8s.io/kubernetes/cmd/kubectl \
  helm.sh/helm/v4/cmd/helm >&2
touch "$new/COMPLETE"
chmod 755 "$new"
rm -rf "$bin"
mv "$new" "$bin"
trap - EXIT
echo "$bin"
