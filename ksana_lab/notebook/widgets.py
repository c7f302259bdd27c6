"""Panels for a notebook: a cluster, one request, a sweep, a configuration. They show and call; what they show is made elsewhere.

    panel = ClusterPanel(config("pd_1p1d_cpu.yaml"), model_dir=tiny_model())    # the last line of a cell shows it
    answer = await Playground(cluster).ask("Hello")                             # streams into the panel, returns a frame
    runs = await SweepPanel(sweep).run()

Every panel is also text: ``print(panel)``, and where widgets cannot be drawn (a terminal, a rendered page) that is what is seen. Buttons
start tasks on the kernel's loop; in a notebook that runs without a browser, await the method of the same name instead, in one cell."""

from __future__ import annotations

import asyncio
import html
import io
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ipywidgets as ipw
import pandas as pd
from matplotlib.figure import Figure

from ksana_lab.cluster.local import Cluster
from ksana_lab.config.cluster import ClusterConfig
from ksana_lab.errors import KsanaLabError
from ksana_lab.notebook import plots
from ksana_lab.notebook.form import ConfigForm
from ksana_lab.sweep.runner import Progress, Sweep
from ksana_lab.types import Role

__all__ = ["ClusterPanel", "ConfigForm", "Playground", "SweepPanel"]

_REFRESH_S = 1.0
_LOG_LINES = 40
_ANSWER_COLUMNS = ["token", "at_s", "node", "text"]


