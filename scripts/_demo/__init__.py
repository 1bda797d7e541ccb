"""The demo: a server whose device arena is too small, its clients, and what they see."""
