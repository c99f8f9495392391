{{- define "portolan.name" -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "portolan.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "portolan.name" .) -}}
{{- end -}}

{{- define "portolan.image" -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
