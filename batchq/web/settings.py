"""Settings of the page: flags, or ``BATCHQ_WEB_*`` in the environment or in ``.env``; its secrets never as flags."""

import ipaddress
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from batchq.common.env_file import FileSettings
from batchq.common.hosts import Network, host_names
from batchq.common.secrets import know_password
from batchq.errors import ConfigError

SHORTEST_SECRET = 8


class WebSettings(FileSettings):
    """Where the page listens, and whom it lets in."""

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
    def split_hosts(cls, value: Any) -> Any:
        """Take ``"a.example, .b.example"`` as well as a sequence."""
        return host_names(value)

    @field_validator("proxies", mode="before")
    @classmethod
    def split(cls, value: Any) -> Any:
        """Take ``"10.0.0.0/8, ::1"`` as well as a sequence."""
        return (
            tuple(name.strip().lower() for name in value.split(",") if name.strip())
            if isinstance(value, str)
            else value
        )

    @property
    def secrets(self) -> list[str]:
        """The password and the token, those that are set."""
        return [text for secret in (self.password, self.token) if (text := secret.get_secret_value())]

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Return the settings, *overrides* (those that are not None) first. Raises ConfigError."""
        try:
            settings = cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
            said = "; ".join(f"BATCHQ_WEB_{str(one['loc'][0]).upper()}: {one['msg']}" for one in problems)
            raise ConfigError(said) from None
        settings.check()
        for secret in settings.secrets:
            know_password(secret)
        return settings

    def check(self) -> None:
        """Raise ConfigError if the page would be open to others."""
        if any(len(secret) < SHORTEST_SECRET for secret in self.secrets):
            raise ConfigError(f"BATCHQ_WEB_PASSWORD and BATCHQ_WEB_TOKEN have at least {SHORTEST_SECRET} characters")
        if not self.secrets and not is_loopback(self.host):
            raise ConfigError(
                f"batchq web does not listen on {self.host} for everybody: "
                "set BATCHQ_WEB_PASSWORD or BATCHQ_WEB_TOKEN, or leave --host out"
            )


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
