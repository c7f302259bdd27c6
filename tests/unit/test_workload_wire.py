"""The measuring HTTP client against raw sockets that answer in every way a server may."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from ksana_lab.errors import ConfigError
from ksana_lab.workload.wire import ConnectionLost, HttpClient


@asynccontextmanager
async def server(*answers: bytes, closes: bool = False):
    """Answers each request on a connection with the next of ``answers``; yields (client, how many connections were made, heads seen)."""
    waiting, connections, heads = list(answers), [], []

    async def serve(reader, writer):
        connections.append(1)
        while waiting:
            try:
                heads.append(await reader.readuntil(b"\r\n\r\n"))
            except asyncio.IncompleteReadError:
                break
            writer.write(waiting.pop(0))
            await writer.drain()
            if closes:
                break
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = HttpClient(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/base")
    try:
        yield client, connections, heads
    finally:
        await client.close()
        listener.close()


def body(answer) -> bytes:
    return b"".join(piece for _, piece in answer.pieces)


LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n0\r\n\r\n\r\n1\r\n!\r\n0\r\n\r\n"


async def test_a_body_of_stated_length_and_one_in_chunks():
    async with server(LENGTH, CHUNKED) as (client, connections, heads):
        assert body(await client.request("GET", "/a")) == b"ok"
        assert body(await client.request("POST", "/b")) == b"0\r\n\r\n!"  # looks like the end of chunks, is none
    assert len(connections) == 1
    assert heads[0].startswith(b"GET /base/a HTTP/1.1\r\nHost: 127.0.0.1:")


async def test_a_body_without_length_ends_with_its_connection():
    async with server(b"HTTP/1.1 200 OK\r\n\r\nall of it", closes=True) as (client, _, _):
        assert body(await client.request("GET", "/")) == b"all of it"


async def test_a_connection_lost_in_mid_answer_is_an_error():
    async with server(CHUNKED[:-5], closes=True) as (client, _, _):
        with pytest.raises(ConnectionLost):
            await client.request("GET", "/")


async def test_an_idle_connection_that_the_server_gave_up_is_replaced():
    async with server(LENGTH, LENGTH, closes=True) as (client, connections, _):
        assert body(await client.request("GET", "/")) == b"ok"
        assert body(await client.request("GET", "/")) == b"ok"
    assert len(connections) == 2


async def test_what_is_no_http_is_an_error():
    async with server(b"SSH-2.0-OpenSSH\r\n\r\n") as (client, _, _):
        with pytest.raises(ConnectionLost, match="does not speak HTTP"):
            await client.request("GET", "/")


async def test_cutting_off_returns_and_the_connection_is_not_used_again():
    async with server(CHUNKED[:-5], LENGTH) as (client, connections, _):
        answer = await client.request("GET", "/", on_start=lambda answer: answer.cut_off())
        assert (answer.status, answer.is_cut_off, answer.pieces) == (200, True, [])
        assert body(await client.request("GET", "/")) == b"ok"
    assert len(connections) == 2


@pytest.mark.parametrize("url", ["127.0.0.1:9080", "ftp://host", "http://", "http://host:port"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="is no URL like"):
        HttpClient(url)
