"""Links in a folder of media that lead to no file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from embedline.errors import InputRejected
from embedline.providers.files import FileFetcher


def test_a_link_to_a_pipe_is_refused(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    (tmp_path / "photo.png").symlink_to(f"/proc/self/fd/{reading}")
    fetcher = FileFetcher()
    try:
        with pytest.raises(InputRejected, match="link to another folder"):
            fetcher.submit(f"file://{tmp_path}/photo.png", [f"file://{tmp_path}/"]).result(10)
    finally:
        fetcher.close()
        os.close(reading)
        os.close(writing)
