"""PostgreSQL crashing: kill -9 of one of its processes makes the server drop every connection and recover
from its log, as after a crash of all of it."""

import random

import psutil
from sqlalchemy import Engine, text


def server_of(engine: Engine) -> psutil.Process | None:
    """The process whose children the server's others are; None on SQLite."""
    if engine.dialect.name == "sqlite":
        return None
    with engine.begin() as connection:
        backend = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    return psutil.Process(backend).parent()


def crash(server: psutil.Process, draw: random.Random) -> None:
    victims = [child for child in server.children() if child.is_running()]
    if victims:
        draw.choice(victims).kill()
