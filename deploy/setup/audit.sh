#!/usr/bin/env bash
# Looks up every pinned version in the advisory database of PyPI, with pip-audit in an environment of its own.
#
# Exit status: 0 nothing is known, 1 something is, 3 the database or pip-audit could not be reached: then nothing was audited.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${AUDIT_VENV:-.venv-audit}
pip_audit=2.10.1

say() { printf '[audit] %s\n' "$*" >&2; }
not_audited() {
  say "NOT AUDITED: $*"
  say "this needs the network: pip-audit from PyPI once, and PyPI's advisories at each run"
  exit 3
}

if ! "$venv/bin/python" -m pip_audit --version 2>/dev/null | grep -q "$pip_audit"; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check "pip-audit==$pip_audit" >&2 \
    || not_audited "pip-audit $pip_audit could not be installed"
fi

pins=$(mktemp)
report=$(mktemp)
trap 'rm -f "$pins" "$report"' EXIT
grep -E '^[A-Za-z0-9._-]+==' constraints.txt >"$pins"
say "$(wc -l <"$pins") pinned packages"
status=0
"$venv/bin/python" -m pip_audit --requirement "$pins" --no-deps --disable-pip --progress-spinner off \
  --timeout 30 >"$report" 2>&1 || status=$?
missing=$(grep -c 'could not be audited' "$report" || true)
if [ "$missing" -gt 0 ]; then
  not_audited "PyPI's advisories were not to be had for $missing of $(wc -l <"$pins") packages (a mirror without them?)"
fi
cat "$report"
if [ "$status" -ne 0 ] && ! grep -qE '^(Found [0-9]+ known vulnerabilit|Name +Version +ID)' "$report"; then
  not_audited "the advisories could not be read"
fi
exit "$status"
