"""Memory: how many KV slots a batch will need, in tokens. Integers only, no estimates.

A *closed* batch is allocated at once: every row as long as the longest input plus the slice, so
N rows of input length up to L that run at most S iterations hold N x (L + S) slots (SCLS's bound,
as reconstructed). Because only S more tokens can be added, the bound uses L + S where a scheduler
without slices has to use the longest input plus the longest output.
"""


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, element_bytes: int) -> int:
    """Bytes of keys and values for one token: 2 x layers x kv_heads x head_dim x element size."""
    return 2 * layers * kv_heads * head_dim * element_bytes


def closed_batch_tokens(batch_size: int, input_tokens_max: int, iterations: int) -> int:
    """KV slots of a closed batch: N x (L + S)."""
    return batch_size * (input_tokens_max + iterations)


def token_budget(capacity_tokens: int, share: float) -> int:
    """The slots a scheduler may plan with: floor(share x capacity).

    `share` (zeta, at most 1) leaves room for fragmentation and temporaries.
    """
    return int(capacity_tokens * share)


def batch_size_limit(budget_tokens: int, input_tokens_max: int, iterations: int) -> int:
    """The largest N with N x (L + S) <= budget; 0 if not even one row fits."""
    return max(0, budget_tokens) // max(1, input_tokens_max + iterations)


def leased_blocks(prompt_tokens: int, until: int, block_tokens: int) -> int:
    """Blocks that a request may occupy until it has made output token number `until`: the prompt
    and all output but the last token, which is never fed back before the next lease."""
    return max(0, -(-(prompt_tokens + until - 1) // block_tokens))
