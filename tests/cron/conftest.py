"""A provider that answers at once, for what must happen while a worker always has work."""

from stub_fixtures import running_stub, stub

__all__ = ["running_stub", "stub"]
