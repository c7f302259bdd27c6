"""Which event loop measures: uvloop where it is installed (uvicorn brings it), since its stamps are late by less under many streams."""

from __future__ import annotations

import asyncio


def new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
