"""Stand-ins for curl, jq and websocat on a machine that lacks them: exactly what the snippets and examples use."""

from __future__ import annotations

import json
import sys
import threading
import urllib.error
import urllib.request
from typing import Any


def curl(arguments: list[str]) -> int:
    """``curl [-f] [-s] [-S] [-X METHOD] [-H HEADER]… [-d BODY] URL``, short flags also joined (``-fsS``)."""
    flags: set[str] = set()
    values: dict[str, list[str]] = {"-X": [], "-H": [], "-d": []}
    urls: list[str] = []
    rest = iter(arguments)
    for each in rest:
        if each in values:
            values[each].append(next(rest))
        elif each.startswith("-"):
            flags |= set(each[1:])
        else:
            urls.append(each)
    if flags - set("fsS") or len(urls) != 1:
        print(f"curl stand-in: cannot do {arguments}", file=sys.stderr)
        return 2
    body = "&".join(values["-d"]).encode() if values["-d"] else None
    request = urllib.request.Request(urls[0], data=body)
    if values["-X"]:
        request.method = values["-X"][-1]
    for header in values["-H"]:
        name, _, value = header.partition(":")
        request.add_header(name, value.strip())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = response.read()
    except urllib.error.HTTPError as error:
        with error:
            answer = error.read()
        if "f" in flags:
            return 22
    except urllib.error.URLError as error:
        print(f"curl stand-in: {error}", file=sys.stderr)
        return 7
    sys.stdout.buffer.write(answer)
    return 0


def jq(arguments: list[str]) -> int:
    """``jq -r .name``."""
    option, path = arguments
    assert option == "-r"
    assert path.startswith(".")
    value: Any = json.load(sys.stdin)[path[1:]]
    print(value if isinstance(value, str) else json.dumps(value))
    return 0


def websocat(arguments: list[str]) -> int:
    """``websocat [-n] URL``: sends each line, prints each message; closes at the end of its input unless ``-n``."""
    import websocket

    connection = websocket.create_connection(arguments[-1], timeout=60)

    def send() -> None:
        for line in sys.stdin:
            connection.send(line.rstrip("\n"))
        if "-n" not in arguments:
            connection.send_close()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        while True:
            opcode, data = connection.recv_data()
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                break
            print(data.decode(), flush=True)
    except websocket.WebSocketConnectionClosedException:
        pass
    sender.join()
    if connection.sock is not None:
        connection.sock.close()
    return 0


if __name__ == "__main__":
    sys.exit({"curl": curl, "jq": jq, "websocat": websocat}[sys.argv[1]](sys.argv[2:]))
