"""The worker's settings."""

import socket
from typing import ClassVar, Literal

from pydantic import Field

from shared.config import ServiceSettings, settings_config
from shared.model_name import served_name

Device = Literal["auto", "cpu", "cuda"]
DataType = Literal["auto", "float32", "bfloat16", "float16"]


class WorkerSettings(ServiceSettings):
    """One worker: one model on one device, run by one engine."""

    model_config = settings_config("worker")
    service: ClassVar[str] = "worker"

    name: str = Field(default_factory=socket.gethostname)
    """Shown in metrics, traces and on the dashboard; its queue adds a random part. Default: the
    host's name, which tells scaled containers apart; give each of several on one host its own."""
    model: str = ""
    """A folder, or an id on the model hub, of a causal language model of transformers."""
    model_name: str = ""
    """What requests call it; empty: the folder's own name, or the hub id."""
    revision: str = ""
    """A branch, tag or commit of a hub model; empty: the default branch."""
    engine: str = "paged"
    """What runs the slices: paged (continuous batching, leases), padded (closed batches), vllm (its
    own environment), or simulated (no model: a cost profile says how long all takes,
    and the text is nonsense)."""
    device: Device = "auto"
    """auto: CUDA where there is one."""
    dtype: DataType = "auto"
    """auto: the checkpoint's own type on CUDA, float32 on a CPU."""
    torch_threads: int = Field(default=0, ge=0)
    """Threads for arithmetic on the CPU; 0: PyTorch's own choice, which is every core;
    give less where other workers or programs run on the same machine."""

    context_tokens_max: int = Field(default=0, ge=0)
    """Longest prompt plus output; 0: the model's own limit."""
    batch_size_max: int = Field(default=256, ge=0)
    """Most requests in one batch; 0: only memory limits it."""
    kv_tokens: int = Field(default=0, ge=0)
    """KV cache capacity in tokens; 0: from the free memory at the start."""
    kv_memory_share: float = Field(default=0.0, ge=0.0, le=0.95)
    """Share of the free memory for the KV cache; 0: 0.85 on CUDA, 0.2 on a CPU, where other
    processes live too."""
    kv_block_tokens: int = Field(default=16, ge=1, le=1024)
    """Engine paged: KV is given out in blocks of so many tokens; on CUDA a multiple of 16."""
    kv_host_tokens: int = Field(default=0, ge=0)
    """Engine paged: KV of parked requests that host memory keeps when the device needs the room."""
    share_prefixes: bool = True
    """Engine paged: requests with the same beginning share its KV. It shows in times to the first
    token what others have asked before."""
    weights: Literal["auto", "int8"] = "auto"
    """Engine paged on a CPU: int8 rounds weights and inputs of linear layers to 8 bits, which is
    three to four times as fast; the text is another."""
    fuse: bool = True
    """Engine paged on a CPU: run models of Llama's shape by compiled kernels."""
    prefill_chunk_tokens: int = Field(default=4096, ge=1)
    """Most input tokens, padding counted, in one iteration of prefill: it bounds how long a
    cancelled request still costs, and the memory of activations."""

    vllm_compile: bool = False
    """Engine vllm: compile the model before serving, which takes a minute or more, for faster
    iterations."""

    profile: str = "llama-2-13b-a100"
    """Engine simulated: the cost profile, a name in deploy/costs or a JSON file. It also says how
    much KV there is, where kv_tokens does not."""
    simulated_lengths: str = "mean=256"
    """Engine simulated: how long outputs would get by themselves. A CSV or Parquet file with a
    column output_tokens: row (seed + choice) modulo the number of rows. Or mean=TOKENS: 4096 rows
    of an exponential distribution. max_tokens cuts it; ignore_eos makes it max_tokens."""
    simulated_noise: float | None = Field(default=None, ge=0, le=1)
    """Engine simulated: standard deviation of an iteration's time over its mean; without it, the
    profile's own."""
    simulated_speed: float = Field(default=1.0, gt=0, le=1000)
    """Engine simulated: how many times faster than the profile says."""

    pretend_workers: int = Field(default=0, ge=0, le=10_000)
    """Engine simulated: this process pretends to be so many workers. They share its connections,
    send their tokens together every 100 ms, and beat in one message. 0: it is a plain worker."""

    def served_name(self) -> str:
        """The model's name in requests."""
        return served_name(self.model, self.model_name)
