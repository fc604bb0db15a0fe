"""The request of load generators that count raw bytes: a stream of exactly so many tokens."""

import msgspec


def stream_request(model: str, tokens: int, *, closes: bool = False) -> bytes:
    """Head and body; always the same prompt and seed, so that each place of the output has one
    right token. `closes`: the connection ends with the answer."""
    body = msgspec.json.encode(
        {
            "model": model,
            "prompt": list(range(10, 26)),
            "max_tokens": tokens,
            "ignore_eos": True,
            "seed": 1,
            "stream": True,
            "return_token_ids": True,
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n"
    head += "connection: close\r\n" if closes else ""
    return head.encode() + b"content-type: application/json\r\n\r\n" + body
