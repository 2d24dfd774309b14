"""Where a broker is, and how it knows us: names, credentials and certificates of one MQTT connection."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.wire.keys import check_private

LONGEST_CLIENT_ID = 128


@dataclass(frozen=True)
class BrokerAddress:
    """One broker, as a client sees it.

    Attributes:
        host: name or address.
        port: TCP port; 1883 by custom, 8883 with TLS.
        username: for brokers that ask for one.
        password: belongs to `username`.
        tls: encrypt, and trust the authorities of this system; implied by the three fields below.
        tls_ca: PEM file of the authority that signed the broker's certificate.
        tls_cert: PEM file of this client's certificate.
        tls_key: PEM file of its private key; None where `tls_cert` holds both.
        client_prefix: put before every client id, for brokers that several projects share or that demand a form.

    Raises:
        ConfigError: a port or host that cannot be, or a key without its certificate.
    """

    host: str
    port: int = 1883
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_prefix: str = ""

    def __post_init__(self) -> None:
        if not self.host or not 0 < self.port < 65_536:
            raise ConfigError(f"a broker needs a host and a port from 1 to 65535; found {self.host!r} and {self.port}")
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigError(f"expected tls_cert beside tls_key; found only {self.tls_key}; name the certificate too")

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return self.tls or self.tls_ca is not None or self.tls_cert is not None

    def client_id(self, name: str) -> str:
        """The MQTT client id of the client called `name`: the prefix, then the name.

        Raises:
            ConfigError: brokers would not take it, or would read it as a topic.
        """
        whole = self.client_prefix + name
        if not name or len(whole) > LONGEST_CLIENT_ID or any(sign in whole for sign in "/+#\0 "):
            raise ConfigError(
                f"a client id is 1 to {LONGEST_CLIENT_ID} characters without '/', '+', '#' and blanks; "
                f"found {whole[: LONGEST_CLIENT_ID + 8]!r}"
            )
        return whole

    def tls_context(self) -> ssl.SSLContext:
        """The TLS settings of an encrypted connection: the broker's certificate and host name are always verified.

        Raises:
            ConfigError: a file is missing or is not PEM, or others can read the private key.
        """
        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.tls_cert is not None:
                check_private(self.tls_key or self.tls_cert, "the private key of this client's certificate")
                context.load_cert_chain(self.tls_cert, self.tls_key)
        except OSError as error:
            files = ", ".join(str(path) for path in (self.tls_ca, self.tls_cert, self.tls_key) if path is not None)
            raise ConfigError(
                f"expected readable PEM files for TLS; found {error} among {files}; check them"
            ) from error
        return context
