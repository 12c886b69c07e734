{{- define "steerserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "steerserve.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "steerserve.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "steerserve.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The Service's name: a DNS label that begins with a letter, which other names need not be. */}}
{{- define "steerserve.service" -}}
{{- $name := include "steerserve.fullname" . | replace "." "-" -}}
{{- ternary $name (printf "s-%s" $name) (regexMatch "^[a-z]" $name) -}}
{{- end -}}

{{/* What selects the server's pods; it may never change in a Deployment that exists. */}}
{{- define "steerserve.selector" -}}
app.kubernetes.io/name: {{ include "steerserve.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "steerserve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{ include "steerserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end -}}

{{- define "steerserve.metadata" -}}
name: {{ include "steerserve.fullname" . | quote }}
namespace: {{ .Release.Namespace | quote }}
labels:
  {{- include "steerserve.labels" . | nindent 2 }}
{{- end -}}

{{- define "steerserve.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "steerserve.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "steerserve.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "steerserve.claim" -}}
{{- default (printf "%s-weights" (include "steerserve.fullname" .)) .Values.weights.existingClaim -}}
{{- end -}}

{{/* A flag and its value. YAML's numbers arrive as floats, which would be written 1e+06. */}}
{{- define "steerserve.flag" -}}
{{- $value := .value -}}
{{- if kindIs "bool" $value -}}
--{{ ternary "" "no-" $value }}{{ .name }}
{{- else if and (kindIs "float64" $value) (eq (floor $value) $value) -}}
--{{ .name }}={{ int64 $value }}
{{- else -}}
--{{ .name }}={{ $value }}
{{- end -}}
{{- end -}}

{{/* The server's own pods as a peer of the network policy. */}}
{{- define "steerserve.replicas" -}}
- podSelector:
    matchLabels:
      {{- include "steerserve.selector" . | nindent 6 }}
{{- end -}}

{{- define "steerserve.sharesLimits" -}}
{{- if or .Values.limits.store .Values.limits.existingSecret -}}yes{{- end -}}
{{- end -}}

{{- define "steerserve.args" -}}
- serve
- {{ printf "--host=%s" .Values.server.host | quote }}
- {{ include "steerserve.flag" (dict "name" "port" "value" .Values.server.port) | quote }}
- {{ include "steerserve.flag" (dict "name" "metrics-port" "value" .Values.server.metricsPort) | quote }}
- {{ include "steerserve.flag" (dict "name" "drain-seconds" "value" .Values.server.drainSeconds) | quote }}
{{- if .Values.weights.enabled }}
{{- range $flag, $key := dict "model" "path" "sae" "sae" "attributes" "attributes" }}
{{- with get $.Values.model $key }}
- {{ printf "--%s=%s/%s" $flag $.Values.weights.mountPath . | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- if .Values.keys.existingSecret }}
- {{ printf "--keys=/etc/steerserve/keys/%s" .Values.keys.item | quote }}
{{- end }}
{{- if .Values.fleet.existingSecret }}
- {{ printf "--fleet-secret=/etc/steerserve/fleet/%s" .Values.fleet.item | quote }}
- "--replica-address=$(POD_IP)"
{{- end }}
{{- if .Values.limits.existingSecret }}
- "--limits-store=$(LIMITS_STORE)"
{{- else if .Values.limits.store }}
- {{ printf "--limits-store=%s" .Values.limits.store | quote }}
{{- end }}
{{- if include "steerserve.sharesLimits" . }}
- {{ printf "--limits-store-failure=%s" .Values.limits.failure | quote }}
{{- end }}
{{- range $name, $value := .Values.server.flags }}
{{- range ternary $value (list $value) (kindIs "slice" $value) }}
- {{ include "steerserve.flag" (dict "name" $name "value" .) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* preStop, the drain, the 5 s in which the last answers are sent, and 10 s to spare. */}}
{{- define "steerserve.graceSeconds" -}}
{{- addf .Values.preStopSeconds .Values.server.drainSeconds 15 | ceil | int64 -}}
{{- end -}}

{{- define "steerserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "steerserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}
