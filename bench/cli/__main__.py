"""``python -m bench.cli`` is ``llama-onnx``."""

import sys

from bench.cli.main import main

sys.exit(main())
