"""The demo's app: one transactional item handler, as a user would write it."""

import ast
import hashlib
import os
from pathlib import Path
from typing import Any

import psycopg

import batchq

app = batchq.App()


@app.item_handler("index_file", transactional=True, chunk_size=10)
def index_file(item: str, conn: psycopg.Connection[Any]) -> None:
    """Parse, count and hash one source file; the row commits together with the checkpoint."""
    source = Path(item).read_bytes()
    nodes = list(ast.walk(ast.parse(source)))
    functions = sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes)
    classes = sum(isinstance(node, ast.ClassDef) for node in nodes)
    conn.execute(
        """
        INSERT INTO batchq_demo.files (path, bytes, lines, functions, classes, sha256, worker_pid)
        VALUES (%s, %s, %s, %s, %s, %s, %s)
        """,
        (item, len(source), source.count(b"\n"), functions, classes, hashlib.sha256(source).hexdigest(), os.getpid()),
    )
