"""Compare what is stored with what the source and the model ask for, and repair it."""
