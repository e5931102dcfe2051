#!/usr/bin/env bash
# Prometheus and Chromium, which tests/integration/test_watching.py needs. Installs what is missing, as root on Debian.
set -euo pipefail
missing=()
for program in prometheus chromium; do command -v "$program" > /dev/null || missing+=("$program"); done
if [ "${#missing[@]}" = 0 ]; then exit 0; fi
if [ "$(id -u)" != 0 ]; then
  echo "system packages missing: run 'apt-get install -y ${missing[*]}' as root" >&2
  exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
