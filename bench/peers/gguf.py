"""The model as llama.cpp reads it, by llama.cpp's own converter."""

import os
import subprocess
import sys
from pathlib import Path

# The converter knows tokenizers by a fingerprint, and not ours. What it is, is GPT-2's: byte-level
# BPE behind GPT-2's regular expression.
CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion import base
for kind in vars(base).values():
    if isinstance(kind, type) and "get_vocab_base_pre" in vars(kind):
        kind.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
del sys.argv[:1]
runpy.run_path(sys.argv[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


class NotConverted(Exception):
    """llama.cpp's converter failed; the text has the end of what it said."""


def gguf_file(model: Path, llama: Path) -> Path:
    """`model` in GGUF, float32, beside its folder; made now unless it is there.

    `llama` is the folder that peers.sh has made. Raises NotConverted.
    """
    source = llama / "source" / "vendor" / "llama.cpp"
    target = model.with_suffix(".f32.gguf")
    if target.exists():
        return target
    partial = target.with_suffix(".partial")
    command = [sys.executable, "-c", CONVERT, str(source), str(model)]
    command += ["--outtype", "f32", "--outfile", str(partial)]
    env = os.environ | {"NO_LOCAL_GGUF": "1", "PYTHONPATH": str(llama / "convert")}
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, env=env
    )
    if done.returncode or not partial.exists():
        raise NotConverted(f"{done.stdout[-500:]}{done.stderr[-2000:]}")
    partial.rename(target)
    return target
