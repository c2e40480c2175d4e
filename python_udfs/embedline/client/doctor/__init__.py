"""`embedline doctor`: find the server's missing parts and problems."""