class Panel:
    """Something drawn as a widget where there is a front end, and as text where there is none."""

    box: ipw.Widget

    def text(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return self.text()

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {**self.box._repr_mimebundle_(**options), "text/plain": self.text()}


class ClusterPanel(Panel):
    """Start and stop a cluster; its nodes with load and free blocks; what they log.

    Of a file or of a form: each start makes a new Cluster, ``panel.cluster``. Of a Cluster: that one, which can be started once. What was
    started here is stopped by ``stop``, by leaving ``with``, or when this process ends."""

    def __init__(self, cluster: Cluster | ConfigForm[ClusterConfig] | str | Path, **options: Any) -> None:
        """``options`` as in ``Cluster.from_yaml`` for a file, as in ``Cluster`` for a form."""
        self.cluster: Cluster | None = cluster if isinstance(cluster, Cluster) else None
        self._name = "cluster of a form" if isinstance(cluster, ConfigForm) else str(cluster)
        self._make: Callable[[], Cluster] | None = None
        if isinstance(cluster, ConfigForm):
            self._make = lambda: Cluster(cluster.value, source="the form", **options)
        elif not isinstance(cluster, Cluster):
            self._make = lambda: Cluster.from_yaml(cluster, **options)
        self._busy = ""
        self._error = ""
        self._status: dict[str, Any] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="cluster-panel")  # httpx's client and the processes: one caller at a time
        self._watch: asyncio.Task | None = None
        self._start = ipw.Button(description="Start", icon="play", button_style="success")
        self._stop = ipw.Button(description="Stop", icon="stop")
        self._start.on_click(lambda _: _spawn(self.start()))
        self._stop.on_click(lambda _: _spawn(self.stop()))
        self._state = ipw.HTML()
        self._table = ipw.HTML()
        self._which = ipw.Dropdown(
            options=[], description="log of", style={"description_width": "initial"}, layout=ipw.Layout(width="16em")
        )
        self._which.observe(lambda _: _spawn(self.refresh()) if self.is_running else None, "value")
        self._log = ipw.HTML()
        self.box = ipw.VBox([ipw.HBox([self._start, self._stop, self._state]), self._table, self._which, self._log])
        self._draw("")

    async def start(self) -> Cluster | None:
        """Starts it and keeps the panel fresh from then on. What goes wrong is shown, and raised for who awaits it."""
        if self._busy or self.is_running:
            return self.cluster
        self._busy, self._error = "starting …", ""
        self._draw("")
        try:
            if self._make is not None:
                self.cluster = await self._in_thread(self._make)
            assert self.cluster is not None
            await self._in_thread(self.cluster.start)
        except KsanaLabError as error:
            self._error = str(error)
            raise
        finally:
            self._busy = ""
            await self.refresh()
        self._watch = asyncio.ensure_future(self._keep_fresh())
        return self.cluster

    async def stop(self) -> None:
        if self._busy or self.cluster is None:
            return
        self._busy = "stopping …"
        self._draw("")
        if self._watch is not None:
            self._watch.cancel()
        await self._in_thread(self.cluster.close)
        self._busy = ""
        await self.refresh()

    async def refresh(self) -> None:
        """Asks the router and the processes once. Of a running cluster this is done every second, once ``start`` was called here."""
        cluster, log = self.cluster, ""
        if cluster is not None:
            self._status = await self._in_thread(cluster.status)
            names = [process["name"] for process in self._status["processes"]]
            if list(self._which.options) != names:
                self._which.options, self._which.value = names, names[0]
            if cluster.is_running and self._which.value:
                log = await self._in_thread(lambda: cluster.logs(self._which.value, _LOG_LINES))
        self._draw(log)

    @property
    def is_running(self) -> bool:
        return self.cluster is not None and self.cluster.is_running

    def close(self) -> None:
        """Stops the cluster and waits for it. May be called twice."""
        if self._watch is not None:
            self._watch.cancel()
        if self.cluster is not None:
            self.cluster.close()
        self._worker.shutdown(wait=False)

    def __enter__(self) -> ClusterPanel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def rows(self) -> pd.DataFrame:
        """The nodes as the router last saw them: one row per process."""
        nodes = {node["inference_addr"]: node for node in self._status.get("nodes", [])}
        rows = []
        for process in self._status.get("processes", []):
            node = nodes.get(process["url"].partition("://")[2], {})
            load = node.get("load", {})
            blocks = f"{load['num_free_blocks']} of {load['num_blocks']}" if load.get("num_blocks") else ""
            is_online = {True: "yes", False: "no"}.get(node.get("is_online"), "")
            rows.append(
                {
                    "process": process["name"], "role": process["role"], "state": process["state"], "pid": process["pid"] or "",
                    "address": process["url"].partition("://")[2], "GPUs": ",".join(map(str, process["devices"])), "online": is_online,
                    "running": load.get("num_running", ""), "waiting": load.get("num_waiting", ""), "free blocks": blocks,
                    "in flight": node.get("in_flight", ""),
                }
            )  # fmt: skip
        frame = pd.DataFrame(rows)
        return frame.drop(columns=[column for column in ("GPUs",) if column in frame and not frame[column].any()])

    def text(self) -> str:
        lines = [f"{self._name}: {self._state_text()}"]
        if len(rows := self.rows()):
            lines.append(rows.to_string(index=False))
        return "\n".join(lines)

    def _state_text(self) -> str:
        if self._busy or self._error:
            return self._busy or self._error
        return f"serving at {self.cluster.url}" if self.cluster is not None and self.is_running else "not running"

    def _draw(self, log: str) -> None:
        is_startable = not self._busy and not self.is_running and (self._make is not None or self.cluster is not None)
        self._start.disabled, self._stop.disabled = not is_startable, bool(self._busy) or not self.is_running
        self._state.value = _error(self._error) if self._error and not self._busy else f"<b>{html.escape(self._state_text())}</b>"
        self._table.value = _table(self.rows())
        self._log.value = _pre(log)
        self._which.layout.display = "" if self._which.options and self.is_running else "none"

    async def _keep_fresh(self) -> None:
        while self.is_running:
            await asyncio.sleep(_REFRESH_S)
            await self.refresh()

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call)


