"""A client in a network namespace of its own: streams completions at once and prints, as JSON, what each
received and how long it waited at most."""

import asyncio
import json
import sys
import time

import httpx


async def stream(
    client: httpx.AsyncClient, url: str, prompt: str, tokens: int, seed: int
) -> dict[str, object]:
    body = {"model": "simulated", "prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True}
    text, gap_s, last = "", 0.0, time.monotonic()
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                gap_s, last = max(gap_s, time.monotonic() - last), time.monotonic()
    return {"text": text, "gap_s": gap_s}


async def main(url: str, prompt: str, tokens: int, count: int) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        print(
            json.dumps(await asyncio.gather(*(stream(client, url, prompt, tokens, n) for n in range(count))))
        )


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
