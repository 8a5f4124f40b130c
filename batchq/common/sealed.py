"""Sealed values: JSON that only programs with a key can read, as an envelope that is itself JSON.

An envelope is ``{"batchq:sealed": {"key": ID, "data": BASE64}}``. The data are a nonce of 24 random bytes, and the
value's JSON text encrypted and authenticated by XAES-256-GCM (https://c2sp.org/XAES-256-GCM): AES-256-GCM with a key
derived from each nonce, so that one key may seal any number of values. What is authenticated with it, ``FIELD\\nKIND``,
keeps an envelope from being moved to another kind of batch or another field. See docs/sealed.md.
"""

import json
import os
import re
import threading
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence
from typing import Any, Literal

from batchq.common.secrets import know_keys
from batchq.errors import CannotOpen, ConfigError, KeyMissing

VARIABLE = "BATCHQ_ENCRYPTION_KEYS"
MARK = '"batchq:sealed"'
# How far into the text of a sealed payload the mark may begin: a schedule may have put the time of a tick before it.
MARK_WITHIN = 60
Field = Literal["payload", "item", "cursor", "result", "error"]

_NAME = "batchq:sealed"
_KEY_BYTES = 32
_ID = re.compile(r"[A-Za-z0-9._-]{1,50}")
_PREFIX_BYTES = 12  # of a nonce: from these, the key of AES-256-GCM is derived
_NONCE_BYTES = 24
_MOST_SEALED_LINE_BYTES = 1_300  # sealed, a line still fits into the 2,000 bytes of an error
_SEALED_LINE = re.compile(r"sealed with key ([A-Za-z0-9._-]{1,50}): ([A-Za-z0-9+/]{40,}={0,2})")
_ADVICE = "the first part of each is a name of letters, digits and ._-, the second one 32 bytes in base64"


class _Cipher:
    """XAES-256-GCM with one key. Few nonces have the same first half, except those of one list of items."""

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ModuleNotFoundError as error:
            raise ConfigError(f"{VARIABLE} needs an extra ({error}): pip install 'pgbatchq[crypto]'") from None
        self._key = key  # for nonces that depend on the value
        self._aes_gcm, self._invalid = AESGCM, InvalidTag
        # Each block for itself, as the derivation wants; one context for all, because making one takes longest.
        self._blocks = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()  # noqa: S305
        self._lock = threading.Lock()
        first = int.from_bytes(self._encrypted(bytes(16)))
        subkey = ((first << 1) & (2**128 - 1)) ^ (0x87 if first >> 127 else 0)
        self._mask = subkey << 128 | subkey
        self._last: tuple[bytes, Any] = (b"", None)

    def _encrypted(self, blocks: bytes) -> bytes:
        with self._lock:
            return self._blocks.update(blocks)

    def _derived(self, prefix: bytes) -> Any:
        """Return AES-256-GCM for the nonces that begin with *prefix*."""
        known, cipher = self._last
        if known != prefix:
            blocks = int.from_bytes(b"\0\1X\0" + prefix + b"\0\2X\0" + prefix) ^ self._mask
            cipher = self._aes_gcm(self._encrypted(blocks.to_bytes(32)))
            self._last = (prefix, cipher)
        return cipher

    def seal(self, text: bytes, about: bytes, nonce: bytes) -> bytes:
        """Return nonce and ciphertext of *text*."""
        return nonce + bytes(self._derived(nonce[:_PREFIX_BYTES]).encrypt(nonce[_PREFIX_BYTES:], text, about))

    def open(self, data: bytes, about: bytes) -> bytes:
        """Return the text. Raises ValueError if it was not sealed with this key and *about*."""
        if len(data) <= _NONCE_BYTES:
            raise ValueError("no ciphertext")
        cipher = self._derived(data[:_PREFIX_BYTES])
        try:
            return bytes(cipher.decrypt(data[_PREFIX_BYTES:_NONCE_BYTES], data[_NONCE_BYTES:], about))
        except self._invalid:
            raise ValueError("not of this key") from None

    def nonce_of(self, text: bytes, about: bytes) -> bytes:
        """Return the nonce that only this value has: the same value is sealed the same way each time."""
        import hmac

        return hmac.digest(self._key, b"batchq nonce\n" + about + b"\n" + text, "sha256")[:_NONCE_BYTES]


