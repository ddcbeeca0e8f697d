# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Reading a sweep
# A notebook with `jupytext --to notebook docs/notebook.py`, or a script: `python docs/notebook.py multirun/NAME`. The
# sweep it was written for:
#
#     python run.py -m attn_mode=softmax,sigmoid ln_backward=exact,center_scale seed=1,2,3 diagnostics=trajectory sweep=NAME

# %%
import sys
from pathlib import Path

import lnjac
from lnjac.runs.merge import companions, load
from lnjac.runs.schema import LAYERS, RUNS

folder = Path(sys.argv[1]) if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir() else Path("multirun/NAME")
files = companions(folder / "all.parquet")
layers, runs, curves = (load(files[table]) for table in ("layers", "runs", "curves"))
print(f"{len(runs)} runs, {len(layers)} layer rows; status: {runs['status'].value_counts().to_dict()}")

# %% [markdown]
# ## What varies
# A column of the config that holds more than one value was swept. Seeds are the unit: compare norm by norm, seed by seed.

# %%
declared = {column.name for column in [*RUNS, *LAYERS]}
swept = [name for name in runs if name not in declared and runs[name].nunique(dropna=False) > 1]
print("swept:", ", ".join(swept))

# %% [markdown]
# ## How radial is the gradient at each norm, against chance?
# Chance is 1 for `enrichment_radial_share` at any width.

# %%
last = layers[layers["step"] == layers.groupby("run_id")["step"].transform("max")]
exact = last[last["ln_backward"] == "exact"]
print(exact.pivot_table("enrichment_radial_share", "site", "attn_mode", sort=False).round(2))

# %% [markdown]
# ## Where is the gradient's energy?
# Each norm's part of all ΣB + ΣC of its run; means over seeds. Energies add over calls and micro-batches of one norm, never
# over norms: a share of such a sum tells where the energy lies, in which the modes differ.

# %%
energy = (exact["sum_B"] + exact["sum_C"]).groupby([exact["attn_mode"], exact["seed"], exact["site"]], sort=False).sum()
part = energy / energy.groupby(["attn_mode", "seed"]).transform("sum")
print(part.groupby(["site", "attn_mode"], sort=False).mean().unstack("attn_mode").round(4))

# %% [markdown]
# ## What does center_scale cost, and does softmax pay more?
# Paired by seed: the difference between two runs that share initial weights, feedback and batches. `lnjac cost` gives the
# intervals.

# %%
losses = runs[runs["status"] == "done"].pivot(
    index=["attn_mode", "seed"], columns="ln_backward", values="val_loss_nats"
)
cost = (losses["center_scale"] - losses["exact"]).unstack("attn_mode")
cost["softmax - sigmoid"] = cost["softmax"] - cost["sigmoid"]
print(cost.round(4))

# %% [markdown]
# ## How does σ at ln_f grow?

# %%
top = layers[layers["site"] == "ln_f"]
print(top.pivot_table("sigma_mean", "step", ["attn_mode", "ln_backward"]).round(3))

# %% [markdown]
# ## Back to one model
# Its weights, its feedback and the batch it was analysed on.

# %%
run = lnjac.load_run(next(path.parent for path in sorted(folder.glob("*/status.json"))))
model, (idx, targets) = run.model(), run.diagnostic_batch()
_, loss = model(idx[0], targets[0])
print(run.run[["attn_mode", "ln_backward", "seed"]].iloc[0].to_dict(), "loss on its batch:", round(loss.item(), 4))
