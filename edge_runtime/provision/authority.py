"""A fleet's certificate authority: certificates for its broker, server and devices, and the list of revoked ones.

X.509 through `cryptography`; keys are ECDSA on P-256, which every broker's TLS takes. They secure the connection alone:
messages are signed with other keys (`edge_runtime.wire.keys`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_runtime.errors import ConfigError
from edge_runtime.wire.certificates import load, pem
from edge_runtime.wire.keys import read_secret, write_secret

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 730
RENEW_BELOW_DAYS = 60
"""A certificate with less left is made anew, with the same key, whenever its fleet is provisioned."""

SKEW = timedelta(hours=1)
"""How far the clock of a device may be behind the one of the authority."""

Use = Literal["broker", "client"]


@dataclass(frozen=True)
class Subject:
    """Whom a certificate is for.

    Attributes:
        name: its common name; of a client, the user name at the broker.
        use: which side of a connection it is for.
        hosts: names and addresses of a broker.
        days: how long it is valid; negative for tests of what has expired.
    """

    name: str
    use: Use
    hosts: Sequence[str] = ()
    days: float = CERTIFICATE_DAYS


class Authority:
    """Signs certificates; its key is a file in its folder.

    Args:
        folder: made, with a new authority in it, if it holds none.
        fleet: goes into the authority's name.
    """

    def __init__(self, folder: Path, fleet: str) -> None:
        self.certificate_file, key_file = folder / "ca.crt", folder / "ca.key"
        if not key_file.exists():
            _new_authority(self.certificate_file, key_file, fleet)
        self._key = _read_key(key_file)
        self.certificate = load(self.certificate_file)

    def issue(self, subject: Subject, certificate_file: Path, key_file: Path, *, anew: bool = False) -> bool:
        """Make key and certificate if they are missing, or the certificate if it runs out, names other hosts or must.

        Returns:
            Whether anything was made.
        """
        if not key_file.exists():
            _write_key(ec.generate_private_key(ec.SECP256R1()), key_file)
        elif not anew and certificate_file.exists() and _still_good(load(certificate_file), subject):
            return False
        key = _read_key(key_file)
        certificate_file.write_bytes(pem(self._sign(subject, key.public_key())))
        return True

    def revoked(self, serials: Sequence[int]) -> bytes:
        """The list of revoked certificates, as PEM; it ends with the authority, for after its end all are refused."""
        now = datetime.now(timezone.utc)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - SKEW)
            .next_update(self.certificate.not_valid_after_utc)
        )
        for serial in sorted(serials):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - SKEW).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _sign(self, subject: Subject, public: ec.EllipticCurvePublicKey) -> x509.Certificate:
        now = datetime.now(timezone.utc)
        end = min(now + timedelta(days=subject.days), self.certificate.not_valid_after_utc)
        begin = min(now, end) - SKEW
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if subject.use == "broker" else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(_common_name(subject.name))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(_authority_key(self._key), critical=False)
        )
        if subject.hosts:
            names = x509.SubjectAlternativeName([_host(host) for host in subject.hosts])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _new_authority(certificate_file: Path, key_file: Path, fleet: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now, name = datetime.now(timezone.utc), _common_name(f"authority of {fleet}"[:64])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_key(key, key_file)
    certificate_file.write_bytes(pem(certificate))


def _still_good(certificate: x509.Certificate, subject: Subject) -> bool:
    left = certificate.not_valid_after_utc - datetime.now(timezone.utc)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = {str(entry.value) for entry in names}
    except x509.ExtensionNotFound:
        hosts = set()
    return left > timedelta(days=RENEW_BELOW_DAYS) and hosts == set(subject.hosts)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=signs_certificates, crl_sign=signs_certificates, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _authority_key(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _write_key(key: ec.EllipticCurvePrivateKey, path: Path) -> None:
    plain = serialization.NoEncryption()
    write_secret(path, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_secret(path, "a key of certificates"), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"a private key in PEM was expected at {path}; it does not parse; restore it") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"an ECDSA key was expected at {path}; found {type(key).__name__}; restore it")
    return key
