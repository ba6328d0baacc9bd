{{- define "flotilla.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "flotilla.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "flotilla.name" .) .Release.Name }}
{{- printf "%s-operator" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s-operator" .Release.Name (include "flotilla.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "flotilla.selectorLabels" -}}
app.kubernetes.io/name: {{ include "flotilla.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "flotilla.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "flotilla.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: flotilla
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "flotilla.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "flotilla.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name is needed where serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Image by digest where there is one: tags move. */}}
{{- define "flotilla.image" -}}
{{- $image := .image }}
{{- if $image.digest }}
{{- printf "%s@%s" $image.repository $image.digest }}
{{- else }}
{{- printf "%s:%s" $image.repository (default .tag $image.tag) }}
{{- end }}
{{- end }}

{{/* What a pass may do. Each verb is one that the code uses: tests/tests/cluster_rbac.rs fails for a verb too many or too few. */}}
{{- define "flotilla.passRules" -}}
- apiGroups: [flotilla.dev]
  resources: [datasets, modeldeployments]
  verbs: [list, watch]
# A job is deleted when its time to live is over.
- apiGroups: [flotilla.dev]
  resources: [trainingjobs]
  verbs: [list, watch, delete]
# Checkpoints are registered as a learner writes them, and forgotten as it removes them.
- apiGroups: [flotilla.dev]
  resources: [modelcheckpoints]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [flotilla.dev]
  resources: [datasets/status, modelcheckpoints/status, modeldeployments/status, trainingjobs/status]
  verbs: [patch]
{{- if .Values.rbac.ownerReferencesPermissionEnforcement }}
- apiGroups: [flotilla.dev]
  resources: [datasets/finalizers, modelcheckpoints/finalizers, modeldeployments/finalizers, trainingjobs/finalizers]
  verbs: [update]
{{- end }}
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, create, patch, delete]
# Tokens of workers: made once and read by name. Never listed, watched, changed or deleted (the garbage collector does that).
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, create]
- apiGroups: [""]
  resources: [services]
  verbs: [get, create, patch]
# A repeated event is counted in the first one.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end }}
