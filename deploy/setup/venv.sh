#!/usr/bin/env bash
# Makes .venv with what is asked for: `venv.sh serve` (the services and `tranche bench`) or `venv.sh dev` (tests too).
#
# A stamp keyed on the pinned versions makes a second call free. Settings from the environment:
#   PYTHON  the interpreter to build on (3.11 or newer); default: the first that fits
#   TORCH   cpu, cuda or auto (default): CUDA where nvidia-smi answers, else CPU
#   VENV    the folder (default .venv)
set -euo pipefail
cd "$(dirname "$0")/../.."

extra=${1:?usage: venv.sh serve|dev}
venv=${VENV:-.venv}
torch_version=$(sed -n 's/^torch==//p' constraints.txt)

say() { printf '[setup] %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer with the venv module."
    echo "$PYTHON"
    return
  fi
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
    if fits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer with the venv module is needed (Debian: apt install python3-venv)." \
    "Point to one with: make PYTHON=/path/to/python3 ..."
}

torch_kind() {
  case "${TORCH:-auto}" in
    cpu | cuda) echo "$TORCH" ;;
    auto)
      if [ "$(uname -s)" != Linux ]; then echo cuda; # one build for all on macOS
      elif nvidia-smi >/dev/null 2>&1; then echo cuda
      else echo cpu; fi
      ;;
    *) fail "TORCH=$TORCH is not known; use cpu, cuda or auto." ;;
  esac
}

install_torch() {
  # A bare `torch` on Linux is the CUDA build with gigabytes of libraries; hence the CPU index.
  if [ "$1" = cuda ]; then
    "$pip" install -q --no-compile -c constraints.txt "torch==$torch_version"
    return
  fi
  "$pip" install -q --no-compile --retries 0 --no-deps \
    --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch_version+cpu" && return
  say "no CPU build of torch $torch_version to be had; taking the default build (large)"
  "$pip" install -q --no-compile -c constraints.txt "torch==$torch_version"
}

kind=$(torch_kind)
key=$(cat pyproject.toml constraints.txt deploy/setup/venv.sh | cksum | tr ' ' '-')
stamp="$venv/.tranche-$extra-$kind-$key"
if [ -e "$stamp" ] || [ -e "$venv/.tranche-dev-$kind-$key" ]; then
  exit 0
fi

started=$SECONDS
pip=$venv/bin/pip
if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  say "making $venv with $("$python" --version) ($(command -v "$python"))"
  "$python" -m venv "$venv"
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
"$pip" install -q --no-compile -c constraints.txt setuptools
say "torch $torch_version ($kind)"
install_torch "$kind"
say "the other packages for: $extra"
# The project is found where it lies; only what it depends on is downloaded. Nothing is compiled
# ahead: Python does that for the few modules that are ever loaded.
"$pip" install -q --no-compile -c constraints.txt --no-build-isolation -e ".[$extra]"
rm -f "$venv"/.tranche-"$extra"-*
touch "$stamp"
say "ready after $((SECONDS - started)) s"
