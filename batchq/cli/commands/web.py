"""``batchq web``: the web UI. Needs the extra "web"."""

from argparse import Namespace
from typing import Any

from batchq.cli.arguments import add_command
from batchq.cli.connections import database, settings_of
from batchq.common import log
from batchq.common.terminal import errors, styled
from batchq.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "web", _run, "serve the web UI")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1; others need a password)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8080)")
    parser.add_argument("--read-only", action="store_true", help="refuse every action")
    parser.epilog = "The password or the token comes from BATCHQ_WEB_PASSWORD or BATCHQ_WEB_TOKEN."


def _run(options: Namespace) -> int:
    try:
        from batchq.web.server import serve  # its extra need not be installed for the other commands
        from batchq.web.settings import WebSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"batchq web needs an extra (no module {error.name!r}); run: pip install 'batchq[web]'"
        ) from None
    settings = settings_of(options)
    log.configure(settings.log_format, settings.log_level)
    web_settings = WebSettings.load(host=options.host, port=options.port, read_only=options.read_only or None)
    with database(options):  # reports what is wrong with the DSN or the schema before anybody opens a page
        pass  # this logs in once; the UI's own pool has up to four other connections, whatever the number of viewers
    log.configure(settings.log_format, settings.log_level)  # a visitor's address may be in a line
    errors.print(styled(f"http://{_url_host(web_settings.host)}:{web_settings.port}/"), soft_wrap=True)
    serve(settings, web_settings)
    return 0


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
