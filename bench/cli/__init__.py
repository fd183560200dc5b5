"""The command line: :mod:`bench.cli.main`, and one module a command.

A command is a module with three names: ``HELP`` (its line in ``llama-onnx --help``), ``add_arguments(parser)`` and
``run(args) -> int`` (the exit code). Copy a short one, such as :mod:`bench.cli.random_model`, and name it in
:data:`bench.cli.main.COMMANDS`. Heavy libraries are imported inside ``run``, so that ``--help`` and ``report`` start at
once; results go through :func:`bench.cli.output.show`, which knows ``--json``.
"""
