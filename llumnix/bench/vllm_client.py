"""vLLM's own serving benchmark client, run by itself: ``python -m llumnix.bench.vllm_client OPTION …`` takes
the client's own options, those of ``vllm bench serve``. A process of its own, since vLLM must be imported
before its benchmarks. Called by ``llumnix bench vllm_serving``.
"""

import sys


def main(options: list[str]) -> None:
    from vllm import LLM  # noqa: F401  (its import sets up what the benchmarks import)
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    serve.main(parser.parse_args(options))


if __name__ == "__main__":
    main(sys.argv[1:])
