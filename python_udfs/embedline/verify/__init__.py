"""Compare stored data with the source and the model, and repair it."""
