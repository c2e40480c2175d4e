"""Define vector indexes, plan the memory and disk of a build, and build them."""
