"""Why a TLS connection does not come about: which certificate it is, and when it is valid.

OpenSSL's own words ("certificate verify failed") leave out what a person needs. So after a failure the broker is asked
once more, without trusting it, for its certificate; and what the broker thinks of ours is read from its alert.
"""

from __future__ import annotations

import socket
import ssl
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from edge_runtime.errors import BrokerError, ConfigError

if TYPE_CHECKING:
    from edge_runtime.wire.address import BrokerAddress

PROBE_S = 5.0
ALERT_S = 2.0

# Codes of X509_verify_cert_error_string that say more than "not trusted".
NOT_YET_VALID, EXPIRED, HOST_MISMATCH, ADDRESS_MISMATCH = 9, 10, 62, 64

ALERTS = {
    "certificate required": "it wants a certificate of this client; name certfile and keyfile in [broker]",
    "certificate expired": "this client's certificate has expired; have it renewed: edge-runtime provision",
    "certificate revoked": "this client's certificate is revoked; have a new one made: edge-runtime provision",
    "unknown ca": "it does not trust the authority of this client's certificate; use the one of this fleet",
    "bad certificate": "it does not accept this client's certificate; use the one that was provisioned for this fleet",
    "handshake failure": "it does not accept this client, most likely for want of a certificate; see [broker] certfile",
}
"""What a broker's alert (RFC 8446, section 6) means to whom it is sent."""


def describe(certificate: x509.Certificate) -> str:
    """Whose certificate it is, who signed it, and when it is valid."""
    return (
        f"the certificate of '{_name(certificate.subject)}', signed by '{_name(certificate.issuer)}', valid "
        f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    )


def load(path: Path) -> x509.Certificate:
    """The first certificate in a PEM file.

    Raises:
        ConfigError: there is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"a certificate in PEM was expected at {path} ({error}); check the path") from error


def check_dates(path: Path, now: datetime | None = None) -> None:
    """Refuse one's own certificate outside its dates, before a broker does.

    Raises:
        BrokerError: it has expired, or is not valid yet.
    """
    certificate, now = load(path), now or datetime.now(timezone.utc)
    problem = _dates(certificate, now)
    if problem:
        raise BrokerError(f"this client's certificate {path} {problem}: {describe(certificate)}; {_remedy(problem)}")


def verdict(address: BrokerAddress, context: ssl.SSLContext) -> str | None:
    """Why no TLS connection to this broker can come about, or None where trying again may help.

    Takes a few seconds at most. Called after a failure.
    """
    try:
        with (
            socket.create_connection((address.host, address.port), PROBE_S) as line,
            context.wrap_socket(line, server_hostname=address.host) as secured,
        ):
            # Since TLS 1.3 a broker says what it thinks of our certificate only after the handshake.
            secured.settimeout(ALERT_S)
            secured.recv(1)
    except ssl.SSLCertVerificationError as error:
        return _mistrust(address, error)
    except ssl.SSLError as error:
        return _alert(address, error)
    except OSError:
        return None  # gone, or silent: not a matter of certificates
    return None


def _mistrust(address: BrokerAddress, error: ssl.SSLCertVerificationError) -> str:
    """What is wrong with the broker's certificate."""
    found = _presented(address)
    shown = describe(found) if found else "a certificate that cannot be read"
    match error.verify_code:
        case 9 | 10 as code:
            problem = "has expired" if code == EXPIRED else "is not valid yet"
            return f"the broker at {address} shows {shown}, which {problem}; {_remedy(problem)}"
        case 62 | 64:
            return (
                f"the broker at {address} shows {shown}, which is for {_names(found)} and not for '{address.host}'; "
                "connect to one of those names, or provision the broker again with --host"
            )
        case _:
            trusted = f"the authority in {address.tls_ca}" if address.tls_ca else "the authorities of this system"
            return (
                f"the broker at {address} shows {shown}, which {trusted} did not sign ({error.verify_message}); "
                "it is another broker, or broker.cafile is another fleet's"
            )


def _alert(address: BrokerAddress, error: ssl.SSLError) -> str | None:
    said = str(error.reason or error).lower().replace("_", " ")
    meaning = next((meaning for alert, meaning in ALERTS.items() if alert in said), None)
    own = f" ({describe(load(address.tls_cert))})" if meaning and address.tls_cert else ""
    return f"the broker at {address} refused us: {meaning}{own}" if meaning else None


def _presented(address: BrokerAddress) -> x509.Certificate | None:
    """The certificate that a broker shows, whoever signed it."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE  # only to be shown to a person; nothing is sent
    try:
        with (
            socket.create_connection((address.host, address.port), PROBE_S) as line,
            blind.wrap_socket(line, server_hostname=address.host) as secured,
        ):
            shown = secured.getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(shown) if shown else None
    except (OSError, ValueError):
        return None


def _dates(certificate: x509.Certificate, now: datetime) -> str:
    if now > certificate.not_valid_after_utc:
        return "has expired"
    return "is not valid yet" if now < certificate.not_valid_before_utc else ""


def _remedy(problem: str) -> str:
    clock = f"this machine's clock says {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    renew = "renew it: edge-runtime provision" if problem == "has expired" else "wait, or set the clock"
    return f"{clock}; if that is right, {renew}"


def _name(name: x509.Name) -> str:
    common = name.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(common[0].value) if common else name.rfc4514_string()


def _names(certificate: x509.Certificate | None) -> str:
    if certificate is None:
        return "other names"
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "no host"
    return ", ".join(f"'{entry.value}'" for entry in found)


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)