class Playground(Panel):
    """Ask something and watch the answer arrive: the text, and when each token came from which node.

    The stream is the client's view through the router. Which node made a token is not written into it; the protocol says it: of a pair,
    the first is the prefill node's and the rest are the decode node's."""

    def __init__(self, cluster: Cluster | ClusterPanel) -> None:
        self._source = cluster
        self.tokens = pd.DataFrame(columns=_ANSWER_COLUMNS)
        self._state = "nothing asked yet"
        self._prompt = ipw.Textarea("The quick brown fox", layout=ipw.Layout(width="42em", height="4em"))
        self._count = ipw.BoundedIntText(
            32, min=1, max=100_000, description="tokens", style={"description_width": "initial"}, layout=ipw.Layout(width="9em")
        )
        self._temperature = ipw.BoundedFloatText(
            0.0,
            min=0.0,
            max=2.0,
            step=0.1,
            description="temperature",
            style={"description_width": "initial"},
            layout=ipw.Layout(width="11em"),
        )
        self._ask = ipw.Button(description="Ask", icon="paper-plane", button_style="primary")
        self._ask.on_click(lambda _: _spawn(self._asked()))
        self._status, self._text, self._image = (
            ipw.HTML(),
            ipw.HTML(),
            ipw.Image(format="png", layout=ipw.Layout(max_width="100%", align_self="flex-start")),
        )
        self._image.layout.display = "none"
        self.box = ipw.VBox([self._prompt, ipw.HBox([self._count, self._temperature, self._ask, self._status]), self._text, self._image])

    async def ask(self, prompt: str | None = None, *, max_tokens: int | None = None, temperature: float | None = None) -> pd.DataFrame:
        """Streams one answer (greedy unless a temperature is given) and returns it: a row per message, ``token at_s node text``.

        Raises KsanaLabError for what the server or the network says."""
        cluster = self._running_cluster()
        body = {
            "prompt": self._prompt.value if prompt is None else prompt,
            "max_tokens": self._count.value if max_tokens is None else max_tokens,
            "temperature": self._temperature.value if temperature is None else temperature,
            "ignore_eos": True, "stream": True, "return_token_ids": True,
        }  # fmt: skip
        self._prompt.value, self._count.value = str(body["prompt"]), int(body["max_tokens"])
        nodes = _who_answers(cluster)
        self._ask.disabled = True
        rows: list[tuple[int, float, str, str]] = []
        sent_s, drawn_s = time.monotonic(), 0.0
        try:
            async for at_s, num_tokens, text in _stream(cluster.url, body):
                token = (rows[-1][0] if rows else 0) + num_tokens
                rows.append((token, at_s - sent_s, nodes[bool(rows)], text))
                if time.monotonic() - drawn_s > 0.1:
                    self._show(rows, "answering …", with_figure=False)
                    drawn_s = time.monotonic()
            self._show(rows, f"{rows[-1][0]} tokens in {rows[-1][1]:.2f} s" if rows else "an empty answer")
        except KsanaLabError as error:
            self._show(rows, "")
            self._state = str(error)
            self._status.value = _error(self._state)
            raise
        finally:
            self._ask.disabled = False
        return self.tokens

    async def _asked(self) -> None:
        """What the button does: an error is shown already."""
        try:
            await self.ask()
        except KsanaLabError as error:
            self._status.value = _error(str(error))

    def _running_cluster(self) -> Cluster:
        cluster = self._source.cluster if isinstance(self._source, ClusterPanel) else self._source
        if cluster is None or not cluster.is_running:
            raise KsanaLabError("the cluster is not running: start it first")
        return cluster

    def _show(self, rows: Sequence[tuple[int, float, str, str]], state: str, *, with_figure: bool = True) -> None:
        self.tokens, self._state = pd.DataFrame(rows, columns=_ANSWER_COLUMNS), state
        parts, colours = [], {node: plots.OKABE_ITO[i % 7] for i, node in enumerate(dict.fromkeys(self.tokens["node"]))}
        for node, of_node in self.tokens.groupby("node", sort=False):
            text = html.escape("".join(of_node["text"]))
            parts.append(f'<span style="border-bottom: 2px solid {colours[node]}" title="{html.escape(str(node))}">{text}</span>')
        self._status.value = html.escape(state)
        self._text.value = f'<div style="white-space: pre-wrap; max-width: 60em">{"".join(parts)}</div>'
        if with_figure and len(self.tokens):
            self._image.value = _png(plots.token_timeline(self.tokens))
            self._image.layout.display = ""

    def text(self) -> str:
        if self.tokens.empty:
            return f"playground: {self._state}"
        per_node = [f"{node}: {len(rows)} tokens, {1e3 * rows['at_s'].iloc[0]:.0f} to {1e3 * rows['at_s'].iloc[-1]:.0f} ms"
                    for node, rows in self.tokens.groupby("node", sort=False)]  # fmt: skip
        return "\n".join([f"playground: {self._state}", *per_node, repr("".join(self.tokens["text"]))])


