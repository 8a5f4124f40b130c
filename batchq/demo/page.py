"""The demo's page: the one of ``batchq web``, served beside the demo. Needs the extra "web"."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchq.common.terminal import put
from batchq.errors import ConfigError

if TYPE_CHECKING:
    from batchq.web.server import Web

EVERY_SECONDS, SHARE = 0.5, 5  # livelier than the page is elsewhere
PORT = 8080


@dataclass
class Page:
    """A page that is served, and where."""

    web: "Web"
    address: str

    def wait_for_viewer(self, path: str) -> None:
        """Say where to look, and wait until somebody does."""
        put(f"open {self.address}{path} in a browser: it begins when you look at it")
        while not self.web.live.viewers:
            time.sleep(0.05)

    def wait_for_ctrl_c(self) -> None:
        """Let people look around until they have seen enough."""
        put("the page stays until Ctrl-C: look around")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


@contextmanager
def page(dsn: str) -> Iterator[Page]:
    """Serve the page while the block runs."""
    try:
        from batchq.web.server import Web, server_of  # its extra need not be installed for the demo without a page
        from batchq.web.settings import WebSettings
    except ModuleNotFoundError as error:
        raise ConfigError(f"--web needs the extra: pip install 'batchq[web]' (no module {error.name!r})") from None
    web = Web(dsn, WebSettings.load(host="127.0.0.1"), every_seconds=EVERY_SECONDS)
    web.live.share = SHARE
    server = server_of(web)
    with listening() as own_socket:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [own_socket]}, daemon=True)
        thread.start()
        try:
            yield Page(web, f"http://127.0.0.1:{own_socket.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(10)


def listening() -> socket.socket:
    """Return a socket that listens on the page's usual port or, where that is taken, on another one."""
    try:
        return socket.create_server(("127.0.0.1", PORT))
    except OSError:
        return socket.create_server(("127.0.0.1", 0))
