#!/usr/bin/env bash
# Prints manifests/install.yaml: the chart with its default values, for people without helm. Usage: install-manifest.sh HELM
set -euo pipefail
helm=${1:?path of helm}
cd "$(dirname "$0")/.."

cat <<'YAML'
# Generated from charts/flotilla by `make install-manifest`; do not edit.
#
#   kubectl apply --server-side -f manifests/install.yaml
apiVersion: v1
kind: Namespace
metadata:
  name: flotilla-system
  labels:
    pod-security.kubernetes.io/enforce: restricted
    pod-security.kubernetes.io/warn: restricted
    pod-security.kubernetes.io/audit: restricted
YAML
# What only means something to helm stays out.
"$helm" template flotilla charts/flotilla --namespace flotilla-system |
  sed -e '/^ *helm\.sh\/chart:/d' -e 's/^\( *app\.kubernetes\.io\/managed-by:\) Helm$/\1 kubectl/' -e '/^# Source: /d' \
    -e '/^  annotations:$/{N;/helm\.sh\/resource-policy/d}'
