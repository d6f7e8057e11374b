"""What a conversation's second turn waits for: with ``llumnix serve`` running, ask twice and print the time
to the first token of each turn. The second repeats the first with its answer, as every chat client does;
where the server keeps KV in host memory it computes only what is new.

    python examples/second_turn.py --url http://127.0.0.1:8000 --conversations 8 --json FILE
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import httpx

WORDS = ("time", "person", "year", "way", "day", "thing", "man", "world", "life", "hand", "part", "child")
ANSWER_TOKENS = 32


def first_token_s(client: httpx.Client, messages: list[dict[str, str]]) -> tuple[float, str]:
    """Seconds to the first token of an answer, and the answer."""
    body: dict[str, Any] = {
        "model": client.get("/v1/models").json()["data"][0]["id"],
        "messages": messages,
        "max_tokens": ANSWER_TOKENS,
        "stream": True,
        "temperature": 0,
    }
    answer, first_s, began = "", 0.0, time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            text = json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            if text and not answer:
                first_s = time.perf_counter() - began
            answer += text
    return first_s, answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--words", type=int, default=600, help="of the first message")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    turns: list[list[float]] = [[], []]
    with httpx.Client(base_url=options.url, timeout=120.0) as client:
        for number in range(options.conversations):
            words = (WORDS[(number * 7 + index * index) % len(WORDS)] for index in range(options.words))
            messages = [{"role": "user", "content": f"{number}: {' '.join(words)}"}]
            for seconds in turns:
                first_s, answer = first_token_s(client, messages)
                seconds.append(first_s)
                messages += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": "And then?"},
                ]
    report = {
        "benchmark": "second turn",
        "conversations": options.conversations,
        "words": options.words,
        "first_turn_ms": [round(s * 1e3, 1) for s in turns[0]],
        "second_turn_ms": [round(s * 1e3, 1) for s in turns[1]],
        "first_turn_ms_p50": round(statistics.median(turns[0]) * 1e3, 1),
        "second_turn_ms_p50": round(statistics.median(turns[1]) * 1e3, 1),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
