"""The Ray API: watch a request move, from Python.

Start a cluster first (`make serve`), then run this beside it, with the token of its Ray:
`RAY_AUTH_MODE=token .venv/bin/python examples/ray_api.py`.
"""

import asyncio

import llumnix


async def main() -> None:
    async with await llumnix.connect() as cluster:
        first, second = [row.instance_id for row in await cluster.instances() if row.state == "serving"][:2]

        text, moved = "", False
        stream = cluster.generate("Once upon a time", max_tokens=60, temperature=0.0, request_id="story")
        async for piece in stream:
            text += piece.text
            if len(text) > 20 and not moved:
                row = next(row for row in await cluster.requests() if row.request_id == "story")
                target = second if row.instance_id == first else first
                print(f"moving the story from {row.instance_id} to {target}:", end=" ")
                print(await cluster.migrate("story", to=target))
                moved = True
        print(f"Once upon a time{text}")

        for event in await cluster.events():
            print(f"{event.kind:<20} {event.text}")
        print(await cluster.status())


if __name__ == "__main__":
    asyncio.run(main())
