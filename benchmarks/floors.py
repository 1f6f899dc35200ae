"""Which half of a rounding costs what: the KL of SmolLM2 with only the inputs of matmuls rounded, and with only the weights.

    python benchmarks/floors.py [--folds "" rotate rotate+smoothquant-tokens] [--elements int8 fp8_e4m3] [--leaves mlp/down]

On the 16 windows of the calibration text that `quality.py --tried` chooses settings on. Inputs are rounded with a scale per
token, weights to nearest with a scale per channel. Writes benchmarks/results/floors.md.
"""

import argparse
from typing import Any

from gptq import ROOT, windows


def measure(folds: list[str], elements: list[str], leaves: list[str]) -> list[str]:
    """Markdown rows."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jquant as jq
    import jquant.models
    from jquant.quantize import folded
    from jquant.trace import interpreter, view
    from jquant.trace.function import trace_call
    from jquant.trace.streams import RoundingReader
    from jquant.trace.targets import plan_targets

    model = jq.models.load("demo")
    seen, unseen = np.split(windows(model, "calibration", 80), [64])
    held, batches = [jnp.asarray(w)[None] for w in unseen], [jnp.asarray(seen[i : i + 2]) for i in range(0, 64, 2)]

    def inputs_rounded(act: jq.Activation, named: str) -> Any:
        """The function with the inputs of the leaves whose path has `named` in it rounded."""

        def run(params: Any, *args: Any) -> Any:
            traced = trace_call(model.apply, params, args, {})
            refs = [view.new_ref(p, v) for p, v in zip(traced.paths, traced.leaves, strict=True)]
            rounds = {p: act for p in traced.paths if named in p and "embed" not in p}
            outs = interpreter.run_all(
                traced.jaxpr, [*refs, *traced.arrays], RoundingReader(rounds, False), interpreter.Frame()
            )
            return jax.tree.unflatten(traced.out_tree, outs)

        return jax.jit(run)

    @jax.jit
    def divergence(want: jax.Array, got: jax.Array) -> jax.Array:
        p, q = jax.nn.log_softmax(want), jax.nn.log_softmax(got)
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))

    plain = jax.jit(jq.quantized(model.apply))
    want = [np.asarray(plain(model.params, w)) for w in held]
    kl = lambda run, params: np.mean([float(divergence(a, run(params, w))) for a, w in zip(want, held, strict=True)])
    all_of = lambda policy: jq.Recipe({"*embed*": None, "*": policy})
    targets = plan_targets(jq.find_sites(model.apply, model.params, batches[0]), model.params, all_of(jq.W8A8))
    rows = []
    for fold in folds:
        params = model.params
        if fold:
            params = folded(model.apply, [params], targets, jq.parse_method(fold), batches)
        for element in elements:
            act = jq.Activation(element)
            for named in ["", *leaves]:
                found = kl(inputs_rounded(act, named), params)
                rows.append(f"| {element} | {fold or '-'} | inputs{f' of {named}' if named else ''} | {found:.4f} |")
                print(rows[-1], flush=True)
            weights = jq.quantize(model.apply, params, all_of(jq.parse_format(element)), jq.rtn(), batches[:1])
            found = kl(plain, weights)
            rows.append(f"| {element} | {fold or '-'} | weights | {found:.4f} |")
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", nargs="*", default=["", "rotate", "rotate+smoothquant-tokens"])
    parser.add_argument("--elements", nargs="*", default=["int8", "fp8_e4m3"])
    parser.add_argument("--leaves", nargs="*", default=["mlp/down"])
    args = parser.parse_args()
    rows = measure(args.folds, args.elements, args.leaves)
    text = "# What each half of a rounding costs\n\nKL of SmolLM2-135M with only one half rounded to nearest, no solver.\n\n"
    text += "| element | after | rounded | KL |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    (ROOT / "benchmarks/results/floors.md").write_text(text)


if __name__ == "__main__":
    main()
