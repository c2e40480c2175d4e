"""`embedline mcp`: tools of the Model Context Protocol over the pipelines."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from embedline.client.cli.application import OBSERVE, Dsn, app, fail, session
from embedline.client.connection import lines
from embedline.client.metrics_server import parse_address


@app.command(rich_help_panel=OBSERVE)
def mcp(
    dsn: Dsn,
    listen: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS:PORT", help="Serve HTTP at /mcp, on a loopback address; stdio without it."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds that a statement may take.")] = 10.0,
) -> None:
    """Serve list_pipelines, search, get_document and status to an assistant.

    The login is a role in embedline_reader; each statement runs in a read-only transaction.
    """
    if importlib.util.find_spec("mcp") is None:
        fail(lines("the package mcp is not installed", None, "pip install 'embedline[mcp]'"))
    from embedline.client.integrations import mcp_server

    try:
        address = None if listen is None else parse_address(listen)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if address is not None and not mcp_server.is_loopback(address[0]):
        raise typer.BadParameter(f"--listen {listen}: only a loopback address, such as 127.0.0.1:8765")
    # The session tells in its own words if there is no database.
    with session(dsn):
        reader = mcp_server.Reader(dsn, timeout)
    server = mcp_server.make_server(reader)
    try:
        if address is None:
            server.run("stdio")
        else:
            typer.echo(f"serving http://{listen}/mcp", err=True)
            mcp_server.serve_http(server, *address)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        reader.close()
