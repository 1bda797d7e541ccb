"""The kit's fixtures and marks, for tests and examples."""

pytest_plugins = ["pie_async.testing.plugin"]
