set -x
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv
cat > /tmp/ceil.py <<'P'
import sys; sys.path.insert(0,'benchmarks')
import jax, jax.numpy as jnp, time, sys
print(sys.version, jax.__version__, jax.devices())
from clock import kernel_times, best
x=jax.random.normal(jax.random.key(0),(1<<30,),jnp.bfloat16)
f=jax.jit(lambda x: x+jnp.bfloat16(1)); 
t=best(f,x); print("copy TB/s", 4*(1<<30)/t/1e12)
a=jax.random.normal(jax.random.key(0),(8192,8192),jnp.bfloat16)
t=best(lambda a: a@a,a); print("matmul TFLOP/s", 2*8192**3/t/1e12)
print(kernel_times(f.lower(x).compile(), x))
g=jax.jit(lambda x,w: x@w.T)
for m in (1,16,64,4096):
    for n,k in ((8192,8192),(14336,4096)):
        ws=[jax.random.normal(jax.random.key(i),(n,k),jnp.bfloat16) for i in range(4)]
        x=jax.random.normal(jax.random.key(0),(m,k),jnp.bfloat16)
        c=g.lower(x,ws[0]).compile()
        r=[kernel_times(c,x,w) for w in ws*2]
        print("bf16",m,n,k,[f"{sum(t for _,t in q)*1e6:.1f}" for q in r], r[0])
P
timeout 100 python3 /tmp/ceil.py 2>&1 | grep -v Warning
T() { timeout $1 python3 benchmarks/tune.py --out $OUT/$2.json "${@:3}" 2>&1 | grep -v -i warn; }
T 90 w16 --what weights --formats int4-g128 int8 --rows 16 --limit 150 --seconds 60
T 60 w4096 --what weights --formats int4-g128 --rows 4096 64 --limit 60 --seconds 50
T 60 a --what attention --formats int8 int4-g64-asym kivi4 --limit 40 --seconds 40
T 60 c --what codes --rows 4096 --limit 50 --seconds 50