class Keys:
    """The keys of this program: the first one seals, all of them open. Their values are in no text of an instance."""

    __slots__ = ("_ciphers", "first")

    def __init__(self, ciphers: dict[str, _Cipher]) -> None:
        self._ciphers = ciphers
        self.first = next(iter(ciphers))

    @classmethod
    def read(cls, text: str) -> "Keys":
        """Read ``ID:BASE64,ID:BASE64``. Raises ConfigError, which shows no key, also if the extra is missing."""
        know_keys(text)
        return cls({name: _Cipher(key) for name, key in read_keys(text).items()})

    def __repr__(self) -> str:
        return f"Keys({', '.join(self._ciphers)})"

    def __reduce__(self) -> Any:
        raise TypeError("keys are not copied to another process; set them there")

    # ------------------------------------------------------------------------------------------------------- seal

    def seal(self, text: str, kind: str, field: Field, *, nonce: bytes | None = None) -> str:
        """Return the envelope of a value, both as JSON text."""
        data = self._sealed(text, kind, field, nonce or os.urandom(_NONCE_BYTES))
        return f'{{{MARK}:{{"key":"{self.first}","data":"{data}"}}}}'

    def seal_items(self, texts: Sequence[str], kind: str) -> str:
        """Return the JSON array of the envelopes of items. Their nonces have the same first half, which saves time."""
        prefix = os.urandom(_PREFIX_BYTES)
        rest = os.urandom(_PREFIX_BYTES * len(texts))
        parts = (rest[start : start + _PREFIX_BYTES] for start in range(0, len(rest), _PREFIX_BYTES))
        sealed = (self.seal(text, kind, "item", nonce=prefix + part) for text, part in zip(texts, parts, strict=True))
        return f"[{','.join(sealed)}]"

    def seal_steadily(self, text: str, kind: str, field: Field) -> str:
        """Return the envelope of a value as `seal` does, each time the same: a declared schedule must not change."""
        nonce = self._ciphers[self.first].nonce_of(text.encode(), _about(kind, field))
        return self.seal(text, kind, field, nonce=nonce)

    def seal_line(self, line: str, kind: str, *, has_type: bool = True) -> str:
        """Return a line that names the key and, if the given one begins with it, the type of an error; all is sealed.

        *has_type*: whether it does. Else its first word may be anything, and stays hidden.
        """
        text = json.dumps(line, ensure_ascii=False)
        while len(text.encode()) > _MOST_SEALED_LINE_BYTES:
            line = line[: len(line) * 3 // 4]
            text = json.dumps(f"{line} ...", ensure_ascii=False)
        data = self._sealed(text, kind, "error", os.urandom(_NONCE_BYTES))
        return f"{self.plain_line(line if has_type else '')}: {data}"

    def plain_line(self, line: str) -> str:
        """Return what everybody may know of the line of an error: its type, and which key the rest is sealed with."""
        name, separator, _ = line.partition(":")
        is_name = separator and re.fullmatch(r"\w{1,100}", name)
        return f"{name}: sealed with key {self.first}" if is_name else f"sealed with key {self.first}"

    def _sealed(self, text: str, kind: str, field: Field, nonce: bytes) -> str:
        data = self._ciphers[self.first].seal(text.encode(), _about(kind, field), nonce)
        return b2a_base64(data, newline=False).decode()

    # ------------------------------------------------------------------------------------------------------- open

    def open(self, key: str, data: str, kind: str, field: Field) -> str:
        """Return the JSON text of a value. Raises KeyMissing without its key, CannotOpen if it does not fit."""
        if (cipher := self._ciphers.get(key)) is None:
            raise missing(key, field)
        try:
            return cipher.open(a2b_base64(data, strict_mode=True), _about(kind, field)).decode()
        except ValueError:  # also binascii.Error and UnicodeDecodeError
            raise CannotOpen(
                f"the {field} cannot be opened with key {key!r}: it was sealed with another key of this name, for "
                "another kind or field, or was changed since"
            ) from None

    def open_line(self, line: str, kind: str) -> str:
        """Return the line of an error with what is sealed in it opened, as far as it can be."""
        found = _SEALED_LINE.search(line)
        if found is None:
            return line
        try:
            return str(json.loads(self.open(found[1], found[2], kind, "error")))
        except (KeyMissing, CannotOpen):
            return line


def _about(kind: str, field: str) -> bytes:
    return f"{field}\n{kind}".encode()


def missing(key: str, field: str) -> KeyMissing:
    """Return the error for a value whose key this program does not have."""
    return KeyMissing(f"the {field} is sealed with key {key!r}, which this program does not have; add it to {VARIABLE}")


def envelope_of(value: Any) -> tuple[str, str] | None:
    """Return key and data of an envelope; None if *value* is not one. A schedule may have put a tick beside it."""
    if not isinstance(value, dict) or not isinstance(inner := value.get(_NAME), dict):
        return None
    if not value.keys() <= {_NAME, "tick"} or inner.keys() != {"key", "data"}:
        return None
    key, data = inner["key"], inner["data"]
    return (key, data) if isinstance(key, str) and isinstance(data, str) else None


def key_of(value: Any) -> str | None:
    """Return the name of the key that a value is sealed with; None if it is not sealed."""
    found = envelope_of(value)
    return found[0] if found else None


def open_value(value: Any, kind: str, field: Field) -> Any:
    """Return a JSON value, opened if it is sealed. Raises KeyMissing, CannotOpen."""
    if (found := envelope_of(value)) is None:
        return value
    if (keys := current()) is None:
        raise missing(found[0], field)
    try:
        opened = json.loads(keys.open(*found, kind, field))
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits, or nesting too deep
        if isinstance(error, CannotOpen):
            raise
        raise CannotOpen(f"the {field} cannot be read in Python") from None
    return opened | {"tick": value["tick"]} if "tick" in value and isinstance(opened, dict) else opened


def opened_text(text: str, kind: str, field: Field) -> str | None:
    """Return the JSON text of a value, opened; None if it is not sealed. Raises KeyMissing, CannotOpen."""
    if MARK not in text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # nothing that `seal` has made
        return None
    if (found := envelope_of(value)) is None:
        return None
    if (keys := current()) is None:
        raise missing(found[0], field)
    opened = keys.open(*found, kind, field)
    if "tick" not in value or not isinstance(payload := json.loads(opened), dict):
        return opened
    return json.dumps(payload | {"tick": value["tick"]}, ensure_ascii=False)


def opened_items(text: str, kind: str, must_be_sealed: bool, first: int) -> str | None:
    """Return the JSON text of a list of items, each opened; None if none of them is sealed, and none must be.

    *first*: the number of the first one, for errors. If one is sealed, all must be. Raises KeyMissing, and CannotOpen
    for one that cannot be opened or is in the clear.
    """
    try:
        envelopes = [envelope_of(item) for item in json.loads(text)]
    except (ValueError, RecursionError):  # nothing that `seal_items` has made: whoever reads the text says so
        return None
    if not must_be_sealed and not any(envelopes):
        return None
    keys, opened = current(), []
    for number, envelope in enumerate(envelopes, first):
        if envelope is None:
            raise in_the_clear(f"item {number}", kind)
        if keys is None:
            raise missing(envelope[0], "item")
        try:
            opened.append(keys.open(*envelope, kind, "item"))
        except CannotOpen as error:
            raise CannotOpen(f"item {number}: {error}") from None
    return f"[{','.join(opened)}]"


def in_the_clear(what: str, kind: str) -> CannotOpen:
    """Return the error for a value that had to be sealed."""
    return CannotOpen(
        f"{what} is in the clear, and all of this batch of kind {kind!r} must be sealed; enqueue it with keys "
        f"({VARIABLE})"
    )


def open_error(error: Any, kind: str) -> Any:
    """Return an element of batchq.batches.errors. If this program has its key, error and traceback are opened."""
    if not isinstance(error, dict) or "sealed" not in error:
        return error
    opened = opened_or_kept(error["sealed"], kind, "error")
    is_opened = isinstance(opened, dict) and envelope_of(opened) is None
    return {name: value for name, value in error.items() if name != "sealed"} | opened if is_opened else error


def opened_or_kept(value: Any, kind: str, field: Field) -> Any:
    """Return a JSON value, opened if it is sealed and this program can; otherwise as it is."""
    try:
        return open_value(value, kind, field)
    except (KeyMissing, CannotOpen):
        return value


def shortened(line: str) -> str:
    """Return the line of an error without the sealed part."""
    return _SEALED_LINE.sub(r"sealed with key \1", line) if "sealed with key" in line else line


# -------------------------------------------------------------------------------------------------- of this program


class _OfThisProgram:
    """Whether the environment was read, the keys, and the kinds whose handlers demand sealed batches."""

    is_read = False
    keys: Keys | None = None
    demanding: set[str] = set()  # noqa: RUF012 (one for the process)


def current() -> Keys | None:
    """Return this program's keys: those of `use_keys`, else of BATCHQ_ENCRYPTION_KEYS; None without. Raises
    ConfigError if they cannot be used."""
    if not _OfThisProgram.is_read:
        use_keys(os.environ.get(VARIABLE))
    return _OfThisProgram.keys


def use_keys(text: str | None) -> None:
    """Seal and open with the keys of *text* from now on, instead of those of BATCHQ_ENCRYPTION_KEYS.

    *text*: as in BATCHQ_ENCRYPTION_KEYS, ``ID:BASE64,ID:BASE64``; None or empty: without keys. For programs that
    get their keys from a key store; call it before the first enqueue and before a worker starts. Raises ConfigError.
    """
    put_keys(Keys.read(text) if text and text.strip() else None)


def put_keys(keys: Keys | None) -> None:
    """Seal and open with *keys* from now on; None: without keys."""
    _OfThisProgram.keys, _OfThisProgram.is_read = keys, True


def demand(kind: str) -> None:
    """Note that batches of *kind* must be sealed: its handler is in this program."""
    _OfThisProgram.demanding.add(kind)


def keys_for(kind: str) -> Keys | None:
    """Return the keys with which to seal a batch of *kind*; None: it is enqueued in the clear.

    Raises ConfigError if the kind's handler demands that it is sealed, and there are no keys.
    """
    keys = current()
    if keys is None and kind in _OfThisProgram.demanding:
        raise ConfigError(
            f"batches of kind {kind!r} must be sealed, and this program has no keys; set {VARIABLE} (docs/sealed.md)"
        )
    return keys


def sealed_of_schedule(payload: Any, kind: str) -> Any:
    """Return the payload that a schedule declares, sealed if there are keys; the same each time, so that the schedule
    does not change. A "tick" that is null stays beside it, for the time of the tick. Raises as `keys_for` does."""
    if (keys := keys_for(kind)) is None:
        return payload
    envelope = json.loads(keys.seal_steadily(json.dumps(payload, ensure_ascii=False), kind, "payload"))
    has_tick = isinstance(payload, dict) and "tick" in payload and payload["tick"] is None
    return envelope | {"tick": None} if has_tick else envelope


def new_key(name: str) -> str:
    """Return a new random key as an element of BATCHQ_ENCRYPTION_KEYS."""
    return f"{name}:{b2a_base64(os.urandom(_KEY_BYTES), newline=False).decode()}"


def is_id(name: str) -> bool:
    """Return whether *name* can be the name of a key."""
    return _ID.fullmatch(name) is not None


def read_keys(text: str) -> dict[str, bytes]:
    """Return the keys of BATCHQ_ENCRYPTION_KEYS by name. Raises ConfigError, which shows no part of a key."""
    found: dict[str, bytes] = {}
    for number, part in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        name, _, encoded = part.partition(":")
        if not is_id(name):
            raise ConfigError(f"{VARIABLE}: key number {number} has no valid name; write NAME:KEY, where {_ADVICE}")
        try:
            key = a2b_base64(encoded, strict_mode=True)
        except ValueError:
            key = b""
        if len(key) != _KEY_BYTES:
            raise ConfigError(
                f"{VARIABLE}: key number {number} is not NAME:KEY with 32 bytes in base64 for KEY; make one with "
                "`batchq new-key NAME`"
            )
        if name in found:
            raise ConfigError(f"{VARIABLE}: two keys have the name {name!r}; rename one")
        found[name] = key
    if not found:
        raise ConfigError(f"{VARIABLE} has no key; make one with `batchq new-key NAME`")
    return found
