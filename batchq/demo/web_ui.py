"""The web UI of ``batchq web``, served beside the demo. Needs the extra "web"."""

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

_EVERY_SECONDS, _SHARE = 0.5, 5  # livelier than `batchq web`
_PORT = 8080


@dataclass
class WebUI:
    """The web UI, and its address."""

    web: "Web"
    address: str

    def wait_for_viewer(self, path: str) -> None:
        """Print the address of a page; wait until somebody opens it."""
        put(f"open {self.address}{path} in a browser; the demo starts when you do")
        while not self.web.live.viewers:
            time.sleep(0.05)

    def wait_for_ctrl_c(self) -> None:
        """Let people look around."""
        put("the web UI stays until Ctrl-C; look around")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


@contextmanager
def serving(dsn: str) -> Iterator[WebUI]:
    """Serve the web UI while the block runs."""
    try:
        from batchq.web.server import Web, server_of  # its extra need not be installed for the demo without --web
        from batchq.web.settings import WebSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--web needs an extra (no module {error.name!r}); run: pip install 'pgbatchq[web]'"
        ) from None
    web = Web(dsn, WebSettings.load(host="127.0.0.1"), every_seconds=_EVERY_SECONDS)
    web.live.share = _SHARE
    server = server_of(web)
    with _listening_socket() as own_socket:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [own_socket]}, daemon=True)
        thread.start()
        try:
            yield WebUI(web, f"http://127.0.0.1:{own_socket.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(10)


def _listening_socket() -> socket.socket:
    """Return a socket on the usual port or, if that is taken, on another one."""
    try:
        return socket.create_server(("127.0.0.1", _PORT))
    except OSError:
        return socket.create_server(("127.0.0.1", 0))
