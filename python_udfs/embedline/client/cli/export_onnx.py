"""`embedline export-onnx`: prepare a local model for onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from embedline.client import terminal
from embedline.client.cli.application import INSTALL, AsJson, app, fail
from embedline.client.connection import lines
from embedline.errors import ProviderError


@app.command("export-onnx", rich_help_panel=INSTALL)
def export_onnx(
    model: Annotated[str, typer.Argument(help="Directory of a sentence-transformers model, or its name on the hub.")],
    target: Annotated[Path, typer.Argument(help="Directory to make; the server must be able to read it.")],
    precision: Annotated[Literal["float32", "int8"], typer.Option(help="int8 is for processors.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Commit or tag on the hub.")] = None,
    json: AsJson = False,
) -> None:
    """Prepare a local model for onnxruntime ahead of time.

    A model host would otherwise do it at its first start.
    """
    from embedline.model_host import onnx_export

    try:
        manifest = onnx_export.export(model, str(target), precision, revision)
    except ProviderError as error:
        fail(lines(error.message, error.detail, error.hint))
    options = f'{{"backend": "onnx", "precision": "{precision}"}}'
    statement = (
        f"SELECT embedline.create_model(NAME, 'sentence-transformers', '{target.resolve()}', options => '{options}');"
    )
    if json:
        typer.echo(terminal.as_json({
            "path": str(target.resolve()), "dimensions": manifest.dimensions, "precision": precision,
            "statement": statement,
        }))  # fmt: skip
        return
    typer.echo(f"{target}: {manifest.dimensions} dimensions, {precision}. Register it as a superuser:")
    typer.echo(statement)
