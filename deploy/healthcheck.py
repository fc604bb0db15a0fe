"""A container's health: exit status 0 if this port answers 200 to this path, else 1 and the reason.

    python -IS healthcheck.py 9100 /ready [--tls]

`--tls` speaks TLS and asks for no certificate: it is this very machine.

Slim images have neither curl nor wget. Every container runs this every few seconds, so it loads
next to nothing: a raw socket costs a quarter of what http.client does.
"""

import socket
import sys

TIMEOUT_S = 4.0
"""Shorter than the compose file's timeout, so that the reason is still printed."""
ANSWER_BYTES_MAX = 4096


def reason_unhealthy(port: int, path: str, *, tls: bool = False) -> str:
    """Why the service on this machine is not healthy; empty if it is."""
    request = f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
    answer = b""
    try:
        with connected(port, tls=tls) as connection:
            connection.sendall(request)
            while len(answer) < ANSWER_BYTES_MAX and (piece := connection.recv(ANSWER_BYTES_MAX)):
                answer += piece
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    status_line, _, rest = answer.partition(b"\r\n")
    if status_line.split()[1:2] == [b"200"]:
        return ""
    body = rest.rpartition(b"\r\n")[2].decode(errors="replace")
    return f"{status_line.decode(errors='replace')} {body}"


def connected(port: int, *, tls: bool) -> socket.socket:
    """A connection to this machine. Raises OSError."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    if not tls:
        return connection
    import ssl

    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connection)


if __name__ == "__main__":
    sys.exit(reason_unhealthy(int(sys.argv[1]), sys.argv[2], tls="--tls" in sys.argv[3:]) or 0)
