"""Settings of the web UI: flags, or ``BATCHQ_WEB_*`` in the environment or in ``.env``; its secrets never as flags."""

import ipaddress
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from batchq.common.env_file import FileSettings
from batchq.common.hosts import Network, host_names
from batchq.common.secrets import know_password
from batchq.errors import ConfigError

_SHORTEST_SECRET = 8


class WebSettings(FileSettings):
    """Where the web UI listens, and who may use it. docs/web.md explains each setting."""

    model_config = SettingsConfigDict(env_prefix="BATCHQ_WEB_", extra="ignore", frozen=True, hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65_535)
    password: SecretStr = SecretStr("")
    token: SecretStr = SecretStr("")
    hosts: Annotated[tuple[str, ...], NoDecode] = ()
    proxies: Annotated[tuple[Network, ...], NoDecode] = ()
    read_only: bool = False

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

    @property
    def secrets(self) -> list[str]:
        """The password and the token, if set."""
        return [text for secret in (self.password, self.token) if (text := secret.get_secret_value())]

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Return the settings; *overrides* that are not None take precedence. Raises ConfigError."""
        try:
            settings = cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
            text = "; ".join(f"BATCHQ_WEB_{str(one['loc'][0]).upper()}: {one['msg']}" for one in problems)
            raise ConfigError(text) from None
        settings._check()
        for secret in settings.secrets:
            know_password(secret)
        return settings

    def _check(self) -> None:
        """Raise ConfigError if strangers could get in."""
        if any(len(secret) < _SHORTEST_SECRET for secret in self.secrets):
            raise ConfigError(f"BATCHQ_WEB_PASSWORD and BATCHQ_WEB_TOKEN need at least {_SHORTEST_SECRET} characters")
        if not self.secrets and not _is_loopback(self.host):
            raise ConfigError(
                f"without a password, batchq web does not listen on {self.host}; "
                "set BATCHQ_WEB_PASSWORD or BATCHQ_WEB_TOKEN, or omit --host"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
