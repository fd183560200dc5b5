"""The command line: :mod:`bench.cli.main` and one file a command."""
