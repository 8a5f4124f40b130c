"""Settings of the web UI: flags, or ``BATCHQ_WEB_*`` in the environment or in ``.env``; its secrets never as flags."""

import ipaddress
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from batchq.common.env_file import FileSettings
from batchq.common.hosts import Network, host_names
from batchq.common.secrets import know_password
from batchq.errors import ConfigError

_SHORTEST_SECRET = 8
_URL = re.compile(r"https?://[^\s/?#\\<>\"{}]+(?:[/?#][^\s\\<>\"{}]*)?")
_ROOT_PATH = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)*")
_HEADER = re.compile(r"[A-Za-z0-9-]*")


class WebSettings(FileSettings):
    """Where the web UI listens, and who may use it. docs/web.md explains each setting."""

    model_config = SettingsConfigDict(env_prefix="BATCHQ_WEB_", extra="ignore", frozen=True, hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65_535)
    password: SecretStr = SecretStr("")
    read_only_password: SecretStr = SecretStr("")
    token: SecretStr = SecretStr("")
    hosts: Annotated[tuple[str, ...], NoDecode] = ()
    proxies: Annotated[tuple[Network, ...], NoDecode] = ()
    read_only: bool = False
    trace_url: str = ""
    root_path: str = ""
    user_header: str = ""

    @field_validator("hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: Any) -> Any:
        return host_names(value)

    @field_validator("proxies", mode="before")
    @classmethod
    def _split_proxies(cls, value: Any) -> Any:
        """Accept ``"10.0.0.0/8, ::1"`` as well as a sequence."""
        names = value.split(",") if isinstance(value, str) else None
        return value if names is None else tuple(name.strip().lower() for name in names if name.strip())

    @field_validator("trace_url")
    @classmethod
    def _check_trace_url(cls, value: str) -> str:
        """Accept https and http only: any other address in a link could run a script."""
        address = value.replace("{trace_id}", "0" * 32)
        if value and (not _URL.fullmatch(address) or address == value):
            raise ValueError(
                f"must be an http or https address with {{trace_id}} in it, such as "
                f"https://traces.example.com/trace/{{trace_id}}, not {value!r}"
            )
        return value

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, value: str) -> str:
        path = value.strip().rstrip("/")
        if not _ROOT_PATH.fullmatch(path):
            raise ValueError(f"{value!r} is not a path such as /queue; give letters, digits, -, ., _ or ~ after each /")
        return path

    @field_validator("user_header")
    @classmethod
    def _check_user_header(cls, value: str) -> str:
        if not _HEADER.fullmatch(value.strip()):
            raise ValueError(f"{value!r} is not the name of a header, such as X-Forwarded-User")
        return value.strip()

    @property
    def secrets(self) -> dict[str, Literal["full", "read-only"]]:
        """The passwords and the token that are set, and what each lets one do."""
        given: tuple[tuple[SecretStr, Literal["full", "read-only"]], ...] = (
            (self.read_only_password, "read-only"),
            (self.password, "full"),
            (self.token, "full"),
        )
        return {text: access for secret, access in given if (text := secret.get_secret_value())}

    @property
    def has_password(self) -> bool:
        """Whether people need a password; a token is for programs."""
        return bool(self.password.get_secret_value() or self.read_only_password.get_secret_value())

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Return the settings; *overrides* that are not None take precedence. Raises ConfigError."""
        try:
            settings = cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
            text = "; ".join(f"{cls._shown_name(str(one['loc'][0]))}: {one['msg']}" for one in problems)
            raise ConfigError(text) from None
        settings._check()
        for secret in settings.secrets:
            know_password(secret)
        return settings

    @classmethod
    def _shown_name(cls, name: str) -> str:
        return f"BATCHQ_WEB_{name.upper()}"

    def _check(self) -> None:
        """Raise ConfigError if strangers could get in."""
        if any(len(secret) < _SHORTEST_SECRET for secret in self.secrets):
            names = "BATCHQ_WEB_PASSWORD, BATCHQ_WEB_READ_ONLY_PASSWORD and BATCHQ_WEB_TOKEN"
            raise ConfigError(f"{names} need at least {_SHORTEST_SECRET} characters")
        if (text := self.read_only_password.get_secret_value()) and self.secrets[text] == "full":
            raise ConfigError("BATCHQ_WEB_READ_ONLY_PASSWORD must differ from BATCHQ_WEB_PASSWORD and BATCHQ_WEB_TOKEN")
        if self.user_header and not self.proxies:
            raise ConfigError(
                f"BATCHQ_WEB_USER_HEADER is {self.user_header}, but no proxy is trusted to send it; "
                "list the proxy in BATCHQ_WEB_PROXIES"
            )
        if not self.secrets and not self.user_header and not _is_loopback(self.host):
            raise ConfigError(
                f"without a password, batchq web does not listen on {self.host}; "
                "set BATCHQ_WEB_PASSWORD or BATCHQ_WEB_TOKEN, or omit --host"
            )


class MountedSettings(WebSettings):
    """Those of a web UI that is mounted into an application: arguments only. BATCHQ_WEB_* are for `batchq web`."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 (this and those below: arguments only)
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the arguments."""
        return (init_settings,)

    @classmethod
    def _shown_name(cls, name: str) -> str:
        return name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
