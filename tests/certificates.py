"""A private authority, and a server on this machine with a certificate of it, made with the openssl command."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

_NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1"


@dataclass(frozen=True)
class Authority:
    """The files of an authority and of one server that it vouches for."""

    folder: Path

    @property
    def certificate(self) -> Path:
        """What clients are given to trust the server."""
        return self.folder / "ca.pem"

    def server_context(self) -> ssl.SSLContext:
        """Return what a server needs to present the certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "server.pem", self.folder / "server.key")
        return context


def make_authority(folder: Path) -> Authority:
    """Make an authority of its own in a folder, which other users may read."""
    folder.chmod(0o755)
    _openssl(folder, "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=private"
             " -addext keyUsage=critical,keyCertSign,cRLSign -keyout ca.key -out ca.pem")  # fmt: skip
    _openssl(folder, "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost"
             " -keyout server.key -out server.csr")  # fmt: skip
    (folder / "names").write_text(_NAMES)
    _openssl(folder, "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names"
             " -out server.pem")  # fmt: skip
    (folder / "ca.pem").chmod(0o644)
    return Authority(folder)


def _openssl(folder: Path, arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)
