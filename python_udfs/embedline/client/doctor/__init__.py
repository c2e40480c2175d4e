"""`embedline doctor`: what the server lacks or suffers from."""
