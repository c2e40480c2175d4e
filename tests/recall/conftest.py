"""A provider for tests that put their vectors in directly."""

from __future__ import annotations

from stub_fixtures import running_stub

__all__ = ["running_stub"]
