"""onnxruntime-genai's own generator in a process of its own: one JSON request a line, one JSON answer a line.

Run by :mod:`bench.peers.genai` with an interpreter that has onnxruntime-genai (it pulls its own onnxruntime in); stands
alone, so that this interpreter needs none of the project. Requests: ``{"prompts": [[ids]], "new_tokens": n}``;
answers: ``{"tokens": [[ids]], "at_s": [seconds since the request]}``.
"""

import json
import sys
import time


def main(folder: str, threads: int) -> None:
    """Load, say which version runs, then serve until the input ends."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(folder)
    options = {"session_options": {"intra_op_num_threads": threads, "inter_op_num_threads": 1}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = og.Model(config)
    say({"version": og.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        prompts, count = request["prompts"], request["new_tokens"]
        started = time.perf_counter()
        params = og.GeneratorParams(model)
        total = len(prompts[0]) + count
        # Of equal least and greatest length: end tokens are not taken, as on every other side.
        params.set_search_options(do_sample=False, max_length=total, min_length=total, batch_size=len(prompts))
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        tokens, at = [], []
        for _ in range(count):
            generator.generate_next_token()
            tokens.append([int(t) for t in generator.get_next_tokens()])
            at.append(time.perf_counter() - started)
        del generator
        say({"tokens": [list(row) for row in zip(*tokens)], "at_s": at})  # noqa: B905 (any Python 3)


def say(message: dict[str, object]) -> None:
    """One line of standard output."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
