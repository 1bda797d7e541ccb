"""The command line: flags in, an `EngineConfig` out, and people to talk to."""
