"""A provider that can be told to misbehave."""

from __future__ import annotations

from stub_fixtures import running_stub, stub, stub_database

__all__ = ["running_stub", "stub", "stub_database"]
