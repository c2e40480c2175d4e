"""Entry point of `python -m embedline.client.cli`."""

from __future__ import annotations

from embedline.client.cli import app

if __name__ == "__main__":
    app(prog_name="embedline")
