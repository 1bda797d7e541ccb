"""ACTS. One file, one actor, one owner of one resource; they meet only through messages."""
