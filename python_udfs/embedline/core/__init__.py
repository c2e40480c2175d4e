"""Values and arithmetic: no database, no provider, no clock."""
