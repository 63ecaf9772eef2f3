"""Any training loop can be checked: this one is plain numpy, and writes the log that `fedgmr-theory` reads.

python examples/theory_from_another_framework.py my_run.jsonl
fedgmr-theory check my_run.jsonl
fedgmr-theory gap my_run.jsonl
"""

import json
import sys

import numpy as np

N, D, K, ETA, WINDOWS, DENSITIES = 3, 40, 4, 0.02, 50, (1.0, 0.5, 0.2)
rng = np.random.default_rng(0)
X, w = rng.standard_normal((N, 60, D)), rng.standard_normal(D)
Y = X @ rng.standard_normal(D) + rng.standard_normal((N, 60))
CONFIG = {"aggregation": "mask_aware", "update_form": "delta", "update_scope": "arrivals", "mixing": False,
          "server_step": 1.0, "client_momentum": 0.0, "gradient_clip": None, "score": "magnitude",
          "interval": 1, "staleness": "constant"}  # fmt: skip
records = [{"type": "header", "schema": "1.0", "clients": N, "densities": DENSITIES, "eta": ETA,
            "local_steps": K, "config": CONFIG,
            "layout": {"size": D, "prunable": D, "dtype": "float64"}}]  # fmt: skip
for t in range(WINDOWS):
    order, step, weight, arrivals = np.argsort(-np.abs(w)), np.zeros(D), np.zeros(D), []
    masks = [np.isin(np.arange(D), order[: int(d * D)]) for d in DENSITIES]
    for n, m in enumerate(masks):
        at = {"dispatch": t * N + n, "client": n, "version": t, "density": DENSITIES[n]}
        whole, left_out = w @ w, w[~m] @ w[~m]
        records.append({"type": "dispatch", **at, "ranking": str(t), "support": int(m.sum()),
                        "norm_sq": whole, "masked_norm_sq": left_out,
                        "full_norm_sq": whole, "full_masked_norm_sq": left_out})  # fmt: skip
        path = [w * m]
        for batch in rng.integers(60, size=(K, 10)):
            path.append(path[-1] - ETA * m * ((X[n, batch] @ path[-1] - Y[n, batch]) @ X[n, batch]) / 10)
        change, drift = path[-1] - path[0], np.mean([np.sum((x - path[0]) ** 2) for x in path[:-1]])
        step, weight = step + change, weight + m
        arrivals.append({"type": "arrival", "window": t, **at, "staleness": 0, "weight": K * 10, "steps": K,
                         "samples": K * 10, "drift_sq": drift, "change_sq": change @ change})  # fmt: skip
    for n, m in enumerate(masks):
        arrivals[n]["pibar"] = 1 / weight[m].min()
    step = np.divide(step, weight, out=np.zeros(D), where=weight > 0)
    w = w + step
    records += [*arrivals, {"type": "window", "window": t, "arrivals": N, "gamma_min": int(weight.min()),
                            "uncovered": 0, "step_sq": step @ step, "learning_rate": ETA}]  # fmt: skip
with open(sys.argv[1] if len(sys.argv) > 1 else "my_run.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(record) + "\n" for record in [*records, {"type": "end", "windows": WINDOWS}])
