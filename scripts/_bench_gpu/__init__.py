"""The rows of the performance table: measured on one engine, beside rooflines and peers."""
