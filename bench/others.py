"""What an operator would use otherwise: procrastinate and pgqueuer, each set as well as we can.

    python others.py procrastinate|pgqueuer DSN      a worker that prints when each task begins
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

import psycopg


async def procrastinate_app(dsn: str):
    import procrastinate
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn))

    @app.task(name="noop")
    async def noop() -> None:
        pass

    @app.task(name="clock")
    async def clock() -> None:
        print(time.time(), flush=True)
    await app.open_async()
    return app


async def procrastinate_install(dsn: str) -> None:
    app = await procrastinate_app(dsn)
    await app.schema_manager.apply_schema_async()
    await app.close_async()


async def procrastinate_create(dsn: str, count: int, at_once: bool) -> float:
    """Create tasks; return seconds."""
    app = await procrastinate_app(dsn)
    begun = time.perf_counter()
    if at_once:
        await app.tasks["noop"].batch_defer_async(*[{}] * count)
    else:
        for _ in range(count):
            await app.tasks["noop"].defer_async()
    seconds = time.perf_counter() - begun
    await app.close_async()
    return seconds


async def procrastinate_drain(dsn: str, concurrency: int) -> float:
    """Run all tasks; return seconds."""
    app = await procrastinate_app(dsn)
    begun = time.perf_counter()
    await app.run_worker_async(wait=False, concurrency=concurrency, listen_notify=False,
                               install_signal_handlers=False, delete_jobs="never")
    seconds = time.perf_counter() - begun
    await app.close_async()
    return seconds


async def pgqueuer_driver(dsn: str, kind: str):
    if kind == "asyncpg":
        import asyncpg
        from pgqueuer.db import AsyncpgDriver
        info = psycopg.conninfo.conninfo_to_dict(dsn)
        connection = await asyncpg.connect(host=info["host"], port=info["port"], user=info["user"],
                                           database=info["dbname"])
        return AsyncpgDriver(connection)
    from pgqueuer.db import PsycopgDriver
    return PsycopgDriver(await psycopg.AsyncConnection.connect(dsn, autocommit=True))


async def pgqueuer_install(dsn: str) -> None:
    from pgqueuer.queries import Queries
    await Queries(await pgqueuer_driver(dsn, "psycopg")).install()


async def pgqueuer_create(dsn: str, count: int, at_once: bool) -> float:
    from pgqueuer.queries import Queries
    queries = Queries(await pgqueuer_driver(dsn, "psycopg"))
    begun = time.perf_counter()
    if at_once:
        await queries.enqueue(["noop"] * count, [None] * count, [0] * count)
    else:
        for _ in range(count):
            await queries.enqueue("noop", None)
    return time.perf_counter() - begun


async def pgqueuer_drain(dsn: str, kind: str, one_at_a_time: bool) -> float:
    from datetime import timedelta

    from pgqueuer import PgQueuer
    from pgqueuer.domain.types import QueueExecutionMode
    queuer = PgQueuer(await pgqueuer_driver(dsn, kind))

    @queuer.entrypoint("noop")
    async def noop(job) -> None:
        pass
    begun = time.perf_counter()
    options = {"batch_size": 1, "max_concurrent_tasks": 2} if one_at_a_time else {}
    await queuer.qm.run(dequeue_timeout=timedelta(seconds=1), mode=QueueExecutionMode.drain,
                        **options)
    return time.perf_counter() - begun


async def worker(name: str, dsn: str) -> None:
    if name == "procrastinate":
        app = await procrastinate_app(dsn)
        await app.run_worker_async(concurrency=1)
        return
    from pgqueuer import PgQueuer
    queuer = PgQueuer(await pgqueuer_driver(dsn, "asyncpg"))

    @queuer.entrypoint("clock")
    async def clock(job) -> None:
        print(time.time(), flush=True)
    await queuer.qm.run()


async def ask_clock(name: str, dsn: str) -> Callable:
    """Return a coroutine function that creates one task and returns when that is committed."""
    if name == "procrastinate":
        app = await procrastinate_app(dsn)
        return app.tasks["clock"].defer_async
    from pgqueuer.queries import Queries
    queries = Queries(await pgqueuer_driver(dsn, "psycopg"))
    return lambda: queries.enqueue("clock", None)


if __name__ == "__main__":
    asyncio.run(worker(*sys.argv[1:]))
