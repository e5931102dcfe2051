"""Requests that begin in one engine step, so that synchronous training is the same to the bit every time.

Which requests share a step of the engine decides the shapes of its matrix products, and these may decide how sums are
rounded (not so with 1 M parameters on one thread, where it was compared). Requests that arrive one by one join whatever
step comes next, by chance. Held back until all are there, in their order and with an empty cache, they run the same
steps every time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from actors.engine_settings import PAUSE_MODE

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

PATIENCE_S = 10.0  # for requests that were refused and never come


@asynccontextmanager
async def started_together(engine: AsyncLLM, paused: asyncio.Lock, requests: int) -> AsyncIterator[None]:
    """The ``requests`` that the block adds to the idle ``engine`` begin when all of them are in its queue. ``paused``:
    held by whoever pauses the engine."""
    async with paused:
        await engine.pause_generation(mode=PAUSE_MODE, clear_cache=True)
        try:
            yield
            deadline = time.monotonic() + PATIENCE_S
            # counted where a request is registered, just before it is sent; what is sent later comes later
            while engine.get_num_unfinished_requests() < requests and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0)
        finally:
            await engine.resume_generation()