class SweepPanel(Panel):
    """A sweep with its progress, a plot that grows with every run, and what failed."""

    def __init__(self, sweep: Sweep, *, plot: Callable[[pd.DataFrame], Figure] | None = None) -> None:
        """``plot``: of the rows so far; by default the 90th percentile of TTFT against the rate, one curve per split."""
        self.sweep = sweep
        self._plot = plot or (lambda runs: plots.latency_vs_rate(runs, by="split"))
        self._rows: list[dict[str, Any]] = []
        self._last: Progress | None = None
        self._task: asyncio.Task | None = None
        self._message = ""
        self._bar = ipw.IntProgress(0, min=0, max=max(1, sweep.num_points), layout=ipw.Layout(width="24em"))
        self._run = ipw.Button(description="Run", icon="play", button_style="success")
        self._stop = ipw.Button(description="Stop", icon="stop", disabled=True)
        self._run.on_click(lambda _: _spawn(self._ran()))
        self._stop.on_click(lambda _: self.stop())
        self._state, self._failures = ipw.HTML(), ipw.HTML()
        self._image = ipw.Image(format="png", layout=ipw.Layout(max_width="100%", align_self="flex-start", display="none"))
        self.box = ipw.VBox([ipw.HBox([self._run, self._stop, self._bar, self._state]), self._image, self._failures])
        self._draw()

    async def run(self) -> pd.DataFrame:
        """Runs what is missing and returns ``Sweep.run``'s frame. Stopped by the button, it returns what there is."""
        self._rows, self._last, self._message = [], None, ""
        self._run.disabled, self._stop.disabled = True, False
        self._task = asyncio.ensure_future(self.sweep.run(progress=False, on_progress=self._on_progress))
        try:
            runs = await asyncio.shield(self._task)
            self._message = "finished" if not self.sweep.failures else f"finished; {len(self.sweep.failures)} failed"
            return runs
        except asyncio.CancelledError:
            if not self._task.cancelled():  # the caller was cancelled, not the sweep
                self._task.cancel()
                await asyncio.wait([self._task])
                raise
            self._message = "stopped; run again to go on"
            return self.sweep.results
        except KsanaLabError as error:
            self._message = str(error)
            raise
        finally:
            self._run.disabled, self._stop.disabled = False, True
            self._draw()

    def stop(self) -> None:
        """Ends the measurement that runs; what is finished stays."""
        if self._task is not None:
            self._task.cancel()

    async def _ran(self) -> None:
        """What the button does: an error is shown already."""
        try:
            await self.run()
        except KsanaLabError as error:
            self._state.value = _error(str(error))

    def _on_progress(self, step: Progress) -> None:
        self._last = step
        if step.row is not None:
            self._rows.append(step.row)
        self._draw(with_figure=step.row is not None)

    def _draw(self, *, with_figure: bool = False) -> None:
        step = self._last
        self._bar.value = 0 if step is None else step.num_done + step.num_failed
        self._state.value = html.escape(self._state_text())
        if with_figure:
            self._image.value = _png(self._plot(pd.DataFrame(self._rows)))
            self._image.layout.display = ""
        self._failures.value = "".join(_error(f"{f['point']}: {f['error'].splitlines()[0]}") for f in self._failed())

    def _failed(self) -> list[dict[str, Any]]:
        return self.sweep.failures if self._last is not None and self._last.num_failed else []

    def _state_text(self) -> str:
        if self._message or self._last is None:
            return self._message or f"{self.sweep.num_points} runs, not started; results in {self.sweep.folder}"
        step = self._last
        return f"{step.num_done + step.num_failed} of {step.total}; {step.state}: {step.point}"

    def text(self) -> str:
        lines = [f"sweep {self.sweep.config.name}: {self._state_text()}"]
        lines += [f"failed: {failure['point']}: {failure['error'].splitlines()[0]}" for failure in self._failed()]
        return "\n".join(lines)


