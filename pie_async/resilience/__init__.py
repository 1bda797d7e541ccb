"""An engine in a process of its own, restarted when it dies, its unfinished requests replayed."""
