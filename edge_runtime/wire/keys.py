"""Ed25519 keys as files: PEM, as OpenSSL reads them; private ones with mode 0600, refused if others can read them."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_runtime.errors import ConfigError
from edge_runtime.wire.signing import key_id, public_of

OTHERS = stat.S_IRWXG | stat.S_IRWXO
PEM_END = "-----END PUBLIC KEY-----"


@dataclass(frozen=True)
class SigningKey:
    """A private key; neither its text nor its representation shows it.

    Attributes:
        id: the short name of its public half.
        public: its public half, 32 bytes.
    """

    _private: Ed25519PrivateKey = field(repr=False, compare=False)
    public: bytes = field(init=False, repr=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "public", public_of(self._private))
        object.__setattr__(self, "id", key_id(self.public))

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key, from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> SigningKey:
        """The key that belongs to 32 secret bytes."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, data: bytes) -> bytes:
        """The signature over some bytes, 64 bytes."""
        return self._private.sign(data)

    def write(self, path: Path) -> None:
        """Write it as PKCS#8 PEM, readable by the owner only.

        Raises:
            FileExistsError: there is a file; keys are never overwritten.
        """
        pem = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_secret(path, pem)


def write_secret(path: Path, content: bytes) -> None:
    """Make a file with mode 0600 from its first byte on; durable once this returns.

    Raises:
        FileExistsError: there is one already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), 0o600)  # whatever the umask takes away
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_private(path: Path, what: str) -> None:
    """Refuse a file with a secret that others than its owner can read.

    Raises:
        ConfigError: there is none, or its mode lets others in.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(
            f"{what} was expected at {path}; it cannot be read ({error.strerror}); "
            "copy the folder that `edge-runtime provision` made"
        ) from error
    if mode & OTHERS:
        raise ConfigError(f"{what} at {path} must be its owner's alone; its mode is {mode:04o}; run: chmod 600 {path}")


def read_secret(path: Path, what: str) -> bytes:
    """The content of a file that only its owner can read.

    Raises:
        ConfigError: as `check_private`.
    """
    check_private(path, what)
    return path.read_bytes()


def read_signing_key(path: Path) -> SigningKey:
    """A private key from its file.

    Raises:
        ConfigError: there is none, others can read it, or it is no Ed25519 key.
    """
    content = read_secret(path, "a signing key")
    try:
        private = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"an Ed25519 key in PEM was expected at {path}; it does not parse; make a new one") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"an Ed25519 key was expected at {path}; found {type(private).__name__}; make a new one")
    return SigningKey(private)


def public_pem(public: bytes) -> str:
    """A public key (32 bytes) as PEM."""
    key = Ed25519PublicKey.from_public_bytes(public)
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def read_public_keys(path: Path) -> Sequence[bytes]:
    """The public keys in a PEM file, 32 bytes each: one, or during a change of keys the old and the new one.

    Raises:
        ConfigError: there is none, or one is no Ed25519 key.
    """
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"a public key in PEM was expected at {path} ({error}); copy the server's") from error
    keys: list[bytes] = []
    for block in text.split(PEM_END)[:-1]:
        try:
            key = serialization.load_pem_public_key((block + PEM_END).encode())
        except ValueError as error:
            raise ConfigError(f"{path}: public key {len(keys) + 1} does not parse; copy the server's again") from error
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"{path}: expected Ed25519 keys; found {type(key).__name__}; copy the server's again")
        keys.append(key.public_bytes_raw())
    if not keys:
        raise ConfigError(f"a public key in PEM was expected at {path}; found none; copy the server's")
    return keys
