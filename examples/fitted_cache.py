"""Generation with a 4-bit cache that was fitted to a text, stopped, saved, and taken up again.

    python examples/fitted_cache.py --model demo --text data/calibration.txt --cache fine4

`jquant generate MODEL --prompt ... --cache fine4 --cache-text FILE` does the first half in one line. The settings fit
any cache of the model with this format: compute them once, and keep them beside the weights.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import jquant as jq
import jquant.models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="data/calibration.txt")
    parser.add_argument("--cache", default="fine4", metavar="FORMAT")
    parser.add_argument("--prompt", default="The key/value cache of a language model")
    parser.add_argument("--windows", type=int, default=8, help="to read, of --length tokens [%(default)s]")
    parser.add_argument("--length", type=int, default=2048, help="as long as the contexts to come [%(default)s]")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()

    model = jq.models.load(args.model)
    ids = model.tokenizer.encode(Path(args.text).read_text(encoding="utf-8"))[: args.windows * args.length]
    text = np.asarray(ids, np.int32).reshape(-1, 1, args.length)
    settings = jq.models.key_settings(model.params, model.config, text)
    settings |= jq.models.static_scales(model.params, model.config, text, args.cache, **settings)

    prompt = model.tokenizer.encode(args.prompt)
    cache = jq.models.init_cache(model.config, 1, len(prompt) + args.tokens, args.cache, **settings)
    half = args.tokens // 2
    first = jq.models.generate(model.apply, model.params, prompt, cache=cache, max_tokens=half)
    with tempfile.TemporaryDirectory() as folder:
        jq.models.save_state(Path(folder) / "state", first.state)
        state = jq.models.load_state(Path(folder) / "state")
    rest = jq.models.generate(model.apply, model.params, state=state, max_tokens=args.tokens - half)
    print(args.prompt + model.tokenizer.decode([*first.tokens[0], *rest.tokens[0]]))


if __name__ == "__main__":
    main()
