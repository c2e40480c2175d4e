"""Choose the authorities that check an https provider's certificate.

The option ca_file comes first, then the usual variables of the server's environment, then the system's own store. Only
a superuser registers models, so only a superuser names a file. Its content is never shown.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from embedline.errors import ProviderMisconfigured

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

    from embedline.core.embedding import ModelConfig

# The first variable names files, the second directories in OpenSSL's form. The third, of the library requests, names
# either.
_FILE_VARIABLE, _DIRECTORY_VARIABLE, _EITHER_VARIABLE = "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"
_OPTION_HINT = """options => '{"ca_file": "/etc/ssl/private-ca.pem"}'"""


def tls_context(config: ModelConfig, environment: Mapping[str, str]) -> ssl.SSLContext | None:
    """Return the context that checks the provider's certificate.

    None means the client's own way, the system's store. Raises ProviderMisconfigured for a file or directory that
    cannot be used; the error names the option or variable.
    """
    option = config.options.get("ca_file")
    if option is not None:
        return _context(f'the ca_file of model "{config.name}"', _OPTION_HINT, file=str(option))
    file, directory = environment.get(_FILE_VARIABLE), environment.get(_DIRECTORY_VARIABLE)
    if file or directory:
        name = _FILE_VARIABLE if file else _DIRECTORY_VARIABLE
        return _context(f"{name} of the server's environment", _restart(name), file=file, directory=directory)
    if either := environment.get(_EITHER_VARIABLE):
        what, is_directory = f"{_EITHER_VARIABLE} of the server's environment", os.path.isdir(either)
        path = {"directory" if is_directory else "file": either}
        return _context(what, _restart(_EITHER_VARIABLE), **path)
    return None


def no_authorities() -> ssl.SSLContext:
    """Return a context that trusts no certificate, for connections without TLS."""
    import ssl

    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def untrusted(config: ModelConfig, address: str, error: BaseException) -> ProviderMisconfigured | None:
    """Return the error for a refused certificate, None for any other error."""
    import ssl

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ProviderMisconfigured(
                f"the certificate of {address} is not trusted",
                detail=cause.verify_message,
                hint=f'If its authority is a private one, register model "{config.name}" with {_OPTION_HINT},'
                f" or start the server with {_FILE_VARIABLE} set.",
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _context(what: str, way_out: str, *, file: str | None = None, directory: str | None = None) -> ssl.SSLContext:
    import ssl

    hint = f"Give certificates in PEM form that the server's operating-system user can read: {way_out}."
    if directory and not any(map(os.path.isdir, directory.split(os.pathsep))):
        raise ProviderMisconfigured(f"{what} names no directory", detail=directory, hint=hint)
    try:
        # A pipe or a device would keep the reader waiting.
        if file and not stat.S_ISREG(os.stat(file).st_mode):
            raise ProviderMisconfigured(f"{what} is no file", detail=file, hint=hint)
        return ssl.create_default_context(cafile=file or None, capath=directory or None)
    except ssl.SSLError:
        raise ProviderMisconfigured(f"{what} holds no certificate in PEM form", detail=file, hint=hint) from None
    except (OSError, ValueError) as error:
        detail = f"{file}: {getattr(error, 'strerror', None) or type(error).__name__}"
        raise ProviderMisconfigured(f"{what} cannot be read", detail=detail, hint=hint) from None


def _restart(variable: str) -> str:
    return f"set {variable} in the environment of the PostgreSQL server and restart the server"
