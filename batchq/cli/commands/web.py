"""``batchq web``: the web UI. Needs the extra "web"."""

from argparse import Namespace
from typing import Any

from batchq.cli.arguments import add_command
from batchq.cli.connections import check_each, check_schema_of, one_or_several
from batchq.common import log
from batchq.common.terminal import complain, errors, styled
from batchq.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "web", _run, "serve the web UI")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1; others need a password)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8080)")
    parser.add_argument("--read-only", action="store_true", help="refuse every action")
    parser.add_argument("--root-path", help="prefix of every address behind a proxy, such as /queue (default: none)")
    parser.epilog = (
        "Passwords and the token come from BATCHQ_WEB_PASSWORD, BATCHQ_WEB_READ_ONLY_PASSWORD and BATCHQ_WEB_TOKEN."
    )


def _run(options: Namespace) -> int:
    try:
        from batchq.web.serving import serve  # its extra need not be installed for the other commands
        from batchq.web.settings import WebSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"batchq web needs an extra (no module {error.name!r}); run: pip install 'pgbatchq[web]'"
        ) from None
    settings, databases = one_or_several(options)
    log.configure(settings.log_format, settings.log_level)
    web_settings = WebSettings.load(
        host=options.host, port=options.port, read_only=options.read_only or None, root_path=options.root_path
    )
    # Reports what is wrong with a DSN or a schema before anybody opens a page. This logs in once; the UI's own pool has
    # up to four other connections to each database, whatever the number of viewers.
    seconds = settings.database_timeout_seconds
    if databases:
        check_each(databases, lambda dsn: check_schema_of(dsn, seconds), _say_away)
    else:
        check_schema_of(settings.require_dsn(), seconds)
    log.configure(settings.log_format, settings.log_level)  # a visitor's address may be in a line
    address = f"http://{_url_host(web_settings.host)}:{web_settings.port}{web_settings.root_path}/"
    errors().print(styled(address), soft_wrap=True)
    serve(settings, databases, web_settings)
    return 0


def _say_away(name: str, error: str) -> None:
    complain(f"database {name} is away: {error}")


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