# ---- one request, streamed -------------------------------------------------------------------------------------------


def _who_answers(cluster: Cluster) -> tuple[str, str]:
    """(maker of the first token, maker of the rest)."""
    roles = {node.role for node in cluster.plan.nodes}
    return ("prefill node", "decode node") if Role.PREFILL in roles else ("mixed node", "mixed node")


_Piece = tuple[float, int, str]  # monotonic time, tokens, text


async def _stream(url: str, body: dict[str, Any]) -> AsyncIterator[_Piece]:
    """Every message that carries a token. Read and stamped in a thread: a kernel that draws is late. Raises KsanaLabError."""
    loop, stop = asyncio.get_running_loop(), threading.Event()
    queue: asyncio.Queue[_Piece | BaseException | None] = asyncio.Queue()

    def read() -> None:
        end: BaseException | None = None
        try:
            for piece in _messages(url, body):
                if stop.is_set():
                    return
                loop.call_soon_threadsafe(queue.put_nowait, piece)
        except BaseException as error:  # raised below, where it is awaited
            end = error
        loop.call_soon_threadsafe(queue.put_nowait, end)

    threading.Thread(target=read, name="playground", daemon=True).start()
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def _messages(url: str, body: dict[str, Any]) -> Iterator[_Piece]:
    headers = {"x-request-id": f"playground-{uuid.uuid4().hex[:8]}"}
    try:
        with (
            httpx.Client(timeout=httpx.Timeout(60.0), trust_env=False) as client,
            client.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                raise KsanaLabError(f"{answer.status_code}: {answer.read().decode('utf-8', 'replace')[:500]}")
            for line in answer.iter_lines():
                at_s = time.monotonic()
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                message = json.loads(line[5:])
                if "choices" not in message:
                    raise KsanaLabError(str(message.get("error", message))[:500])
                for choice in message["choices"]:
                    if num_tokens := len(choice.get("token_ids") or []) or bool(choice.get("text")):
                        yield at_s, int(num_tokens), choice.get("text") or ""
    except (httpx.HTTPError, ValueError) as error:
        raise KsanaLabError(f"{url}: {type(error).__name__}: {error}") from None


# ---- drawing ---------------------------------------------------------------------------------------------------------

_tasks: set[asyncio.Task] = set()  # a task that nobody holds may be collected before it ends


def _spawn(coroutine: Coroutine[Any, Any, Any]) -> None:
    """From a button. Without a running loop (a script) there is nobody to press one."""
    try:
        task = asyncio.get_running_loop().create_task(coroutine)
    except RuntimeError:
        coroutine.close()
        return
    _tasks.add(task)
    task.add_done_callback(_ended)


def _ended(task: asyncio.Task) -> None:
    _tasks.discard(task)
    if not task.cancelled():
        task.exception()  # shown by the panel


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _table(frame: pd.DataFrame) -> str:
    if frame.empty:
        return ""
    cells = [[html.escape(str(value)) for value in row] for row in (frame.columns, *frame.itertuples(index=False))]
    padded = ["".join(f'<td style="padding: 0 1.2em 0 0">{cell}</td>' for cell in row) for row in cells]
    return f'<table style="line-height: 1.6"><tr style="font-weight: bold">{padded[0]}</tr><tr>{"</tr><tr>".join(padded[1:])}</tr></table>'


def _pre(text: str) -> str:
    if not text:
        return ""
    style = "max-height: 16em; overflow: auto; line-height: 1.25; font-size: 85%; margin: 0"
    return f'<pre style="{style}">{html.escape(text)}</pre>'


def _error(text: str) -> str:
    return f'<div style="color: #B00020; white-space: pre-wrap">{html.escape(text)}</div>'
